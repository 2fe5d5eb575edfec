"""From a checkpoint to a Hugging Face folder, tensor by tensor."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from mathv2_jax import storage
from mathv2_jax.hf import config as config_lib
from mathv2_jax.hf import drafts, folder, names, store, tensors
from mathv2_jax.hf.importer import NUM_THREADS, Progress
from mathv2_jax.text import hf_tokenizer, tokenizer_files
from mathv2_jax.text.hf_tokenizer import HfTokenizer
from mathv2_jax.text.tokenizer import SentencePieceTokenizer

PIECE_BYTES = 2**25
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Wanted(NamedTuple):
    """One tensor to be written: its array, its place in the array's stack, its dtype there."""

    name: str
    entry: names.Entry
    place: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """In bytes, as theirs."""
        return int(np.prod(self.entry.their_shape, dtype=np.int64)) * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `1GiB` or a plain number; ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"size {text!r}: write a number with KB, MB or GB, like 5GB")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if not size:
        raise ValueError(f"size {text!r}: must be positive")
    return size


def convert(
    trained: folder.Trained,
    target: epath.Path,
    *,
    dtype: str,
    max_shard_bytes: int,
    progress: Progress,
    with_tokenizer: bool = True,
    check: Callable[[folder.Trained, str], None] | None = None,
) -> tuple[int, list[str]]:
    """Writes the newest sound checkpoint of `trained` into `target`; returns its step, and notes.

    `target` must be local, and empty or absent; it stays so unless all went well. That includes
    `check`, which is given what was exported and the folder, still a draft. Memory holds a few
    pieces. Without its tokenizer an export still says which tokens begin and end a text.
    ValueError where no checkpoint is sound, or the model or its tokenizer has no form in the
    format.
    """
    if not storage.is_local(target):
        raise ValueError(f"{target}: an export is written into a local folder")
    files, tokens = tokenizer_of(trained, with_files=with_tokenizer)
    config = config_lib.to_json(trained.config, dtype, tokens)
    complaints = []
    for step in trained.steps:
        try:
            reader = store.Reader(trained.checkpoints / str(step))
            with drafts.drafted(target) as draft:
                broken = _write(trained, reader, draft, jnp.dtype(dtype), max_shard_bytes, progress)
                for name, data in files.items():
                    storage.write_whole(draft / name, data)
                _write_json(draft / "config.json", config)
                if check is not None:
                    check(dataclasses.replace(trained, steps=[step]), os.fspath(draft))
        except store.DamagedError as error:
            complaints.append(str(error))
            logging.warning("damaged checkpoint, %s", error)
        else:
            return step, tensors.notes_of_broken(broken)
    raise ValueError(f"no sound checkpoint in {trained.checkpoints}: {'; '.join(complaints)}")


def _write(
    trained: folder.Trained,
    reader: store.Reader,
    draft: epath.Path,
    dtype: np.dtype,
    max_shard_bytes: int,
    progress: Progress,
) -> set[str]:
    """The names of the tensors that hold NaN or infinity."""
    broken: set[str] = set()
    entries = names.table(trained.config)
    _require_fit(entries, reader, trained.prefix)
    trunk = [e for e in entries if not e.verifier_head]
    head = [e for e in entries if e.verifier_head]
    wanted = _in_order_of_layers(trunk, dtype)
    own = [
        Wanted(name, entry, place, reader.leaves[trained.prefix + entry.ours][1])
        for entry in head
        for name, place in entry.tensors()
    ]
    total = sum(one.size for one in wanted + own)
    done = 0
    shards = list(_shards(wanted, max_shard_bytes))
    index: dict[str, str] = {}
    with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        for number, shard in enumerate([*shards, own]):
            name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            if shard is own:
                name = names.VERIFIER_HEAD_FILE
            else:
                index |= dict.fromkeys((one.name for one in shard), name)
            written = _write_file(pool, reader, trained.prefix, shard, draft / name, broken)
            with contextlib.closing(written):  # at once, should anything go wrong
                for size in written:
                    done += size
                    progress(done, total)
    reader.verify()
    metadata = {"total_size": sum(one.size for one in wanted)}
    _write_json(draft / tensors.INDEX, {"metadata": metadata, "weight_map": index})
    return broken


def _write_json(path: epath.Path, body: Mapping[str, Any]) -> None:
    storage.write_whole(path, _json(body))


def _json(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=2, sort_keys=True) + "\n").encode()


def _require_fit(entries: Sequence[names.Entry], reader: store.Reader, prefix: str) -> None:
    """ValueError lists every array that the config and the checkpoint do not agree upon."""
    wanted = {prefix + e.ours: e.full_shape for e in entries}
    inside = (f"{prefix}params.", f"{prefix}router.")
    held = {n: shape for n, (shape, _) in reader.leaves.items() if n.startswith(inside)}
    faults = [
        f"{name} is {list(held[name]) if name in held else 'not there'}, not "
        f"{list(wanted[name]) if name in wanted else 'known'}"
        for name in sorted(wanted | held)
        if wanted.get(name) != held.get(name)
    ]
    if faults:
        raise ValueError(f"the checkpoint is of another model than its config: {'; '.join(faults)}")


