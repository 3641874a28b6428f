"""bipartition on a GPU: what only its kernels do differently, by size and layout of the rows."""

from collections.abc import Callable

import emulation
import pytest
import torch
from torch import Tensor

from sma_fast import _dispatch, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.emulated, pytest.mark.on_gpu]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Callable:
    """Returns the CUDA kernel, where there is no GPU in the emulator; embeddings go first."""
    if DEVICE == "cuda":
        try:
            function = _dispatch.implementation("cuda", "bipartition", "cuda")
        except _dispatch.Unavailable as reason:
            pytest.skip(str(reason))
    else:
        if reason := emulation.why_missing("bipartition"):
            pytest.skip(reason)
        emulation.use(monkeypatch)
        function = emulation.implementation("bipartition")
    return lambda x, padding=None, method="ncut": function(x, padding, method, 64, 1e-4)


def clusters(batch: int, tokens: int, width: int) -> Tensor:
    """Returns rows around two random directions."""
    draws = torch.Generator().manual_seed(tokens * width)
    centre = torch.randn(batch, 2, width, generator=draws)
    second = torch.rand(batch, tokens, 1, generator=draws) < 0.4
    x = torch.where(second, centre[:, 1:], centre[:, :1])
    return (x + 0.5 * torch.randn(batch, tokens, width, generator=draws)).to(DEVICE)


def assert_agrees(found: tuple, x: Tensor, padding: Tensor | None = None, method: str = "ncut"):
    """Asserts convergence, and what the reference says."""
    vector, labels, ids, eigenvalue, converged = found
    right = reference.bipartition(x, padding, method, 64, 1e-4)
    assert converged.all()
    torch.testing.assert_close(vector, right[0], rtol=0, atol=1e-4)
    assert (labels == right[1]).double().mean() >= 0.999
    assert torch.equal(ids, reference._compact(labels, labels.cumsum(1) - 1, x.shape[1]))
    torch.testing.assert_close(eigenvalue, right[3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["ncut", "pca"])
@pytest.mark.parametrize(
    ("tokens", "width"),
    [
        *((2, 3), (5, 31), (33, 32), (64, 33)),  # one slab of features, and a bit of the next
        *((196, 200), (257, 64), (300, 129)),  # more tokens than threads
        *((1100, 24), (1500, 24)),  # one slab in shared memory, and none
    ],
)
def test_sizes(on_cuda: Callable, tokens: int, width: int, method: str):
    x = clusters(2, tokens, width)
    assert_agrees(on_cuda(x, None, method), x, None, method)


@pytest.mark.parametrize(
    ("tokens", "width", "dtype"),
    [
        *((196, 250, "float32"), (64, 768, "float32"), (200, 500, "bfloat16")),  # one block
        *((196, 400, "float32"), (256, 768, "bfloat16"), (196, 1024, "float16")),  # two
        *((196, 768, "float32"), (197, 1024, "float32"), (256, 1000, "float16")),  # four
        *((256, 1024, "float32"), (150, 1500, "float32"), (513, 700, "bfloat16")),  # eight
        *((600, 520, "float32"), (256, 1700, "float32"), (513, 1600, "float16")),  # slabs in turn
    ],
)
def test_clusters(
    on_cuda: Callable, monkeypatch: pytest.MonkeyPatch, tokens: int, width: int, dtype: str
):
    """As many blocks as hold a sample in Hopper's shared memory, where eight do; else slabs of it.

    Also where the last blocks have fewer slabs than others, or none; and with rows of padding.
    """
    x = clusters(2, tokens, width).to(getattr(torch, dtype))
    assert_agrees(on_cuda(x), x)
    padding = torch.zeros(2, tokens, dtype=torch.bool, device=DEVICE)
    padding[0, 1::3] = padding[1] = True
    padding[1, 9:12] = False
    monkeypatch.setattr(reference, "check_finite", lambda *_: None)
    vector, _, _, _, converged = on_cuda(x.masked_fill(padding[:, :, None], float("nan")), padding)
    assert converged[0] and not vector[padding].any()
    right = reference.bipartition(x, padding, "ncut", 64, 1e-4)[0]
    torch.testing.assert_close(vector[0], right[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [70, 1500])
@pytest.mark.parametrize("layout", ["misaligned", "transposed", "every second", "one row", "ends"])
def test_layouts(on_cuda: Callable, layout: str, tokens: int, dtype: torch.dtype):
    batch, width = (1, 24) if tokens > 1000 else (3, 72)
    x = clusters(batch, tokens, width).to(dtype)
    nan = x.new_full((batch, tokens, 2 * width + 8), float("nan"))
    if layout == "transposed":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "one row":
        x = x[:1].expand(batch, -1, -1)
    else:
        # in 16 bytes but for the last ones; or nowhere at a multiple of them
        first, step, width = {
            "misaligned": (3, 1, width),
            "every second": (0, 2, width),
            "ends": (0, 1, width - 3),
        }[layout]
        view = nan[:, :, first : first + step * width : step]
        view.copy_(x[:, :, :width])
        x = view
    assert_agrees(on_cuda(x), x)


@pytest.mark.parametrize("tokens", [100, 1500])
def test_padding_is_not_read(on_cuda: Callable, monkeypatch: pytest.MonkeyPatch, tokens: int):
    x = clusters(3, tokens, 24)
    padding = (torch.rand(3, tokens, generator=torch.Generator().manual_seed(0)) < 0.4).to(DEVICE)
    padding[1, : tokens // 2] = True
    right = on_cuda(x, padding)
    assert_agrees(right, x, padding)
    assert not right[0][padding].any() and not right[1][padding].any()
    monkeypatch.setattr(reference, "check_finite", lambda *_: None)
    found = on_cuda(x.masked_fill(padding[:, :, None], float("nan")), padding)
    assert all(map(torch.equal, found, right))


@pytest.mark.parametrize(("tokens", "width"), [(90, 80), (90, 2000), (600, 520)])
def test_the_same_bits_whatever_the_batch(on_cuda: Callable, tokens: int, width: int):
    x = clusters(3, tokens, width)
    whole, again, alone = on_cuda(x), on_cuda(x), on_cuda(x[1:2])
    assert all(map(torch.equal, whole, again))
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))


def test_labels_are_above_rounding(on_cuda: Callable):
    """Zero rows between two groups that mirror each other: their entries are 0 but for rounding."""
    half = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) * 0.1
    half[:, 0] += 1
    x = torch.zeros(1, 100, 24)
    x[0, :80:2], x[0, 1:80:2] = half, -half
    x = x.to(DEVICE)
    vector, labels, ids, _, converged = on_cuda(x)
    assert converged.all() and vector[0, 80:].abs().max() < 1e-5
    assert torch.equal(labels, vector > 1e-4 * vector.abs().amax(1, keepdim=True))
    assert not labels[0, 80:].any() and int((ids >= 0).sum()) == 40


