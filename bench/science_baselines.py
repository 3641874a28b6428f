"""Plain baselines on the same rows, by scikit-learn: no pretraining, no attention, seconds each."""

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sma_fast.training import run
from sma_fast.training.data import ClassLabels, Targets

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)


def baseline(task, data, seed: int) -> dict[str, dict[str, float]]:
    """Returns the test scores of each plain model of a task.

    Args:
        task: bench.science.Task.
        data: DataOptions.
        seed: of models that draw.

    Returns:
        Scores by model; strengths are chosen on the validation part.
    """
    parts = run.open_parts(data, (task.label,))
    parts["train"] = run.drawn_rows(parts["train"], task.limit, data.split_seed)
    column = data.inputs[0]
    inputs = {part: rows.with_format(None)[column] for part, rows in parts.items()}
    known = (ClassLabels if task.kind == "classification" else Targets).fit(
        parts["train"], task.label
    )
    labels = {
        part: np.asarray(known.encode({task.label: rows[task.label]})["labels"])
        for part, rows in parts.items()
    }
    if task.baseline == "table":
        return _of_table({part: np.asarray(list(x)) for part, x in inputs.items()}, labels, seed)
    inputs = {part: list(x) for part, x in inputs.items()}
    if task.baseline == "ngrams":
        features = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True)
        train = features.fit_transform(inputs["train"])
        inputs = {part: features.transform(x) for part, x in inputs.items()} | {"train": train}
        name = "character n-grams"
    else:
        inputs, name = _one_hot(inputs), "one-hot ridge"
    if task.kind == "classification":
        return {name: _logistic(inputs, labels)}
    return {name: _ridge(inputs, labels, known)}


def _of_table(inputs: dict, labels: dict, seed: int) -> dict:
    trees = HistGradientBoostingClassifier(random_state=seed).fit(inputs["train"], labels["train"])
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    linear.fit(inputs["train"], labels["train"])
    return {
        "boosted trees": _classes(trees, inputs["test"], labels["test"]),
        "logistic regression": _classes(linear, inputs["test"], labels["test"]),
    }


def _classes(model, inputs, labels) -> dict[str, float]:
    chance = model.predict_proba(inputs)[:, 1]
    return {
        "accuracy": accuracy_score(labels, chance > 0.5),
        "auc": roc_auc_score(labels, chance),
    }


def _logistic(inputs: dict, labels: dict) -> dict[str, float]:
    models = [
        LogisticRegression(C=c, max_iter=2000).fit(inputs["train"], labels["train"])
        for c in STRENGTHS
    ]
    best = max(models, key=lambda m: _classes(m, inputs["valid"], labels["valid"])["auc"])
    return _classes(best, inputs["test"], labels["test"])


def _ridge(inputs: dict, labels: dict, targets: Targets) -> dict[str, float]:
    def error(model, part: str) -> float:
        return float(np.sqrt(np.mean((model.predict(inputs[part]) - labels[part]) ** 2)))

    models = [Ridge(alpha=a).fit(inputs["train"], labels["train"]) for a in STRENGTHS]
    best = min(models, key=lambda model: error(model, "valid"))
    from scipy.stats import spearmanr

    rank = spearmanr(best.predict(inputs["test"]), labels["test"])[0]
    return {"rmse": error(best, "test") * float(targets.std[0]), "spearman": float(rank)}


def _one_hot(inputs: dict) -> dict:
    from scipy.sparse import csr_matrix

    longest = max(len(x) for x in inputs["train"])
    columns = {
        letter: i for i, letter in enumerate(sorted({c for x in inputs["train"] for c in x}))
    }
    encoded = {}
    for part, texts in inputs.items():
        rows, places = [], []
        for row, text in enumerate(texts):
            for place, letter in enumerate(text[:longest]):
                if letter in columns:
                    rows.append(row)
                    places.append(place * len(columns) + columns[letter])
        shape = (len(texts), longest * len(columns))
        encoded[part] = csr_matrix((np.ones(len(rows), np.float32), (rows, places)), shape)
    return encoded
