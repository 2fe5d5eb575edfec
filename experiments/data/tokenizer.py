"""A SentencePiece model of 16,384 tokens of a folder of records, to count their lengths with.

python experiments/data/tokenizer.py --records=DIR --out=FILE.model
"""

import argparse
import pathlib

from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.data import store
from mathv2_jax.text import tokenizer

SIZE = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=epath.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    texts = []
    for record in store.require(args.records).latest():
        match record:
            case records.Problem():
                texts.append(record.statement)
            case records.Proof() | records.Analysis():
                texts.append(record.text)
    model = tokenizer.train(texts, vocab_size=SIZE, whole_phrases=())
    storage.write_whole(args.out, model)
    print(f"{SIZE} tokens of {len(texts)} texts in {args.out}")


if __name__ == "__main__":
    main()
