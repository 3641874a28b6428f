"""What bench.pictures reads from models: classes of the test pictures, by linear probe and k-NN."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import sma_fast
from sma_fast.masking.random import count_masked
from sma_fast.masking.selfmae import SelfMAEMasking
from sma_fast.models import MAEForPretraining
from sma_fast.training import checkpoints
from sma_fast.training.data import Examples, load
from sma_fast.training.inputs import Encodings
from sma_fast.training.pretrained import load_model

NEIGHBOURS = 20
STRENGTH = 0.1  # C of the linear probe's logistic regression, the same for all
_AT_A_TIME = 250  # pictures in memory


class Pictures:
    """Labelled pictures of a zip file, encoded as those that a run was trained on.

    Args:
        source: zip file with SPLIT/CLASS/FILE.
        folder: of the run.
        limit: use this many of each part, evenly spread. Default: all.

    Attributes:
        inputs: the encoding.
        labels: (pictures,) names of the classes.
        is_test: (pictures,) bool.
    """

    def __init__(self, source: Path, folder: Path, limit: int | None = None) -> None:
        rows, inputs = load(str(source)), Encodings.read(folder).inputs
        is_test = np.asarray(rows["split"]) == "test"
        parts = [np.flatnonzero(is_test), np.flatnonzero(~is_test)]
        if limit:
            parts = [part[:: -(-len(part) // limit)] for part in parts]
        self.inputs, self._examples = inputs, Examples(rows, inputs)
        self._rows = np.concatenate(parts)
        self.labels, self.is_test = np.asarray(rows["label"])[self._rows], is_test[self._rows]

    def pixels(self, which: Sequence[int]) -> Tensor:
        """Returns pictures, (B, 3, H, W) float32, standardised.

        Args:
            which: B numbers, that count as `labels` does.
        """
        samples = self._examples.__getitems__(self._rows[list(which)].tolist())
        pixels = torch.from_numpy(np.stack([sample["inputs"] for sample in samples]))
        return pixels.unflatten(1, self.inputs.size).permute(0, 3, 1, 2).contiguous()

    def batches(self) -> Iterator[Tensor]:
        """Returns the pixels of all pictures in order, some at a time: all of 224 px are 7 GB."""
        for begin in range(0, len(self.labels), _AT_A_TIME):
            yield self.pixels(range(begin, min(begin + _AT_A_TIME, len(self.labels))))


def probes(folder: Path, seed: int, pictures: Pictures) -> list[dict[str, float]]:
    """Returns accuracies on the test pictures, of no training and then of each checkpoint.

    Args:
        folder: of a run that is done.
        seed: of the run.
        pictures: to read the classes of.

    Returns:
        Of each model "step", "linear" and "knn".
    """
    models = {0: untrained(folder, seed)}
    for path in checkpoints.complete_ones(folder):
        models[int(path.name.split("-")[1])] = load_model(path, MAEForPretraining)
    read = features(list(models.values()), pictures)
    return [
        {"step": step, **accuracies(x, pictures.labels, pictures.is_test)}
        for step, x in zip(models, read, strict=True)
    ]


def shares_by_rank(model: MAEForPretraining, pixels: Tensor, points: int = 20) -> list[float]:
    """Returns what share of the masked patches rank alone would mask, evenly over training.

    With the policy's defaults: it is the mask ratio where masks are random, and 1 without hints.

    Args:
        model: a trained one.
        pixels: (B, 3, H, W), standardised.
        points: of progress, 0 and 1 among them.
    """
    policy, generator = SelfMAEMasking(), torch.Generator().manual_seed(0)
    number = count_masked(model.config.num_patches, model.config.mask_ratio)
    with torch.no_grad():
        ranked = sma_fast.select_tokens(policy.scores(model, pixels), num_masked=number).mask
        masks = (policy(model, pixels, i / (points - 1), generator).mask for i in range(points))
        return [float((mask & ranked).sum() / ranked.sum()) for mask in masks]


def untrained(folder: Path, seed: int) -> MAEForPretraining:
    """Returns the model that a run began with.

    Args:
        folder: of the run.
        seed: of the run, with which training seeds its weights, too.
    """
    config = load_model(folder, MAEForPretraining).config
    torch.manual_seed(seed)
    return MAEForPretraining(config)


def features(models: Sequence[MAEForPretraining], pictures: Pictures) -> list[np.ndarray]:
    """Returns the mean of the patch embeddings, (pictures, C) of each model, in one reading.

    On the GPU where there is one.

    Args:
        models: of one size of pictures.
        pictures: encoded for them.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [model.to(device).eval() for model in models]
    found: list[list[Tensor]] = [[] for _ in models]
    with torch.no_grad():
        for pixels in pictures.batches():
            pixels = pixels.to(device)
            for model, parts in zip(models, found, strict=True):
                parts.append(model.embeddings(pixels).mean(dim=1).cpu())
    return [torch.cat(parts).numpy() for parts in found]


def accuracies(x: np.ndarray, labels: np.ndarray, is_test: np.ndarray) -> dict[str, float]:
    """Returns the share of the test pictures whose class is read rightly, "linear" and "knn".

    Args:
        x: (pictures, C).
        labels: (pictures,).
        is_test: (pictures,) bool; the others are learned from.
    """
    readers = {
        "linear": make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=300)),
        "knn": KNeighborsClassifier(NEIGHBOURS, metric="cosine", weights="distance"),
    }
    found = {}
    for name, reader in readers.items():
        reader.fit(x[~is_test], labels[~is_test])
        found[name] = float(reader.score(x[is_test], labels[is_test]))
    return found
