"""mathv2_jax: train language models that write, check and repair mathematical proofs."""

__version__ = "0.1.0"