@pytest.mark.parametrize("width", [40, 6000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(on_cuda: Callable, monkeypatch: pytest.MonkeyPatch, bad: float, width: int):
    """A GPU cannot raise: the sample has no cut, and no other sample is touched."""
    x = clusters(3, 50, width)
    right = on_cuda(x)
    monkeypatch.setattr(reference, "check_finite", lambda *_: None)
    x[1, 17, 39] = bad
    vector, labels, ids, eigenvalue, converged = found = on_cuda(x)
    assert not vector[1].any() and not labels[1].any() and (ids[1] == -1).all()
    assert eigenvalue[1] == 1 and not converged[1]
    assert all(torch.equal(a[::2], b[::2]) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("width", [30, 6000])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e15, 1e30])
def test_squares_leave_the_range_of_float(on_cuda: Callable, size: float, width: int):
    x = clusters(2, 40, width) * size
    assert_agrees(on_cuda(x), x)


def test_too_many_tokens(on_cuda: Callable):
    with pytest.raises(RuntimeError, match=r"embeddings \(1, 9000, 1\).*too many for this GPU"):
        on_cuda(torch.ones(1, 9000, 1, device=DEVICE))
    pytest.importorskip("triton", reason="triton is not installed")
    from sma_fast.kernels.bipartition import launch

    with pytest.raises(ValueError, match=r"embeddings: got .*N at most 2048 on backend triton"):
        launch(torch.ones(1, 4097, 1, device=DEVICE), None, "ncut", 64, 1e-4)
