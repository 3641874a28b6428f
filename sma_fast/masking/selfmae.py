"""Self-guided MAE's policy: random masks first, then masks that hide the object."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sma_fast import _check, _draws, ops
from sma_fast.masking.random import RandomMasking, number_for
from sma_fast.masking.score_table import ScoreTable


@dataclasses.dataclass(frozen=True)
class SelfMAEMasking:
    """Masks at random until `start`, then the patches most like the object's cluster.

    The paper leaves open which layer, which cluster, when to begin and how many hints; each is an
    argument here.

    Args:
        mask_ratio: share of the patches to mask, in [0, 1]. Default: that of the model's config.
        start: the share of training before which masks are random. A quarter: the paper sees
            patches cluster early, after about 50 of its epochs.
        layer: whose embeddings are cut in two. The last one, as the paper has it.
        method: "ncut" or "pca", of `sma_fast.bipartition`. The paper's normalised cut.
        cluster: whose patches are hidden, of `sma_fast.informed_scores`. The object.
        iterations, tol: of `sma_fast.bipartition`, whose defaults they are.
        initial_hints: the share of the masked patches that is drawn at random at `start`, and so
            leaves as many of the object visible. All: the step from random masks is a small one.
        final_hints: the same at the end. A tenth: hints helped in the paper, none are worse.
        refresh: epochs for which a picture's scores are kept where `table` is given. Five: they
            change slowly, and an unmasked forward costs a third of a step.
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
    method: str = "ncut"
    cluster: str = "object"
    iterations: int = 64
    tol: float = 3e-4
    initial_hints: float = 1.0
    final_hints: float = 0.1
    refresh: int = 5
    table: str | Path | None = None
    pictures: int | None = None
    _tables: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("start", "initial_hints", "final_hints"):
            _check.ratio(name, getattr(self, name))
        if self.mask_ratio is not None:
            _check.ratio("mask_ratio", self.mask_ratio)
        _check.choice("method", self.method, ("ncut", "pca"))
        _check.choice("cluster", self.cluster, ("object", "background", "smaller", "larger"))
        _check.count("refresh", self.refresh, None)
        if self.table is not None and self.pictures is None:
            raise ValueError("pictures: got None beside a table, allowed is how many there are")

    def hints(self, progress: float) -> float:
        """Returns the share of the masked patches that is drawn at random.

        1 before `start`; from there initial_hints to final_hints along 1 - t^2, with t from 0 to 1:
        slowly at first.

        Args:
            progress: the share of training that is done, in [0, 1].
        """
        _check.ratio("progress", progress)
        if progress < self.start or self.start == 1:
            return 1.0
        t = (progress - self.start) / (1 - self.start)
        return self.final_hints + (self.initial_hints - self.final_hints) * (1 - t * t)

    def __call__(
        self,
        model: Any,
        pixels: Tensor,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
        index: Tensor | None = None,
        epoch: int | None = None,
        view: Tensor | None = None,
    ) -> ops.TokenSelection:
        """Returns which patches are masked.

        Args:
            model: MAEForPretraining.
            pixels: (B, channels, height, width).
            progress: the share of training that is done, in [0, 1].
            generator: for the random masks and the hints. Default: torch's global one.
            index: (B,) int64, which pictures of the data set these are; needed with a table.
            epoch: which one this is; needed with a table.
            view: (B, 5), how the pictures were cut out and turned, see `ScoreTable`. Default: not
                at all.

        Returns:
            TokenSelection.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        _check.generator(generator)
        hints = self.hints(progress)
        if hints == 1.0:
            return RandomMasking(self.mask_ratio)(model, pixels, generator=generator)
        if self.table is None:
            scores = self.scores(model, pixels)
        else:
            scores = self._kept_scores(model, pixels, index, epoch, view)
        # nothing was cut: all scores are 0, and the mask is a random one
        nothing = (scores == 0).all(dim=1, keepdim=True)
        scores = torch.where(nothing, _draws.rand(scores.shape, generator, scores.device), scores)
        return ops.select_tokens(
            scores,
            num_masked=number_for(model, self.mask_ratio),
            random_fraction=hints,
            generator=generator,
        )

    def scores(self, model: Any, pixels: Tensor) -> Tensor:
        """Returns how like the object's cluster each patch is, (B, N) float32, 0 where none was.

        By one unmasked forward without gradient.

        Args:
            model: MAEForPretraining.
            pixels: (B, channels, height, width).
        """
        with torch.no_grad():
            embeddings = model.embeddings(pixels, self.layer)  # (B, N, C)
            cut = ops.bipartition(
                embeddings, method=self.method, iterations=self.iterations, tol=self.tol
            )
            return ops.informed_scores(embeddings, cut, cluster=self.cluster)

    def _kept_scores(
        self,
        model: Any,
        pixels: Tensor,
        index: Tensor | None,
        epoch: int | None,
        view: Tensor | None,
    ) -> Tensor:
        if index is None or epoch is None:
            raise ValueError("index, epoch: got None, allowed is both where scores are kept")
        table = self._tables.get(model.config.num_patches)
        if table is None:
            table = ScoreTable(self.table, self.pictures, model.config.num_patches)
            self._tables[model.config.num_patches] = table
        scores, fresh = table.read(index, epoch - self.refresh + 1, view)
        stale = (~fresh).nonzero()[:, 0]
        if len(stale):
            made = self.scores(model, pixels[stale.to(pixels.device)]).cpu()
            table.write(
                index.cpu()[stale], epoch, made, None if view is None else view.cpu()[stale]
            )
            scores[stale] = made
        return scores.to(pixels.device)
