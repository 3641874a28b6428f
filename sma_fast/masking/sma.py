"""SMA's masking policy: which tokens a model hides in one step, built from the ops.

"guided" masks the tokens that a few randomly drawn queries attend to most, "random" is the control:
as many tokens, drawn uniformly. Both draw from a generator or torch's global one, in training and
in evaluation alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sma_fast import _check, ops


@dataclass(frozen=True)
class SMAMasking:
    """How SMA masks, with the published settings for language as defaults.

    Args:
        mask_ratio: share of the valid tokens to mask, in (0, 1).
        num_per_query: tokens masked for each query drawn, at least 1:
            R = round(N mask_ratio / num_per_query).
        num_queries: R itself, at least 1; takes the place of `num_per_query`.
        head_reduce: "mean", "sum", or "random": one random head for each query ("random mix").
        mask: "guided", or "random" for the control.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Self-Guided Masked Autoencoders (arXiv 2402.14789), section 3.
    """

    mask_ratio: float = 0.15
    num_per_query: int = 4
    num_queries: int | None = None
    head_reduce: str = "mean"
    mask: str = "guided"

    def __post_init__(self) -> None:
        _check.number("mask_ratio", self.mask_ratio)
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio: got {self.mask_ratio}, allowed is (0, 1)")
        _check.number("num_per_query", self.num_per_query)
        if not self.num_per_query >= 1:
            raise ValueError(f"num_per_query: got {self.num_per_query}, allowed is at least 1")
        if self.num_queries is not None:
            _check.count("num_queries", self.num_queries, None)
            if self.num_queries < 1:
                raise ValueError(f"num_queries: got {self.num_queries}, allowed is at least 1")
        _check.choice("head_reduce", self.head_reduce, ("mean", "sum", "random"))
        _check.choice("mask", self.mask, ("guided", "random"))

    def count_queries(self, tokens: int, queries: int) -> int:
        """Returns R for N tokens (padded length) and M queries: at least 1 where there is one.

        The rule is that of `compat.RandomlySelectedCrossAttentionMasking`: an R that rounds to 0
        becomes 1, where the published code masks arbitrary tokens, and one above M is an error,
        where the published code silently takes all M.

        Args:
            tokens: N.
            queries: M.

        Returns:
            R.

        Raises:
            ValueError: naming `num_queries` or `num_per_query`, where R is above M.
        """
        if self.num_queries is not None:
            name, given, wanted = "num_queries", self.num_queries, self.num_queries
        else:
            name, given = "num_per_query", self.num_per_query
            wanted = round(tokens * self.mask_ratio / given)
        wanted = max(wanted, min(1, queries))
        if wanted > queries:
            raise ValueError(
                f"{name}: got {given}, which draws {wanted} of {queries} queries, allowed is to "
                "draw at most all of them"
            )
        return wanted

    def guided(
        self,
        query: Tensor,
        key: Tensor,
        *tokens: Tensor,
        key_padding_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ops.SelfGuidedMasking:
        """Returns the guided mask and the visible rows of `tokens`, see `self_guided_masking`.

        Args:
            query: (B or 1, H, M, D), of the first attention layer.
            key: (B, H_kv, N, D), of the first attention layer.
            tokens: any number of (B, N, ...) tensors to gather the visible rows of.
            key_padding_mask: (B, N) bool, True = padding.
            generator: for the draws. Default: torch's global one.

        Returns:
            SelfGuidedMasking.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        return ops.self_guided_masking(
            query,
            key,
            *tokens,
            mask_ratio=self.mask_ratio,
            num_queries=self.count_queries(key.shape[2], query.shape[2]),
            head_reduce=self.head_reduce,
            key_padding_mask=key_padding_mask,
            generator=generator,
        )

    def random(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ops.TokenSelection:
        """Returns a mask of as many tokens, drawn uniformly.

        Args:
            tokens: (B, N, ...), for its batch, length and device only.
            key_padding_mask: (B, N) bool, True = padding.
            generator: for the draws. Default: torch's global one.

        Returns:
            TokenSelection.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        _check.generator(generator)
        drawn = {} if generator is None else {"generator": generator}  # torch.compile takes no None
        noise = torch.rand(tokens.shape[:2], device=tokens.device, **drawn)
        return ops.select_tokens(
            noise, mask_ratio=self.mask_ratio, key_padding_mask=key_padding_mask
        )


def given_selection(mask: Tensor, key_padding_mask: Tensor | None = None) -> ops.TokenSelection:
    """Returns the selection that belongs to a mask which already exists.

    Its ids are N wide: how many tokens a row masks is known on the device only.

    Args:
        mask: (B, N) bool, True = masked; padding is left out.
        key_padding_mask: (B, N) bool, True = padding.

    Returns:
        TokenSelection with K = V = N.
    """
    if key_padding_mask is not None:
        mask = mask & ~key_padding_mask
    return ops.select_tokens(
        mask.float(), num_masked=mask.sum(dim=1), key_padding_mask=key_padding_mask
    )
