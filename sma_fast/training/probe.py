"""Linear probe: what a logistic regression can read from frozen features."""

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # C of scikit-learn: the inverse of the penalty


@dataclass(frozen=True)
class Probe:
    """Accuracies in [0, 1] of the regression whose strength did best in validation.

    Attributes:
        test: accuracy on the test samples.
        validation: accuracy on the validation samples.
        strength: the C that was chosen.
    """

    test: float
    validation: float
    strength: float


def linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    train: np.ndarray,
    validation: np.ndarray,
    test: np.ndarray,
) -> Probe:
    """Returns accuracies of a logistic regression on standardised features.

    Scale and weights come from the train samples, the strength C from the validation samples (the
    smallest of equals); the test samples are looked at once, by the regression so chosen.

    Args:
        features: (samples, width).
        labels: (samples,).
        train, validation, test: indices of samples.

    Returns:
        Probe.
    """
    features = features.astype(np.float64)
    best = None
    # torch's waiting threads and those of BLAS would take the cores from each other
    with threadpool_limits(1):
        for strength in STRENGTHS:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
            model.fit(features[train], labels[train])
            accuracy = model.score(features[validation], labels[validation])
            if best is None or accuracy > best[0]:
                best = accuracy, strength, model
        accuracy, strength, model = best
        return Probe(model.score(features[test], labels[test]), accuracy, strength)
