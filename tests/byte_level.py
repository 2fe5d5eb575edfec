"""A byte-level tokenizer in the manner of DeepSeek-V3's: small, with all its added tokens."""

import functools
import itertools
import json
import string
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXTS = [
    "Let $n \\geq 2$ be an integer, and suppose that $n^2 + 1 = 2026$.\tThen  n = 45.\n\n",
    "Für jede reelle Zahl x gilt x² ≥ 0. 对于每个实数。\n",
    "<think> so </think> the User and the Assistant begin of sentence tool calls </s>\n\n\n",
]
SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
PLACE_HOLDERS = tuple(f"<｜place▁holder▁no▁{i}｜>" for i in range(800))
TOOLS = tuple(
    f"<｜{name}｜>"
    for name in (
        *("fim▁hole", "fim▁begin", "fim▁end", "search▁begin", "search▁end"),
        *("tool▁calls▁begin", "tool▁calls▁end", "tool▁call▁begin", "tool▁call▁end"),
        *("tool▁outputs▁begin", "tool▁outputs▁end", "tool▁output▁begin", "tool▁output▁end"),
        "tool▁sep",
    )
)
NOT_SPECIAL = ("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", *TOOLS)
FULL_SIZE = 128_000
ADDED = (*SPECIAL, *PLACE_HOLDERS, *NOT_SPECIAL, "<|EOT|>")

# As V3.1's: one way to open a turn with thinking, one without; earlier thinking is cut away.
THINKING_TEMPLATE = """\
{% set ns = namespace(system='', user=false) %}
{%- for m in messages if m.role == 'system' %}
{%- set ns.system = ns.system + ('\n\n' if not loop.first else '') + m['content'] %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}{% endif %}
{%- if m.role == 'assistant' %}
{%- set said = m.content %}
{%- if '</think>' in said %}{% set said = said.split('</think>', 1)[1] %}{% endif %}
{{- '<｜Assistant｜></think>' + said + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}
{%- endif %}"""

# As V3's: no thinking.
PLAIN_TEMPLATE = """\
{{ bos_token }}{% for m in messages %}
{%- if m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}
{%- elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}
{%- else %}{{ m['content'] }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""

# As R1's: a turn always opens with thinking.
ALWAYS_THINKING = PLAIN_TEMPLATE.replace(
    "{{ '<｜Assistant｜>' }}{% endif %}", "{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)

# As others have it: lines of text between the control tokens and what is said.
LINES_TEMPLATE = """\
{{ bos_token }}{% for m in messages %}
{{- '<｜User｜>' + m.role + '\n' + m.content + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜User｜>assistant\n' }}{% endif %}"""


@functools.cache
def _trained() -> str:
    made = tokenizers.Tokenizer(models.BPE())
    digits = tokenizers.Regex(r"\p{N}{1,3}")
    chinese = tokenizers.Regex("[一-龥぀-ゟ゠-ヿ]+")
    words = tokenizers.Regex(r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|\s*[\r\n]+|\s+")
    cuts = [pre_tokenizers.Split(r, "isolated") for r in (digits, chinese, words)]
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    made.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(TEXTS * 2, trainer)
    made.add_special_tokens([*PLACE_HOLDERS, "<|EOT|>"])
    made.add_tokens([tokenizers.AddedToken(t, normalized=True) for t in NOT_SPECIAL])
    return made.to_str()


def spec() -> dict[str, Any]:
    """What tokenizer.json holds, to be changed by a test."""
    return json.loads(_trained())


def full_size() -> dict[str, Any]:
    """`spec` with 128,000 learned pieces, as DeepSeek-V3's has: the rest are up to four letters."""
    body = spec()
    vocab, merges = body["model"]["vocab"], body["model"]["merges"]
    pairs = [(a, b) for a in string.ascii_lowercase for b in string.ascii_lowercase]
    words = ["".join(pair) for pair in pairs]
    more = FULL_SIZE - len(vocab)
    for token in body["added_tokens"]:
        token["id"] += more if token["id"] >= len(vocab) else 0
    for pair in itertools.chain(pairs, itertools.product(words, words)):
        if len(vocab) < FULL_SIZE and "".join(pair) not in vocab:
            vocab["".join(pair)] = len(vocab)
            merges.append(list(pair))
    return body


def config(**changes: Any) -> dict[str, Any]:
    """What tokenizer_config.json holds; a value of None leaves a field out."""
    bos, eos, _ = SPECIAL
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": bos, "normalized": True},
        "eos_token": eos,
        "pad_token": eos,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": THINKING_TEMPLATE,
        **changes,
    }
    return {name: value for name, value in fields.items() if value is not None}


def files(
    template: Any = THINKING_TEMPLATE, body: Mapping[str, Any] | None = None, **changes: Any
) -> dict[str, bytes]:
    """The tokenizer's files by name."""
    return {
        "tokenizer.json": json.dumps(body or spec(), ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config(chat_template=template, **changes)).encode(),
        "generation_config.json": b'{"eos_token_id": 1}',
    }
