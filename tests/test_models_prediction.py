"""SMA's prediction model: labels of each kind, and the pretrained encoder."""

import math

import pytest
import torch
import torch.nn.functional as F
from model_inputs import ENCODERS, build, config, lengths, sample

from sma_fast.models import SMAForPrediction

PROBLEMS = {
    "single_label_classification": torch.tensor([0, 2, 1, 1]),
    "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 0]]),
    "regression": torch.tensor([[0.5, -1, 2], [0, 0.1, 1], [1, 3, 1], [0, 1, -4]]),
}


def build_prediction(problem: str, encoder: str = "cross", **changes) -> SMAForPrediction:
    torch.manual_seed(0)
    changes |= ENCODERS[encoder]
    return SMAForPrediction(config(problem_type=problem, num_labels=3, **changes))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_prediction(problem: str, encoder: str) -> None:
    model, labels = build_prediction(problem, encoder), PROBLEMS[problem]
    inputs, valid = sample("discrete"), lengths(20, 13, 7, 2)
    out = model(inputs, valid, labels)
    assert out.logits.shape == (4, 3)
    expected = {
        "single_label_classification": F.cross_entropy,
        "multi_label_classification": F.binary_cross_entropy_with_logits,
        "regression": F.mse_loss,
    }[problem](out.logits, labels)
    torch.testing.assert_close(out.loss, expected)
    assert model(inputs, valid).loss is None
    for row, length in enumerate((20, 13, 7, 2)):  # padding changes nothing
        alone = model(inputs[row : row + 1, :length]).logits
        torch.testing.assert_close(alone, out.logits[row : row + 1], rtol=1e-4, atol=1e-5)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_unknown_labels_are_left_out(problem: str) -> None:
    model, labels = build_prediction(problem), PROBLEMS[problem].clone()
    labels[0], labels[2, 1] = math.nan, math.nan
    out = model(sample("discrete"), labels=labels)
    known = ~labels.isnan()
    one = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    torch.testing.assert_close(out.loss, one(out.logits[known], labels[known]))
    assert model(sample("discrete"), labels=torch.full((4, 3), math.nan)).loss == 0


def test_one_regression_label_may_be_flat() -> None:
    torch.manual_seed(0)
    model = SMAForPrediction(config(problem_type="regression", num_labels=1))
    labels = torch.randn(4)
    flat, column = (model(sample("discrete"), labels=y).loss for y in (labels, labels[:, None]))
    assert flat == column


@pytest.mark.parametrize("encoder", ENCODERS)
def test_prediction_from_pretraining(encoder: str) -> None:
    pretrained = build(**ENCODERS[encoder])
    model = SMAForPrediction.from_pretraining(pretrained, num_labels=5, hidden_dropout_prob=0.1)
    assert model.config.num_labels == 5 and pretrained.config.num_labels == 2
    inputs = sample("discrete")
    model.eval()
    assert torch.equal(
        model(inputs).last_hidden_state, pretrained.eval().encoder(inputs).last_hidden_state
    )
    with pytest.raises(TypeError, match="labels_number"):
        SMAForPrediction.from_pretraining(pretrained, labels_number=5)
    with pytest.raises(ValueError, match="do not fit the pretrained encoder"):
        SMAForPrediction.from_pretraining(pretrained, max_position_embeddings=99)


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("single_label_classification", torch.zeros(3)),
        ("single_label_classification", torch.zeros(4, 3)),
        ("multi_label_classification", torch.zeros(4)),
        ("regression", torch.zeros(4, 2)),
    ],
)
def test_prediction_refuses_labels(problem: str, labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"labels: got shape"):
        build_prediction(problem)(sample("discrete"), labels=labels)
