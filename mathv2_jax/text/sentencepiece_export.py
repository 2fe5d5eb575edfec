"""Our SentencePiece models as files that transformers reads, with the same ids for every text.

SentencePiece joins the two neighbours whose joined piece has the best score, wherever it was cut
before; `tokenizers` follows a list of pairs. The list holds every cut of every piece, so that both
take the same way; what remains open is the order of different cuts of one piece, and the files
are compared with the model before they are handed out.
"""

import itertools
import json
import random
from collections.abc import Iterable, Mapping

import tokenizers

from mathv2_jax.text import tokenizer
from mathv2_jax.text.tokenizer import SentencePieceTokenizer

TOKENIZER = "tokenizer.json"
MODEL = "mathv2_tokenizer.model"  # a name that transformers does not look for
_NUM_RANDOM_TEXTS = 4000
_PIECES_A_TEXT = 12

_TEMPLATE = """\
{%- if thinking is not defined %}{% set thinking = DEFAULT %}{% endif -%}
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|' ~ message['role'] ~ '|>' -}}
{%- if message['role'] == 'assistant' and message['reasoning_content'] is string -%}
{{- '<think>' ~ message['reasoning_content'] ~ '</think>' -}}
{%- endif -%}
{{- message['content'] -}}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- if thinking -%}{{- '<think>' -}}{%- endif -%}
{%- endif -%}
"""


def files_of(model: SentencePieceTokenizer, *, think: bool) -> dict[str, bytes]:
    """tokenizer.json and what goes with it, by name; the model itself is one of them.

    The chat template gives the ids of `encode` and, where `think` is true, opens thinking unless
    it is called with thinking=False. ValueError where a text was found whose ids would change.
    """
    spec = json.dumps(_spec(model), ensure_ascii=False, indent=1)
    require_same(model, tokenizers.Tokenizer.from_str(spec))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.BOS,
        "eos_token": tokenizer.EOS,
        "pad_token": tokenizer.PAD,
        "unk_token": tokenizer.UNK,
        "clean_up_tokenization_spaces": False,
    }
    template = _TEMPLATE.replace("DEFAULT", "true" if think else "false")
    return {
        TOKENIZER: spec.encode(),
        "tokenizer_config.json": (json.dumps(config, indent=1) + "\n").encode(),
        "chat_template.jinja": template.encode(),
        MODEL: model.model_bytes,
    }


def require_same(
    model: SentencePieceTokenizer,
    converted: tokenizers.Tokenizer,
    texts: Iterable[str] = (),
) -> None:
    """ValueError names a text with other ids: of `texts`, pieces, joined pieces and random ones.

    Texts that spell a control token are left out: transformers reads it as the token.
    """
    for text in itertools.chain(texts, _probes(model)):
        if any(control in text for control in tokenizer.CONTROL_TOKENS):
            continue
        expected = model.encode_text(text)
        found = converted.encode(text, add_special_tokens=False).ids
        if found != expected:
            raise ValueError(
                f"this SentencePiece model has no exact {TOKENIZER}: {text[:200]!r} would have "
                f"other ids ({found[:20]}, not {expected[:20]}). Train the tokenizer with another "
                "vocab_size, or export without it: mathv2-convert --notokenizer"
            )


def _probes(model: SentencePieceTokenizer) -> Iterable[str]:
    words = list(model.pieces())
    yield from words
    yield from (word * 3 for word in words)
    draw = random.Random(0)
    letters = sorted({letter for word in words for letter in word} | {"\u2581", "\u00df"})
    for _ in range(_NUM_RANDOM_TEXTS):
        for pool in (words, letters):
            yield "".join(draw.choices(pool, k=_PIECES_A_TEXT))


def _spec(model: SentencePieceTokenizer) -> dict[str, object]:
    reserved, pieces = model.reserved(), model.pieces()
    first_byte = reserved["<0x00>"]
    phrases = {text: i for text, i in pieces.items() if i < first_byte}
    learned = {text: i for text, i in pieces.items() if i > first_byte}
    hidden = {i: name not in tokenizer.SHOWN_TOKENS for name, i in reserved.items()}
    special = {i: hidden[i] for i in model.control_ids} | {i: False for i in phrases.values()}
    spelt = {i: text for text, i in (*reserved.items(), *pieces.items())}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, spelt[i], special[i]) for i in sorted(special)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.UNK,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {spelt[i]: i for i in sorted(spelt)},
            "merges": _merges(model, learned),
        },
    }


def _added(token_id: int, content: str, special: bool) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **flags, "special": special}


def _merges(model: SentencePieceTokenizer, learned: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every cut of every learned piece into two, best score first, then the longest left part."""
    ranked = [
        (-model.score(i), -cut, (text[:cut], text[cut:]))
        for text, i in learned.items()
        for cut in range(1, len(text))
        if text[:cut] in learned and text[cut:] in learned
    ]
    return [pair for _, _, pair in sorted(ranked)]
