"""Hugging Face checkpoints in and out; `load` brings a small one into memory."""

from mathv2_jax.hf.importer import load as load
