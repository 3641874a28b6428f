"""Each row's own random numbers: uniform, independent, and the same however a batch is cut."""

import pytest
import torch

import sma_fast
from sma_fast import _draws

ROWS = 512


def drawn(seeds: torch.Tensor, width: int = 64, number: int = 1) -> list[torch.Tensor]:
    with _draws.by_row(seeds):
        return [_draws.rand((len(seeds), width), None, None) for _ in range(number)]


def test_rows_draw_alike_in_any_batch() -> None:
    seeds = torch.arange(ROWS) + 2**62
    whole = drawn(seeds, number=3)
    parts = [drawn(part, number=3) for part in seeds.split([1, 200, ROWS - 201])]
    for i, numbers in enumerate(whole):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), numbers, rtol=0, atol=0)
    narrow = drawn(seeds, width=5)[0]
    torch.testing.assert_close(narrow, whole[0][:, :5], rtol=0, atol=0)


def test_uniform_and_independent() -> None:
    """Neighbours by row, column and draw: means, fractions below, and correlations."""
    first, second = drawn(torch.arange(ROWS), number=2)
    for numbers in (first, second):
        assert numbers.dtype == torch.float32
        assert 0 <= numbers.min() and numbers.max() < 1
        below = [(numbers < x / 16).double().mean() - x / 16 for x in range(1, 16)]
        assert max(map(abs, below)) < 4 * 0.5 / numbers.numel() ** 0.5
    assert len(torch.cat([first, second]).unique()) > 0.99 * 2 * first.numel()
    pairs = {
        "draws": (first, second),
        "rows": (first[1:], first[:-1]),
        "columns": (first[:, 1:], first[:, :-1]),
    }
    for name, pair in pairs.items():
        both = torch.stack([x.flatten() for x in pair])
        assert abs(torch.corrcoef(both)[0, 1]) < 4 / both.shape[1] ** 0.5, name


def test_integers() -> None:
    with _draws.by_row(torch.arange(ROWS)):
        numbers = _draws.randint(6, (ROWS, 64), None, torch.device("cpu"))
    counts = numbers.flatten().bincount()
    assert len(counts) == 6
    expected = numbers.numel() / 6
    assert (counts - expected).abs().max() < 4 * expected**0.5


def test_a_generator_goes_first() -> None:
    def numbers() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        cpu = torch.device("cpu")
        return [
            _draws.rand((3, 4), generator, cpu),
            _draws.randint(9, (3, 4), generator, cpu),
        ]

    plain = numbers()
    with _draws.by_row(torch.arange(3)):
        for a, b in zip(plain, numbers(), strict=True):
            assert torch.equal(a, b)


def test_afterwards_torch_draws_again() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2, 3)
    torch.manual_seed(1)
    with pytest.raises(KeyError), _draws.by_row(torch.arange(2)):
        with _draws.by_row(torch.arange(5)):
            _draws.rand((5, 3), None, None)
        _draws.rand((2, 3), None, None)
        raise KeyError
    assert torch.equal(_draws.rand((2, 3), None, None), expected)


def test_another_batch_is_refused() -> None:
    with _draws.by_row(torch.arange(2)), pytest.raises(ValueError, match=r"seeds: got 2, allowed"):
        sma_fast.random_masking(torch.zeros(3, 4, 1), 0.5)


@pytest.mark.parametrize("share", [{}, {"random_fraction": 0.5}, {"pool_ratio": 0.7}])
def test_self_guided_masking_of_a_batch_in_parts(share: dict[str, float]) -> None:
    torch.manual_seed(0)
    query, key, tokens = torch.randn(1, 4, 9, 8), torch.randn(7, 4, 30, 8), torch.randn(7, 30, 5)
    seeds = torch.arange(7)

    def masked(rows: slice) -> sma_fast.SelfGuidedMasking:
        with _draws.by_row(seeds[rows]):
            return sma_fast.self_guided_masking(
                *(query, key[rows], tokens[rows]),
                **{"mask_ratio": 0.4, "num_queries": 3, "head_reduce": "random", **share},
            )

    whole, parts = masked(slice(7)), [masked(slice(0, 3)), masked(slice(3, 7))]
    for name in ("query_index", "head_index", "scores"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(x, name) for x in parts]))
    ids = torch.cat([part.selection.ids_masked for part in parts])
    assert torch.equal(whole.selection.ids_masked, ids)
    assert len({tuple(row) for row in whole.query_index.tolist()}) > 1