def _in_order_of_layers(entries: Sequence[names.Entry], dtype: np.dtype) -> list[Wanted]:
    keyed = []
    for rank, entry in enumerate(entries):
        kept = jnp.dtype("float32") if entry.ours.startswith("router.") else dtype
        for name, place in entry.tensors():
            # The trunk's arrays that no layer holds stand where they are used.
            layer = entry.first_layer + place[0] if place else (-1 if rank == 0 else 1 << 30)
            keyed.append(((layer, *place[1:], rank), Wanted(name, entry, place, kept)))
    return [one for _, one in sorted(keyed, key=lambda pair: pair[0])]


def _shards(wanted: Sequence[Wanted], limit: int) -> Iterator[list[Wanted]]:
    """Files of at most `limit` bytes, but for those of one larger tensor."""
    shard: list[Wanted] = []
    size = 0
    for one in wanted:
        if shard and size + one.size > limit:
            yield shard
            shard, size = [], 0
        shard.append(one)
        size += one.size
    if shard:
        yield shard


def _write_file(
    pool: futures.Executor,
    reader: store.Reader,
    prefix: str,
    shard: Sequence[Wanted],
    path: epath.Path,
    broken: set[str],
) -> Generator[int, None, None]:
    """Writes the tensors of one file, the `broken` are added; the size of each piece done."""
    layout = {one.name: (one.dtype, one.entry.their_shape) for one in shard}
    writer = tensors.Writer(os.fspath(path), layout)

    def put(job: tuple[Wanted, names.Piece]) -> int:
        one, piece = job
        x = reader.read(prefix + one.entry.ours, piece.index, again=one.entry.copy)
        x = one.entry.to_theirs(x.astype(one.dtype, copy=False))
        if not tensors.is_finite(x):
            broken.add(one.name)
        writer.write_rows(one.name, x, piece.rows.start)
        return x.nbytes

    jobs = [
        pool.submit(put, (one, piece))
        for one in shard
        for piece in one.entry.pieces(one.place, _step(reader, prefix, one.entry))
    ]
    try:
        for job in jobs:
            yield job.result()
    finally:
        for job in jobs:
            job.cancel()
        futures.wait(jobs)  # none writes into a file that is closed
        writer.close()


def _step(reader: store.Reader, prefix: str, entry: names.Entry) -> int:
    """As far along as one piece on disk reaches, or as many of them as are still small."""
    name = prefix + entry.ours
    axis = entry.split
    chunk = reader.chunk(name)[len(entry.full_shape) - len(entry.shape) :][axis]
    fitting = entry.step(PIECE_BYTES, reader.leaves[name][1].itemsize)
    return max(chunk, fitting // chunk * chunk)


def tokenizer_of(
    trained: folder.Trained, *, with_files: bool = True
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files by name, ids of control tokens), as far as there is a tokenizer.

    One of the files is generation_config.json, with the ids unless it names its own end of text;
    it is the only one where `with_files` is false.
    """
    where = trained.tokenizer
    files: dict[str, bytes] = {}
    made: HfTokenizer | SentencePieceTokenizer | None = None
    if where is not None and where.is_dir():
        files = {name: storage.read_bytes(where / name) for name in storage.list_names(where)}
        if hf_tokenizer.TOKENIZER in files:
            made = tokenizer_files.from_files(files)
    elif where is not None:
        made = SentencePieceTokenizer.from_bytes(storage.read_bytes(where))
        files = tokenizer_files.files_of(made, think=trained.think) if with_files else {}
    name = hf_tokenizer.GENERATION
    generation = hf_tokenizer.read_json(files, name) if name in files else {}
    stated = {n: generation[n] for n in config_lib.TOKEN_FIELDS if generation.get(n) is not None}
    ids = ({} if made is None else _ids(made)) | stated | dict(trained.tokens)
    if "eos_token_id" not in stated:
        files[name] = _json(generation | ids)
    if made is None or not with_files:
        return {name: files[name]}, ids
    return _without_code(files), ids


def _ids(made: HfTokenizer | SentencePieceTokenizer) -> dict[str, Any]:
    stops = made.stop_ids
    ids = {
        "bos_token_id": made.bos_id,
        "eos_token_id": stops[0] if len(stops) == 1 else list(stops),
        "pad_token_id": made.pad_id,
    }
    return {name: found for name, found in ids.items() if found is not None}


def _without_code(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The same tokenizer, not by the Python classes of its authors, which are not exported."""
    config = hf_tokenizer.read_json(files, hf_tokenizer.CONFIG)
    if config.pop("auto_map", None) is None:
        return dict(files)
    plain = config | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {**files, hf_tokenizer.CONFIG: _json(plain)}
