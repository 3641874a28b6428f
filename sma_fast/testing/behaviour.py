"""What a function does besides computing: reproducible bits, gradients, one compiled graph."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import sma_fast
from sma_fast import _dispatch
from sma_fast.testing.comparisons import assert_close, assert_same
from sma_fast.testing.guards import guarded
from sma_fast.testing.inputs import rng


def assert_reproducible(function: Callable, *tensors: Tensor) -> None:
    """Asserts the same bits from every run and sample by sample; for 1, 2 and 4 CPU threads."""
    expected, threads = function(*tensors), torch.get_num_threads()
    on_cpu = _dispatch.forced() in (None, "cpu", "reference")
    try:
        for number in (1, 2, 4) if on_cpu else (threads,):
            torch.set_num_threads(number)
            assert_same(function(*tensors), expected)
            samples = zip(*(x.split(1) for x in tensors), strict=True)
            parts = [pytree.tree_leaves(function(*sample)) for sample in samples]
            assert_same(
                [torch.cat(outputs) for outputs in zip(*parts, strict=True)],
                pytree.tree_leaves(expected),
            )
    finally:
        torch.set_num_threads(threads)


def gradients(function: Callable, leaves: Sequence[Tensor], layout: str = "packed") -> list[Tensor]:
    """Returns the gradients of `leaves`, and those of the outputs' weights through them.

    The second ones are zero unless the backward pass is differentiable too. `function` takes the
    leaves and returns a list of outputs; the weights are quarters, the same in every dtype.
    """
    quarters = rng(8)

    def weights(like: Tensor) -> Tensor:
        w = torch.randint(-8, 9, like.shape, generator=quarters) / 4
        return w.to(like.dtype).to(like.device)

    leaves = [x.detach().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    laid_out, assert_unchanged = guarded({"weights": [weights(x) for x in outputs]}, layout)
    first = [w.requires_grad_() for w in laid_out["weights"]]
    to_leaves = torch.autograd.grad(outputs, leaves, first, create_graph=True)
    to_weights = torch.autograd.grad(to_leaves, first, [weights(x) for x in to_leaves])
    assert_unchanged()
    return [*to_leaves, *to_weights]


def assert_gradients(
    function: Callable,
    leaves: Sequence[Tensor],
    layout: str = "packed",
    oracle: Callable | None = None,  # the same function, in terms of another op
) -> None:
    """Asserts `gradients` of the backend in force as near to float64 as the oracle's."""
    actual = gradients(function, leaves, layout)
    with sma_fast.use_backend("reference"):
        exact = gradients(oracle or function, [x.double() for x in leaves], layout)
        plain = gradients(oracle or function, leaves, layout)
    for x, y, z in zip(actual, exact, plain, strict=True):
        assert_close(x.detach(), y.detach(), z.detach())


def assert_compiles_once(
    function: Callable,
    arguments: Sequence[tuple],  # more than one set, of different sizes
    compiler: str = "aot_eager",
) -> None:
    """Asserts that one graph without breaks answers all sizes, with eager's bits.

    Of the draws too; and of the gradients of arguments that require them.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = None
    for args in arguments:
        assert_same(_run_and_differentiate(compiled, args), _run_and_differentiate(function, args))
        graphs = counter.frame_count if graphs is None else graphs
    assert counter.frame_count == graphs > 0, "another size compiled again"


def _run_and_differentiate(function: Callable, args: tuple) -> list:
    torch.manual_seed(11)
    outputs = pytree.tree_leaves(function(*args))
    leaves = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor) and x.requires_grad]
    if leaves:
        loss = sum((x * x).sum() for x in outputs if isinstance(x, Tensor) and x.requires_grad)
        outputs += torch.autograd.grad(loss, leaves)
    return outputs
