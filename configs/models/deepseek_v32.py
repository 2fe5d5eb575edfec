"""DeepSeek-V3.2-Exp, and by shape DeepSeek-Math-V2: DeepSeek-V3 with sparse attention (DSA).

671.88 B parameters with the indexers, 683.50 B with the MTP layer too, and 685.36 B on disk, where
that layer has its own copies of the embedding and of the head.
"""

from configs.models import deepseek_v3


def model() -> dict:
    """V3, each token attending to the 2,048 that the indexer picks."""
    return deepseek_v3.model() | dict(index_topk=2048, index_heads=64, index_head_width=128)
