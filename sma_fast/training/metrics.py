"""Scores of predictions, by scikit-learn and scipy."""

import numpy as np
from scipy.special import expit, softmax
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from sma_fast.training.data import Targets


def scores(task: str, predictions: np.ndarray, labels: np.ndarray, encodings) -> dict[str, float]:
    """Returns the scores of a task; NaN where one is not defined.

    Args:
        task: "classification": accuracy, and auc of two classes. "multilabel": auc, the mean over
            labels that have both classes. "regression": rmse, mae in the labels' units, and
            spearman, means over the labels.
        predictions: (samples, L), what the model returns.
        labels: (samples,) or (samples, L), as the model was given; NaN is left out.
        encodings: whose `labels` say what the units are.
    """
    if task == "classification":
        chance = softmax(predictions, axis=1)
        found = {"accuracy": float((predictions.argmax(1) == labels).mean())}
        if predictions.shape[1] == 2:
            found["auc"] = _auc(labels, chance[:, 1])
        return found
    labels = labels.reshape(len(predictions), -1)
    if task == "multilabel":
        chance = expit(predictions)
        each = [_auc(labels[:, i], chance[:, i]) for i in range(labels.shape[1])]
        return {"auc": float(np.nanmean(each))}
    targets: Targets = encodings.labels
    predictions, labels = targets.to_units(predictions), targets.to_units(labels)
    found = {"rmse": [], "mae": [], "spearman": []}
    for i in range(labels.shape[1]):
        known = ~np.isnan(labels[:, i])
        error = predictions[known, i] - labels[known, i]
        found["rmse"].append(np.sqrt(np.mean(error**2)))
        found["mae"].append(np.abs(error).mean())
        found["spearman"].append(spearmanr(predictions[known, i], labels[known, i])[0])
    return {name: float(np.mean(each)) for name, each in found.items()}


def _auc(labels: np.ndarray, chance: np.ndarray) -> float:
    known = ~np.isnan(labels.astype(np.float64))
    labels, chance = labels[known], chance[known]
    return float(roc_auc_score(labels, chance)) if len(np.unique(labels)) == 2 else float("nan")
