"""DeepSeek-V3.2's architecture at 69 thousand parameters, for tests."""

from configs.models import tiny_v3


def model() -> dict:
    """tiny_v3, each token attending to 7."""
    return tiny_v3.model() | dict(index_topk=7, index_heads=8, index_head_width=10)
