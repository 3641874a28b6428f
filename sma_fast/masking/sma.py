"""SMA's masking policy: which tokens a model hides in one step, built from the ops.

"guided" masks the tokens that a few randomly drawn queries attend to most, "random" is the control:
as many tokens, drawn uniformly. Both draw from a generator or torch's global one, in training and
in evaluation alike.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sma_fast import _check, _draws, ops


@dataclass(frozen=True)
class SMAMasking:
    """How SMA masks, with the published settings for language as defaults.

    Args:
        mask_ratio: share of the valid tokens to mask, in (0, 1).
        num_per_query: tokens masked for each query drawn, at least 1:
            R = round(N mask_ratio / num_per_query).
        num_queries: R itself, at least 1; takes the place of `num_per_query`. Where the queries
            are the tokens, a row with fewer draws all it has.
        head_reduce: "mean", "sum", or "random": one random head for each query ("random mix").
        mask: "guided", or "random" for the control.
        mask_self: where the queries are the tokens themselves, mask the drawn ones before all
            others.
        select_initial_ratio: s in [0, 1], how random the masks are at first: see `anneal_by`.
            Default: guided from the first step.
        schedule_length_ratio: the share of training, in (0, 1], over which that falls to nothing,
            as a = (1 + cos(pi progress / schedule_length_ratio)) / 2 falls from 1 to 0.
        anneal_by: "share": s a of a row's masked tokens are drawn at random, the rest are those of
            the highest scores (published for ragged lengths). "pool": all are drawn at random from
            the highest scores, mask_ratio + (s - mask_ratio) a of the row (published for fixed
            lengths; s is at least mask_ratio).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Self-Guided Masked Autoencoders (arXiv 2402.14789), section 3.
    """

    mask_ratio: float = 0.15
    num_per_query: int = 4
    num_queries: int | None = None
    head_reduce: str = "mean"
    mask: str = "guided"
    mask_self: bool = False
    select_initial_ratio: float | None = None
    schedule_length_ratio: float = 1.0
    anneal_by: str = "share"

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
        _check.flag("mask_self", self.mask_self)
        _check.choice("anneal_by", self.anneal_by, ("share", "pool"))
        if self.select_initial_ratio is not None:
            least = self.mask_ratio if self.anneal_by == "pool" else 0.0
            _check.ratio("select_initial_ratio", self.select_initial_ratio, least)
        _check.number("schedule_length_ratio", self.schedule_length_ratio)
        if not 0 < self.schedule_length_ratio <= 1:
            raise ValueError(
                f"schedule_length_ratio: got {self.schedule_length_ratio}, allowed is (0, 1]"
            )

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

    def count_masked(self, valid: Tensor) -> Tensor:
        """Returns how many tokens of each row are masked.

        Args:
            valid: (B,) integers, the number of valid tokens of each row.

        Returns:
            (B,) int64.
        """
        return (valid.double() * self.mask_ratio).round().long()

    def guided(
        self,
        query: Tensor,
        key: Tensor,
        *tokens: Tensor,
        key_padding_mask: Tensor | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> ops.SelfGuidedMasking:
        """Returns the mask that latent queries guide, and the visible rows of `tokens`.

        Args:
            query: (B or 1, H, M, D), of the first attention layer.
            key: (B, H_kv, N, D), of the first attention layer.
            tokens: any number of (B, N, ...) tensors to gather the visible rows of.
            key_padding_mask: (B, N) bool, True = padding.
            progress: the share of training that is done, in [0, 1], for annealing.
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
            **self.annealing(progress),
        )

    def guided_by_tokens(
        self,
        embeddings: Tensor,
        key: Tensor,
        project: Callable[[Tensor], Tensor],
        *,
        key_padding_mask: Tensor | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[ops.TokenSelection, Tensor]:
        """Returns the mask that the tokens' own queries guide, in self-attention, and its scores.

        Only the drawn tokens are projected to queries. A row of n_i valid tokens draws
        round(n_i mask_ratio / num_per_query) of them, at least 1.

        Args:
            embeddings: (B, N, E), what queries are made of.
            key: (B, H, N, D), of the first attention layer.
            project: makes (B, H, R, D) queries of (B, R, E) rows of `embeddings`.
            key_padding_mask: (B, N) bool, True = padding: neither drawn nor scored.
            progress: the share of training that is done, in [0, 1], for annealing.
            generator: for the draws. Default: torch's global one.

        Returns:
            TokenSelection, and (B, N) float32 scores.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        drawn = self.draw_tokens(embeddings, key_padding_mask, generator)  # (B, R)
        query = project(ops.gather_tokens(embeddings, drawn))  # (B, H, R, D)
        place = torch.arange(drawn.shape[1], device=drawn.device)
        head_index = None
        if self.head_reduce == "random":
            head_index = _draws.randint(query.shape[1], drawn.shape, generator, drawn.device)
        scores = ops.attention_scores(
            query,
            key,
            query_index=torch.where(drawn < 0, drawn, place),
            head_index=head_index,
            head_reduce="mean" if self.head_reduce == "random" else self.head_reduce,
            key_padding_mask=key_padding_mask,
        )
        return self.select(
            scores,
            drawn=drawn,
            key_padding_mask=key_padding_mask,
            progress=progress,
            generator=generator,
        ), scores

    def draw_tokens(
        self,
        tokens: Tensor,
        key_padding_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Returns (B, R) drawn tokens, ascending, -1 behind a row's own number.

        Args:
            tokens: (B, N, ...), for its batch, length and device only.
            key_padding_mask: (B, N) bool, True = padding, never drawn.
            generator: for the draws. Default: torch's global one.

        Returns:
            (B, R) int64 with R = `count_queries(N, N)`, or N where `num_queries` is more.
        """
        batch, length = tokens.shape[:2]
        if self.num_queries is not None:
            most = min(self.num_queries, length)
        else:
            most = self.count_queries(length, length)
        if key_padding_mask is None:
            return ops.draw_queries(
                most,
                batch=batch,
                num_candidates=length,
                device=tokens.device,
                generator=generator,
            )
        number: int | Tensor = most
        if self.num_queries is None:
            valid = (~key_padding_mask).sum(dim=1, dtype=torch.float64)  # (B,)
            number = (valid * self.mask_ratio / self.num_per_query).round().long().clamp(min=1)
        drawn = ops.draw_queries(number, padding_mask=key_padding_mask, generator=generator)
        return drawn[:, :most]  # no row has more

    def select(
        self,
        scores: Tensor,
        *,
        drawn: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        progress: float = 1.0,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ops.TokenSelection:
        """Returns the tokens to mask, by their scores.

        Args:
            scores: (B, N).
            drawn: (B, R) the drawn tokens, -1 for none; `mask_self` masks them before all others.
            key_padding_mask: (B, N) bool, True = padding.
            progress: the share of training that is done, in [0, 1], for annealing.
            noise: (B, N) uniform in [0, 1): decides the random share instead of `generator`.
            generator: for the draws. Default: torch's global one.

        Returns:
            TokenSelection.
        """
        if self.mask_self and drawn is not None:
            beside = torch.zeros_like(scores[:, :1])  # where the -1 go
            place = torch.where(drawn < 0, scores.shape[1], drawn)
            first = torch.cat([torch.zeros_like(scores), beside], 1).scatter(1, place, 1.0)
            scores = scores.masked_fill(first[:, :-1] > 0, float("inf"))
        return ops.select_tokens(
            scores,
            mask_ratio=self.mask_ratio,
            key_padding_mask=key_padding_mask,
            noise=noise,
            generator=generator,
            **self.annealing(progress),
        )

    def annealing(self, progress: float) -> dict[str, float]:
        """Returns the random part of the masks, as an argument of `select_tokens`.

        Args:
            progress: the share of training that is done, in [0, 1].

        Returns:
            {} where nothing is random, else `random_fraction` or `pool_ratio`.
        """
        initial = self.select_initial_ratio
        if initial is None or progress >= self.schedule_length_ratio:
            return {}
        amount = (1 + math.cos(math.pi * progress / self.schedule_length_ratio)) / 2
        if self.anneal_by == "share":
            return {"random_fraction": initial * amount}
        return {"pool_ratio": self.mask_ratio + (initial - self.mask_ratio) * amount}

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
        noise = _draws.rand(tokens.shape[:2], generator, tokens.device)
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
