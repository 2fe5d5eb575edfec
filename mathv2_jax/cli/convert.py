"""mathv2-convert: a Hugging Face folder in, or a checkpoint out, tensor by tensor.

mathv2-convert --from_hf=DIR --checkpoint=NEW_DIR [--dtype=float32]
mathv2-convert --to_hf=NEW_DIR --checkpoint=DIR [--stage=NAME] [--step=N] [--dtype=bfloat16]
               [--max_shard_size=5GB] [--notokenizer]

Either with [--verify [--tokens=1,2,3;4,5,6]]: both sides are compared, configs, tensors and logits,
and what differs does not come into being; where both folders exist already they are compared and
left alone. The checkpoint of an export is what an import made, or the workdir of mathv2-train.

Exit codes: 0 finished, 2 bad usage or input, 1 failure or a difference, 143 ended by SIGTERM, 129
by SIGHUP. Whatever the code, nothing half-written stays.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import flags
from etils import epath

from mathv2_jax import storage
from mathv2_jax.cli import shell
from mathv2_jax.hf import exporter, folder, importer, verify
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.text import hf_tokenizer

_FROM = flags.DEFINE_string("from_hf", None, "Folder of config.json, safetensors and tokenizer.")
_TO = flags.DEFINE_string("to_hf", None, "The folder to be made.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A checkpoint's folder, or a run's workdir.")
_STAGE = flags.DEFINE_string("stage", None, "Of a run; default: the last that has checkpoints.")
_STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; default: the newest sound one.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Of the weights. Default: bfloat16 out, what config.json says in.",
)
_SHARD = flags.DEFINE_string("max_shard_size", "5GB", "Of one safetensors file.")
_TOKENIZER = flags.DEFINE_bool("tokenizer", True, "Write the tokenizer beside an export.")
_VERIFY = flags.DEFINE_bool("verify", False, "Compare both sides; needs the extra [hf].")
_TOKENS = flags.DEFINE_string("tokens", None, "What to verify on; default: random ones.")
_FLAGS = (_FROM, _TO, _CHECKPOINT, _STAGE, _STEP, _DTYPE, _SHARD, _TOKENIZER, _VERIFY, _TOKENS)


class Bar:
    """Progress on one line of a terminal; elsewhere a line now and then."""

    def __init__(self, seconds: float = 10.0):
        self._began = self._shown = time.monotonic()
        self._live = sys.stderr.isatty()
        self._seconds = 0.2 if self._live else seconds

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._shown < self._seconds:
            return
        self._shown = now
        rate = done / max(now - self._began, 1e-3)
        part = done / total if total else 1.0
        bar = f"[{'#' * int(30 * part):30}] {part:4.0%}"
        text = f"{bar}  {done / 1e9:.2f} of {total / 1e9:.2f} GB  {rate / 1e6:.0f} MB/s"
        end = "\n" if done >= total or not self._live else ""
        print(("\r" if self._live else "") + text, end=end, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Usage and input errors are one line and exit code 2; what is a bug keeps its traceback."""
    try:
        if shell.asks_for_help(argv):
            print(__doc__)
            print("\n".join(f"--{f.name}: {flags.FLAGS[f.name].help}" for f in _FLAGS))
            return shell.FINISHED
        checkpoint, source, target = _read_flags(argv)
        # Nothing is computed that an accelerator would speed up: others may be using it.
        jax.config.update("jax_platforms", "cpu")
        with _signals_raise():
            if source is not None:
                _import(os.fspath(source), checkpoint)
            elif target is not None:
                _export(checkpoint, target)
        return shell.FINISHED
    except verify.MismatchError as error:
        print(f"mathv2-convert: {error}", file=sys.stderr)
        return shell.FAILED
    except (ValueError, FileNotFoundError, flags.Error) as error:
        if not shell.is_of_input(error):
            raise
        print(f"mathv2-convert: {error}", file=sys.stderr)
        return shell.BAD_INPUT
    except OSError as error:  # a full disk, a folder that may not be read: no bug of ours
        print(f"mathv2-convert: {error}", file=sys.stderr)
        return shell.FAILED


