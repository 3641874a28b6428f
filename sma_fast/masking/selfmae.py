"""Self-guided MAE's policy: random masks first, then masks that hide the object."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sma_fast import _check, _draws, ops
from sma_fast.masking.random import RandomMasking, number_for
from sma_fast.masking.score_table import ScoreTable, check_views

_DECAYS = {  # from 1 to 0, of t from 0 to 1
    "quadratic": lambda t: 1 - t * t,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}
_CHOICES = {
    "method": ("ncut", "pca"),
    "threshold": ("zero", "mean", "median"),
    "cluster": ("object", "background", "smaller", "larger"),
    "hints_by": ("random", "score", "rest"),
    "decay": tuple(_DECAYS),
}


@dataclasses.dataclass(eq=False)
class SelfMAEMasking:
    """Masks at random until `start`, then the patches most like the object's cluster.

    Some of these stay visible, as hints. The mask of a picture stays random where there is nothing
    to cut, where its cut has not converged, and while hints are all that is visible.

    The paper leaves open which layer, where to cut its vector, which cluster, when to begin and how
    many hints; each is an argument here.

    Args:
        mask_ratio: share of the patches to mask, in [0, 1]. Default: that of the model's config.
        start: the share of training before which masks are random. A quarter (chosen): the paper
            sees patches cluster early in pretraining, and says not when to begin.
        layer: whose embeddings are cut in two. The last one, as the paper has it.
        norm: whether through the encoder's last normalisation. True: so the decoder gets them.
        method: "ncut" or "pca", of `sma_fast.bipartition`. The paper's normalised cut.
        threshold: of the cut's vector, above which a patch is in the one cluster: "zero" for the
            labels of `sma_fast.bipartition`, or its "mean" or "median" over all patches. Zero: it
            is the mean weighted by the patches' degrees, and needs no other pass.
        cluster: whose patches are hidden, of `sma_fast.informed_scores`. The object.
        iterations, tol: of `sma_fast.bipartition`, whose defaults they are.
        initial_hints: the share of the visible patches that are hints, at `start`. All: with
            hints drawn at random that is a random mask, and the step from those is a small one. So
            masks are random until about a third of training, and by rank for the most part only in
            its last fifth; less makes them so earlier.
        final_hints: the same at the end. A tenth (chosen): the paper says that hints help, and not
            how many.
        decay: from one to the other, t from 0 to 1: "quadratic" for 1 - t^2, "linear" for 1 - t,
            "cosine" for (1 + cos(pi t)) / 2. Quadratic: another implementation's, slow at first.
        hints_by: which patches the h hints are. "random": drawn from the k + h most like the
            object, of which the other k are masked. "score": the h most like it. "rest": of the
            masked patches a share as large as that of the hints is drawn from all that are not
            masked by rank (`random_fraction` of `sma_fast.select_tokens`); the object shows only
            while that share is large. Random: each patch of the object is then hidden in most
            steps and a hint in some.
        refresh: epochs for which a picture's scores are kept where `table` is given. Five (chosen):
            that saves four of five unmasked forwards.
        table: file of the scores that are kept; it is made, or opened where it is. Default: scores
            are made anew in every step.
        pictures: how many the table has room for; needed with `table`.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Self-Guided Masked Autoencoder (arXiv 2507.19773), sections 3 and 4.
    """

    mask_ratio: float | None = None
    start: float = 0.25
    layer: int = -1
    norm: bool = True
    method: str = "ncut"
    threshold: str = "zero"
    cluster: str = "object"
    iterations: int = 64
    tol: float = 3e-4
    initial_hints: float = 1.0
    final_hints: float = 0.1
    decay: str = "quadratic"
    hints_by: str = "random"
    refresh: int = 5
    table: str | Path | None = None
    pictures: int | None = None

    def __post_init__(self) -> None:
        for name in ("start", "initial_hints", "final_hints"):
            _check.ratio(name, getattr(self, name))
        if self.mask_ratio is not None:
            _check.ratio("mask_ratio", self.mask_ratio)
        for name, allowed in _CHOICES.items():
            _check.choice(name, getattr(self, name), allowed)
        _check.layer(self.layer)
        _check.flag("norm", self.norm)
        _check.positive_count("iterations", self.iterations)
        _check.positive("tol", self.tol)
        _check.count("refresh", self.refresh, None)
        if self.pictures is not None:
            _check.positive_count("pictures", self.pictures)
        if self.table is not None and not isinstance(self.table, (str, os.PathLike)):
            raise TypeError(f"table: got {type(self.table).__name__}, allowed is a path or None")
        if self.table is not None and self.pictures is None:
            raise ValueError("pictures: got None beside a table, allowed is how many there are")
        self._opened: ScoreTable | None = None
        self._masked, self._at_random = 0, torch.tensor(0)

    def share_at_random(self) -> float:
        """Returns the share of the masks since this was last asked that are random ones.

        Of all pictures before `start` and while hints are all that is visible, later of those that
        were not cut. NaN where there are none.
        """
        masked, at_random = self._masked, int(self._at_random)
        self._masked, self._at_random = 0, torch.tensor(0)
        return at_random / masked if masked else math.nan

    def hints(self, progress: float) -> float:
        """Returns the share of the visible patches that are hints.

        1 before `start`; from there initial_hints to final_hints, along `decay`.

        Args:
            progress: the share of training that is done, in [0, 1].
        """
        _check.ratio("progress", progress)
        if self._waits(progress):
            return 1.0
        left = _DECAYS[self.decay]((progress - self.start) / (1 - self.start))
        return self.final_hints + (self.initial_hints - self.final_hints) * left

    def _waits(self, progress: float) -> bool:
        return progress < self.start or self.start == 1

    def __call__(
        self,
        model: Any,
        pixels: Tensor,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
        index: Tensor | None = None,
        epoch: int | None = None,
        view: Tensor | None = None,
        whole: Tensor | None = None,
    ) -> ops.TokenSelection:
        """Returns which patches are masked.

        Args:
            model: MAEForPretraining.
            pixels: (B, channels, height, width).
            progress: the share of training that is done, in [0, 1].
            generator: for the random masks and the hints. Default: torch's global one.
            index: (B,) integers, which pictures of the data set these are; needed with a table.
            epoch: which one this is, from 0; needed with a table.
            view: (B, 5), how the pictures were cut out and turned, see `ScoreTable`. Default: not
                at all.
            whole: as `pixels`, the pictures before that; the scores that a table keeps are then
                made of these. Default: of `pixels`, and a later view outside of `view` gets the
                scores at its edge.

        Returns:
            TokenSelection.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        _check.generator(generator)
        if self.table is not None:
            _check_kept(pixels, index, epoch, view, whole)
        number, share = number_for(model, self.mask_ratio), self.hints(progress)
        patches = model.config.num_patches
        hints = round(share * (patches - number))
        all_drawn = {
            "random": number + hints == patches,
            "score": False,
            "rest": round((1 - share) * number) == 0,
        }[self.hints_by]
        self._masked += len(pixels)
        if all_drawn or self._waits(progress):
            self._at_random = self._at_random + len(pixels)
            return RandomMasking(self.mask_ratio)(model, pixels, generator=generator)
        if self.table is None:
            scores = self.scores(model, pixels)
        else:
            scores = self._kept_scores(model, pixels, index, epoch, view, whole)
        # nothing was cut: all scores are 0, and the mask is a random one
        nothing = (scores == 0).all(dim=1, keepdim=True)
        self._at_random = self._at_random + nothing.sum()  # stays on the device until it is asked
        scores = torch.where(nothing, _draws.rand(scores.shape, generator, scores.device), scores)
        if self.hints_by == "random":
            pool = (number + hints) / patches
            return ops.select_tokens(
                scores, num_masked=number, pool_ratio=pool, generator=generator
            )
        if self.hints_by == "rest":
            return ops.select_tokens(
                scores, num_masked=number, random_fraction=share, generator=generator
            )
        shown = ops.select_tokens(scores, num_masked=hints)
        return ops.select_tokens(scores.masked_fill(shown.mask, -math.inf), num_masked=number)

    def scores(self, model: Any, pixels: Tensor) -> Tensor:
        """Returns how like the object's cluster each patch is, (B, N) float32.

        By one unmasked forward without gradient. A row is 0 where nothing was cut, and where the
        cut has not converged: such a mask would follow rounding.

        Args:
            model: MAEForPretraining.
            pixels: (B, channels, height, width).
        """
        return self.cut(model.embeddings(pixels, self.layer, self.norm))[1]

    def cut(self, embeddings: Tensor) -> tuple[ops.Bipartition, Tensor]:
        """Returns the patches cut in two, labelled by `threshold`, and scores as `scores` does.

        Args:
            embeddings: (B, N, C).
        """
        with torch.no_grad():
            cut = ops.bipartition(
                embeddings, method=self.method, iterations=self.iterations, tol=self.tol
            )
            if self.threshold != "zero":
                vector = cut.vector  # (B, N)
                middle = vector.mean(1) if self.threshold == "mean" else vector.median(1).values
                cut = cut._replace(labels=vector > middle[:, None])
            scores = ops.informed_scores(embeddings, cut, cluster=self.cluster)
            return cut, scores.masked_fill(~cut.converged[:, None], 0.0)

    def _kept_scores(
        self,
        model: Any,
        pixels: Tensor,
        index: Tensor,
        epoch: int,
        view: Tensor | None,
        whole: Tensor | None,
    ) -> Tensor:
        patches, since = model.config.num_patches, epoch - self.refresh + 1
        if self._opened is None or self._opened.side**2 != patches:
            self._opened = ScoreTable(self.table, self.pictures, patches)
        scores, fresh = self._opened.read(index, since, epoch, view)
        stale = (~fresh).nonzero()[:, 0]
        if len(stale):
            seen = pixels if whole is None else whole
            made = self.scores(model, seen[stale.to(pixels.device)])
            seen_in = None if view is None or whole is not None else view.cpu()[stale]
            self._opened.write(index.cpu()[stale], epoch, made, seen_in)
            scores, _ = self._opened.read(index, min(since, epoch), epoch, view)
        return scores.to(pixels.device)


def _check_kept(
    pixels: Tensor,
    index: Tensor | None,
    epoch: int | None,
    view: Tensor | None,
    whole: Tensor | None,
) -> None:
    if index is None or epoch is None:
        raise ValueError("index, epoch: got None, allowed is both where scores are kept")
    batch = len(pixels)
    _check.tensor("index", index, 1, "(B,)", _check.INTS)
    if len(index) != batch:
        raise ValueError(f"index: got shape {tuple(index.shape)}, allowed is {(batch,)}")
    _check.count("epoch", epoch, None)
    check_views(view, batch)
    if whole is not None:
        _check.tensor("whole", whole, 4, "as pixels", _check.FLOATS)
        if whole.shape != pixels.shape:
            raise ValueError(
                f"whole: got shape {tuple(whole.shape)}, allowed is {tuple(pixels.shape)}"
            )
