"""Self-guided masking for masked autoencoders: from queries and keys to mask, ids and tokens."""

from sma_fast._dispatch import backends, show_config, use_backend
from sma_fast._version import __version__ as __version__
from sma_fast.ops import (
    Bipartition,
    SelfGuidedMasking,
    TokenSelection,
    aggregate_attention,
    attention_scores,
    bipartition,
    draw_queries,
    gather_tokens,
    informed_scores,
    random_masking,
    restore_tokens,
    select_tokens,
    self_guided_masking,
)

__all__ = [
    "Bipartition",
    "SelfGuidedMasking",
    "TokenSelection",
    "aggregate_attention",
    "attention_scores",
    "backends",
    "bipartition",
    "draw_queries",
    "gather_tokens",
    "informed_scores",
    "random_masking",
    "restore_tokens",
    "select_tokens",
    "self_guided_masking",
    "show_config",
    "use_backend",
]