def _read_flags(
    argv: Sequence[str],
) -> tuple[epath.Path, epath.Path | None, epath.Path | None]:
    """The folders of --checkpoint and of one of --from_hf, --to_hf; ValueError for other flags."""
    rest = flags.FLAGS(list(argv))
    if len(rest) > 1:
        raise ValueError(f"unexpected argument {rest[1]!r}: every setting is a --flag")
    if _CHECKPOINT.value is None or (_FROM.value is None) == (_TO.value is None):
        raise ValueError("--checkpoint=DIR and one of --from_hf=DIR, --to_hf=DIR must be given")
    folders = []
    for flag in (_CHECKPOINT, _FROM, _TO):
        if flag.value is not None and not flag.value.strip():
            raise ValueError(f"--{flag.name}= is empty: name a folder, . for the one you are in")
        folders.append(None if flag.value is None else shell.absolute(flag.value))
    if _TOKENS.value is not None and not _VERIFY.value:
        raise ValueError("--tokens are what --verify compares on: give both or neither")
    checkpoint, source, target = folders
    assert checkpoint is not None
    return checkpoint, source, target


def _import(source: str, target: epath.Path) -> None:
    of_exports = (_STAGE, _STEP, _TOKENIZER, _SHARD)
    if any(flag.value != flag.default for flag in of_exports):
        raise ValueError(
            "--stage, --step, --notokenizer and --max_shard_size choose what is exported and how; "
            "leave them out with --from_hf"
        )
    if _VERIFY.value and _is_full(target):
        trained = folder.locate(target)
        if _DTYPE.value not in (None, trained.config.param_dtype):
            raise ValueError(
                f"--dtype={_DTYPE.value}: {target} is there already, in "
                f"{trained.config.param_dtype}, and is only compared: leave --dtype out"
            )
        _compare(trained, source, None, _tokens(trained.config))
        return
    opened = importer.open_source(source, _DTYPE.value)
    check = None
    if _VERIFY.value:
        tokens_BT = _tokens(opened.config)

        def compare(draft: epath.Path) -> None:
            _compare(folder.locate(draft), source, None, tokens_BT)

        check = compare

    for note in importer.convert(opened, source, target, Bar(), check):
        print(f"note: {note}")
    print(f"imported {source} into {target}")


def _export(at: epath.Path, target: epath.Path) -> None:
    trained = folder.locate(at, _STAGE.value, _STEP.value)
    dtype = _DTYPE.value or "bfloat16"
    check = None
    if _VERIFY.value:
        tokens_BT = _tokens(trained.config)
        if _is_full(target):
            if any(flag.value != flag.default for flag in (_TOKENIZER, _SHARD)):
                raise ValueError(
                    f"--notokenizer and --max_shard_size choose how an export is written, but "
                    f"{target} is there already and is only compared: leave them out"
                )
            _compare(trained, os.fspath(target), dtype, tokens_BT)
            return

        def compare(exported: folder.Trained, draft: str) -> None:
            _compare(exported, draft, dtype, tokens_BT)

        check = compare

    step, notes = exporter.convert(
        trained,
        target,
        dtype=dtype,
        max_shard_bytes=exporter.parse_size(_SHARD.value),
        progress=Bar(),
        with_tokenizer=_TOKENIZER.value,
        check=check,
    )
    if not storage.exists(target / hf_tokenizer.TOKENIZER):
        notes.append(f"{target} has no tokenizer: put the files of one there to serve it")
    for note in notes:
        print(f"note: {note}")
    print(f"exported step {step} of {trained.checkpoints} as {dtype} into {target}")


def _tokens(config: ModelConfig) -> np.ndarray:
    """What to verify on; what `--verify` cannot do without is missed now, not after the work."""
    verify.require_reference()
    text = _TOKENS.value
    return verify.random_tokens(config) if text is None else verify.parse_tokens(text, config)


def _compare(trained: folder.Trained, path: str, dtype: str | None, tokens_BT: np.ndarray) -> None:
    found = verify.require_same(trained, path, dtype, tokens_BT)
    print(f"verified: every tensor is the same; {found}")
    chosen = trained.config.index_topk
    if found.reach <= chosen:
        print(
            f"note: the indexer had nothing to choose, since {found.reach} tokens, all that was "
            f"compared of a row, do not exceed index_topk = {chosen}: its tensors are the same, "
            "its choice was not compared; longer --tokens do"
        )


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP unwind the process as Ctrl-C does: nothing half-written stays."""

    def leave(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # a second one would break off the cleaning up
        raise SystemExit(128 + number)

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]  # nohup
    for each in before:
        signal.signal(each, leave)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _is_full(target: epath.Path) -> bool:
    return target.is_dir() and any(target.iterdir())


def run() -> None:
    """The console script."""
    shell.run(main)


if __name__ == "__main__":
    run()
