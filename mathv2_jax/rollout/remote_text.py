"""What becomes of texts on their way to a server, and of its answers."""

import re

from mathv2_jax.text import tokenizer as tokenizer_lib

# <|user|>, <｜Assistant｜>, <think>, <s> and their like, at the bracket that opens them.
_CONTROL = re.compile(r"<(?=[|\uff5c][^<>\s]{1,60}[|\uff5c]>|/?(?:think|s|bos|eos|pad|unk)>)")


def tame(text: str) -> str:
    """Text without strings that a server's tokenizer would take for control tokens.

    A word joiner, which shows nothing, stands after the opening bracket of each. Hugging Face
    tokenizers encode such strings as control tokens wherever they stand, so that a proof could end
    its own turn.
    """
    return _CONTROL.sub("<\u2060", text)


def split_thinking(content: str, *, think: bool = False) -> tuple[str, str | None]:
    """(thinking, final) of an answer whose reasoning stands inline.

    It is cut at the last `</think>`, as tokenizers cut; the tag that opens it may be a part of the
    prompt. Where it is open (by its tag, or because the model thinks first) and never closed there
    is no final response.
    """
    before, closed, after = content.rpartition(tokenizer_lib.END_THINK)
    whole = before if closed else content
    opened = think or whole.lstrip().startswith(tokenizer_lib.THINK)
    if not closed and not opened:
        return "", content
    thinking = whole.lstrip().removeprefix(tokenizer_lib.THINK).strip()
    return thinking, after.lstrip() if closed else None
