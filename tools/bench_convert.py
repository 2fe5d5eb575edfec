"""Speed and memory of import and export, beside a plain TensorStore copy of the same arrays.

    python tools/bench_convert.py [--gigabytes=4] [--repeats=3] [--workdir=DIR] [--out=result.json]

Makes a synthetic bfloat16 checkpoint of about that size, random numbers, then runs in turn, each in
a process of its own: a plain copy (every chunk of the checkpoint read by TensorStore and written to
a new one, six reads in flight, committed 64 MB at a time), an export and an import of the same
numbers. All of them sync what they write to disk, and start with it in the page cache as the step
before has left it. Reported are the medians in MB of arrays a second, the ratios to the plain copy
run by run, and the largest resident memory above what the process held once its modules were
loaded. Needs three times the size on disk in --workdir, which is emptied again.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from mathv2_jax import checkpoint
from mathv2_jax.hf import exporter, folder, importer, names, store
from mathv2_jax.model.config import ModelConfig

# Per layer 16 experts of 3 x 1024 x 2048; the number of layers is chosen by the size asked for.
MODEL = dict(
    vocab_size=32_000,
    width=2048,
    num_layers=2,
    num_dense_layers=1,
    num_heads=16,
    q_latent_width=768,
    kv_latent_width=512,
    head_key_width=128,
    head_rope_width=64,
    head_value_width=128,
    dense_width=8192,
    expert_width=1024,
    num_experts=16,
    experts_per_token=4,
    num_mtp_layers=1,
    index_topk=1024,
    index_heads=16,
    index_head_width=128,
    param_dtype="bfloat16",
    compute_dtype="bfloat16",
)


def size_of(config: ModelConfig) -> int:
    """Bytes of the variables."""
    return sum(
        int(np.prod(e.full_shape)) * (4 if e.dtype == "float32" else 2)
        for e in names.table(config)
        if not e.copy
    )


def sized(gigabytes: float) -> ModelConfig:
    """The model with as many layers as come nearest."""
    small, large = (ModelConfig(**MODEL | dict(num_layers=n)) for n in (2, 3))
    layer = size_of(large) - size_of(small)
    num_layers = max(2, 2 + round((gigabytes * 1e9 - size_of(small)) / layer))
    return dataclasses.replace(small, num_layers=num_layers)


def make(at: epath.Path, gigabytes: float) -> dict[str, Any]:
    """A checkpoint of random numbers, piece by piece."""
    config = sized(gigabytes)
    draw = np.random.default_rng(0)
    writer = store.Writer(at / folder.CHECKPOINTS / "0")
    entries = [e for e in names.table(config) if not e.copy]
    for e in entries:
        chunk = list(e.shape)
        chunk[e.split] = e.step(checkpoint.CHUNK_BYTES, 2)
        writer.create(e.ours, e.full_shape, e.dtype, (*(1 for _ in e.stack), *chunk))
    for e in entries:
        dtype = np.dtype(checkpoint.jnp.dtype(e.dtype))
        for _, place in e.tensors():
            batch = writer.batch()
            for piece in e.pieces(place, e.step(checkpoint.CHUNK_BYTES, 2)):
                inner = piece.index[len(piece.index) - len(e.shape) :]
                shape = [part.stop - part.start for part in inner if isinstance(part, slice)]
                x = draw.standard_normal(shape, np.float32) * 0.02
                batch.write(e.ours, piece.index, x.astype(dtype))
            batch.commit()
            batch.wait()
    writer.finish(0, {})
    folder.write_config(at, config, {})
    return {"bytes": size_of(config), "num_layers": config.num_layers}


def copy_plainly(source: epath.Path, target: epath.Path) -> None:
    """Chunk by chunk with TensorStore alone: the same arrays, layout, compression and syncing.

    Six reads are in flight, and chunks are committed 64 MB at a time, one commit behind the next.
    """
    reader = store.Reader(source / folder.CHECKPOINTS / "0")
    context = tensorstore.Context()
    opened: list[tuple[Any, Any, tuple[slice, ...]]] = []
    for name in reader.leaves:
        spec = checkpoint.array_spec(source / folder.CHECKPOINTS / "0" / "state", name)
        old = tensorstore.open(spec, open=True, context=context).result()
        metadata = old.spec().to_json()["metadata"]
        kept = {n: metadata[n] for n in ("shape", "chunks", "compressor")}
        new_spec = checkpoint.array_spec(target, name) | {"metadata": kept, "dtype": old.dtype.name}
        new = tensorstore.open(new_spec, create=True, context=context).result()
        for corner in np.ndindex(
            *(-(-s // c) for s, c in zip(old.shape, kept["chunks"], strict=True))
        ):
            index = tuple(
                slice(i * c, min((i + 1) * c, s))
                for i, c, s in zip(corner, kept["chunks"], old.shape, strict=True)
            )
            opened.append((old, new, index))
    reads: deque[Any] = deque()
    transaction, size, committing = tensorstore.Transaction(), 0, None
    for number, (_, new, index) in enumerate(opened):
        while number + len(reads) < len(opened) and len(reads) < 6:
            old, _, ahead = opened[number + len(reads)]
            reads.append(old[ahead].read())
        x = reads.popleft().result()
        new.with_transaction(transaction)[index].write(x).result()
        size += x.nbytes
        if size < importer.BATCH_BYTES and number < len(opened) - 1:
            continue
        if committing is not None:
            committing.result()
        committing, transaction, size = transaction.commit_async(), tensorstore.Transaction(), 0
    if committing is not None:
        committing.result()


def work(task: str, at: epath.Path, gigabytes: float) -> dict[str, Any]:
    """One task in this process, measured."""
    quiet = lambda done, total: None  # noqa: E731 - a progress bar that shows nothing
    floor = _status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    began, cpu = time.monotonic(), time.process_time()
    found: dict[str, Any] = {}
    if task == "make":
        found = make(at / "source", gigabytes)
    elif task == "plain":
        copy_plainly(at / "source", at / "plain")
    elif task == "export":
        exporter.convert(
            folder.locate(at / "source"),
            at / "hf",
            dtype="bfloat16",
            max_shard_bytes=10**9,
            progress=quiet,
        )
    else:
        opened = importer.open_source(str(at / "hf"))
        importer.convert(opened, str(at / "hf"), at / "back", quiet)
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    peak = (_status("VmHWM") - floor) / 1e6
    return found | {"seconds": seconds, "cpu_seconds": cpu, "peak_mb_above_start": peak}


def _status(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def _in_a_process(task: str, at: pathlib.Path, gigabytes: float) -> dict[str, Any]:
    arguments = [f"--task={task}", f"--workdir={at}", f"--gigabytes={gigabytes}"]
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def run(at: pathlib.Path, gigabytes: float, repeats: int) -> dict[str, Any]:
    """All tasks in turn, `repeats` times."""
    made = _in_a_process("make", at, gigabytes)
    runs: dict[str, list[dict[str, Any]]] = {"plain": [], "export": [], "import": []}
    for number in range(repeats):
        for name in ("plain", "hf", "back"):
            shutil.rmtree(at / name, ignore_errors=True)
        for task, found in runs.items():
            os.sync()
            found.append(_in_a_process(task, at, gigabytes))
            shown = f"{made['bytes'] / found[-1]['seconds'] / 1e6:.0f} MB/s"
            print(f"run {number + 1}: {task} {shown}", file=sys.stderr, flush=True)
    rate = {
        task: [made["bytes"] / one["seconds"] / 1e6 for one in found]
        for task, found in runs.items()
    }
    result: dict[str, Any] = {"bytes": made["bytes"], "num_layers": made["num_layers"]}
    for task, found in runs.items():
        ratios = [a / b for a, b in zip(rate[task], rate["plain"], strict=True)]
        result[task] = {
            "mb_per_second": round(statistics.median(rate[task]), 1),
            "mb_per_second_by_run": [round(r, 1) for r in rate[task]],
            "ratio_to_plain": round(statistics.median(ratios), 3),
            "ratio_to_plain_by_run": [round(r, 3) for r in ratios],
            "cpu_seconds": round(statistics.median(one["cpu_seconds"] for one in found), 1),
            "peak_mb_above_start": round(max(one["peak_mb_above_start"] for one in found), 1),
        }
    return result


def main() -> int:
    """Prints the result as JSON; exit code 1 where a limit of the issue is not kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workdir", type=pathlib.Path, help="a folder on the disk to be measured")
    parser.add_argument("--out", type=pathlib.Path, help="a file for the result")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        found = work(arguments.task, epath.Path(arguments.workdir), arguments.gigabytes)
        print(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.workdir) as at:
        result = run(pathlib.Path(at), arguments.gigabytes, arguments.repeats)
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text)
    kept = all(
        result[task]["ratio_to_plain"] > 0.5 and result[task]["peak_mb_above_start"] < 1000
        for task in ("export", "import")
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
