"""The equivalent PyTorch in the docstrings computes what the functions return."""

import re
import textwrap

import pytest
import torch

import sma_fast
from sma_fast import compat

B, H, M, N, D, C, R, K = 3, 2, 7, 12, 8, 5, 4, 5


def equivalent(function, **arguments):
    """Returns the variables of the docstring's code, run on `arguments` under a fixed seed."""
    found = re.search(r"Equivalent PyTorch[^:]*::\n\n((?:        .*\n|\n)+)", function.__doc__)
    assert found, f"{function.__name__}: no equivalent PyTorch"
    variables = {"torch": torch} | vars(sma_fast) | arguments
    torch.manual_seed(1)
    exec(textwrap.dedent(found[1]), variables)
    return variables


def called(function, *arguments, **options):
    torch.manual_seed(1)
    return function(*arguments, **options)


def rng():
    return torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=rng())


def query_index():
    return torch.rand(B, M, generator=rng()).argsort(1)[:, :R]  # another for each sample


@pytest.mark.parametrize("query_batch", (1, B))
def test_attention_scores(query_batch):
    given = {"query": normal(query_batch, H, M, D), "key": normal(B, H, N, D)}
    given |= {"query_index": query_index(), "scale": 0.3}
    expected = equivalent(sma_fast.attention_scores, **given)["scores"]
    torch.testing.assert_close(sma_fast.attention_scores(**given), expected)


def test_aggregate_attention():
    given = {"attention": normal(B, H, M, N).softmax(3), "query_index": query_index()}
    expected = equivalent(sma_fast.aggregate_attention, **given)["scores"]
    torch.testing.assert_close(sma_fast.aggregate_attention(**given), expected)


def test_select_tokens():
    given = {"scores": normal(B, N), "num_masked": K}
    expected = equivalent(sma_fast.select_tokens, **given)
    actual = sma_fast.select_tokens(**given)
    for name in ("mask", "ids_visible", "ids_masked", "ids_restore"):
        assert torch.equal(getattr(actual, name), expected[name]), name


def test_gather_tokens():
    given = {"tokens": normal(B, N, C), "ids": torch.randint(N, (B, 4), generator=rng())}
    expected = equivalent(sma_fast.gather_tokens, **given)["gathered"]
    assert torch.equal(sma_fast.gather_tokens(**given), expected)


def test_restore_tokens():
    selection = sma_fast.select_tokens(normal(B, N), num_masked=K)
    given = {"visible": normal(B, N - K, C), "fill": normal(B, K, C) + 1}
    given |= {"ids_restore": selection.ids_restore}
    expected = equivalent(sma_fast.restore_tokens, **given)["tokens"]
    assert torch.equal(sma_fast.restore_tokens(**given), expected)


def test_draw_queries():
    # other draws of the same kind
    given = {"num_queries": R, "num_candidates": M}
    for drawn in (
        equivalent(sma_fast.draw_queries, **given)["queries"][None],
        called(sma_fast.draw_queries, batch=1, **given),
    ):
        assert drawn.shape == (1, R) and drawn.dtype == torch.int64
        assert (drawn.diff() > 0).all() and drawn.min() >= 0 and drawn.max() < M


def test_self_guided_masking():
    tokens = (normal(B, N, C), normal(B, N))
    given = {"query": normal(1, H, M, D), "key": normal(B, H, N, D)}
    options = {"mask_ratio": 0.4, "num_queries": R}
    expected = equivalent(sma_fast.self_guided_masking, tokens=tokens, **given, **options)
    actual = called(sma_fast.self_guided_masking, *given.values(), *tokens, **options)
    assert torch.equal(actual.query_index, expected["index"])
    torch.testing.assert_close(actual.scores, expected["scores"])
    assert all(map(torch.equal, actual.selection, expected["selection"]))
    assert all(map(torch.equal, actual.visible, expected["visible"]))


def test_random_masking():
    given = {"tokens": normal(B, N, C), "mask_ratio": 0.7}
    given["noise"] = torch.rand(B, N, generator=rng())
    expected = equivalent(sma_fast.random_masking, **given)
    visible, mask, _ = sma_fast.random_masking(**given)
    assert torch.equal(visible, expected["visible"]) and torch.equal(mask, expected["mask"])


def test_mae_random_masking():
    given = {"x": normal(B, N, C), "mask_ratio": 0.7}
    expected = equivalent(compat.mae_random_masking, **given)
    x_masked, mask, _ = called(compat.mae_random_masking, **given)
    assert torch.equal(x_masked, expected["x_masked"]) and torch.equal(mask, expected["mask"])


def test_hf_random_masking():
    given = {"sequence": normal(B, N, C), "noise": torch.rand(B, N), "mask_ratio": 0.7}
    expected = equivalent(compat.hf_random_masking, **given)["sequence_masked"]
    assert torch.equal(compat.hf_random_masking(**given)[0], expected)


@pytest.mark.parametrize("prefix", (0, 2))
def test_timm_patch_dropout_forward(prefix):
    given = {"x": normal(B, N, C), "prob": 0.6, "num_prefix_tokens": prefix}
    expected = equivalent(compat.timm_patch_dropout_forward, **given)
    actual = called(compat.timm_patch_dropout_forward, **given, ordered=True, training=True)
    assert torch.equal(actual[0], expected["kept"])
    assert torch.equal(actual[1], expected["keep_indices"])


@pytest.mark.parametrize("mask_class_token", (False, True))
def test_lightly_random_token_mask(mask_class_token):
    given = {"size": (B, N), "mask_ratio": 0.6, "mask_class_token": mask_class_token}
    expected = equivalent(compat.lightly_random_token_mask, **given)
    keep, mask = called(compat.lightly_random_token_mask, **given)
    assert torch.equal(keep, expected["idx_keep"]) and torch.equal(mask, expected["idx_mask"])
