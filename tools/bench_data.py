r"""What the data pipeline costs: beside bare calls of the tokenizer, and at the start.

    python tools/bench_data.py [--records=2000] [--drawn=10000] [--many=1000000] [--repeats=5] \
        [--workers=0] [--out=FILE]

Conversations with proofs of 4 kB, made of the embedded world's words, lie in a table on disk. The
bare loop parses nothing: it calls the tokenizer on the same texts, in the same order. The pipeline
reads them from the table, draws them from a mixture of two sources, tokenises and packs them into
rows of 4,096 tokens. Both run in turn; each has its median and range, and the last line is JSON.
Then a table of --many short conversations is written, opened, and its first batch read; 0: not.
"""

import argparse
import functools
import json
import pathlib
import random
import statistics
import sys
import tempfile
import time
from typing import Any

from absl import flags

from mathv2_jax import records
from mathv2_jax.data import mixture, rows, table
from mathv2_jax.stages import sft
from mathv2_jax.text import tokenizer as tokenizer_lib

BYTES, LENGTH, ROWS = 4096, 4096, 8
WORDS = [f"{a} implies {b}" for a in "ABCDEFGH" for b in "ABCDEFGH"] + ["from", "the", "facts:"]
ONLY = (mixture.Phase(begin=0, weights={"human": 0.7, "auto": 0.3}),)


def conversation(number: int, size: int) -> records.Demonstration:
    draw, words, left = random.Random(number), [], size
    while left > 0:
        words.append(draw.choice(WORDS))
        left -= len(words[-1]) + 1
    proof = " ".join(words)
    user = f"Given: A. Show: {number}."
    return records.Demonstration(
        id=f"d{number}", role="generator", problem_id="p", user=user, assistant=proof
    )


def stream(folder: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer) -> Any:
    read = functools.partial(records.from_json, records.Demonstration)
    sources = {name: table.Table(folder / name, read) for name in ("human", "auto")}
    item = functools.partial(sft.supervised_item, tokenizer, prompt_weight=0.0, think=False)
    return mixture.stream(sources, ONLY, 0), item


def packed(items: Any, length: int) -> rows.PackedRows:
    return rows.PackedRows(items, ROWS, length, rows.Position(), range(ROWS))


def pipeline(folder: pathlib.Path, tokenizer: Any, number: int, workers: int) -> tuple[float, int]:
    """Seconds for batches that hold so many items at least, and how many they hold."""
    drawn, item = stream(folder, tokenizer)
    began = time.perf_counter()
    reader = rows.Reader(packed(drawn.map(item), LENGTH), workers)
    if workers:
        reader.read()  # they are started
        began = time.perf_counter()
    found = 0
    while found < number:
        batch = reader.read()
        assert batch is not None
        # Each item is a prompt and an answer: two segments of a row.
        found += int(batch.segments_BT.max(axis=1).sum()) // 2
    taken = time.perf_counter() - began
    reader.close()
    return taken, found


def bare(folder: pathlib.Path, tokenizer: Any, number: int) -> float:
    """Seconds for the tokenizer's calls on as many items, whose texts are there already."""
    drawn, _ = stream(folder, tokenizer)
    texts = [(d.user, d.assistant) for d in (drawn[at] for at in range(number))]
    began = time.perf_counter()
    for user, assistant in texts:
        tokenizer.encode([tokenizer_lib.Message("user", user)])
        tokenizer.encode_text(assistant)
    return time.perf_counter() - began


def start_up(folder: pathlib.Path, tokenizer: Any, number: int) -> dict[str, float]:
    """Seconds to write a table of so many records, and from opening it to its first batch."""
    began = time.perf_counter()
    for name, share in (("human", 0.7), ("auto", 0.3)):
        size = int(number * share)
        table.write(folder / name, (conversation(n, 200) for n in range(size)))
    written = time.perf_counter() - began
    began = time.perf_counter()
    drawn, item = stream(folder, tokenizer)
    reader = rows.Reader(packed(drawn.map(item), 256))
    reader.read()
    taken = time.perf_counter() - began
    size = sum(f.stat().st_size for f in folder.rglob("*.jsonl"))
    return {"records": number, "bytes": size, "write_seconds": written, "start_seconds": taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--drawn", type=int, default=10_000, help="of these records, by each run")
    parser.add_argument("--many", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    flags.FLAGS(sys.argv[:1])  # Grain hands them to its workers
    found: dict[str, Any] = {"workers": args.workers}
    with tempfile.TemporaryDirectory() as at:
        folder = pathlib.Path(at)
        for name, share in (("human", 0.7), ("auto", 0.3)):
            number = int(args.records * share)
            table.write(folder / "proofs" / name, (conversation(n, BYTES) for n in range(number)))
        texts = [conversation(n, BYTES).assistant for n in range(50)]
        model = tokenizer_lib.train(texts, vocab_size=420, whole_phrases=())
        tokenizer = tokenizer_lib.SentencePieceTokenizer.from_bytes(model)
        rates: dict[str, list[float]] = {"pipeline": [], "bare": []}
        for _ in range(args.repeats):
            taken, number = pipeline(folder / "proofs", tokenizer, args.drawn, args.workers)
            rates["pipeline"].append(number / taken)
            rates["bare"].append(number / bare(folder / "proofs", tokenizer, number))
        found |= {"records_per_second": rates}
        for name, each in rates.items():
            print(
                f"{name:10}{statistics.median(each):>10,.0f} records/s, {min(each):,.0f} to "
                f"{max(each):,.0f} over {len(each)}"
            )
        found["ratio"] = statistics.median(rates["pipeline"]) / statistics.median(rates["bare"])
        print(f"the pipeline has {found['ratio']:.2f} of the bare calls' rate")
        if args.many:
            found["start_up"] = start_up(folder / "many", tokenizer, args.many)
            print("start-up: " + ", ".join(f"{k} {v:,.1f}" for k, v in found["start_up"].items()))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
