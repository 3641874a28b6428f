"""Every Triton kernel compiled for GPUs that are not here, for bench.kernels_report.

Each op's launch runs on CPU tensors of the benchmarks' shapes, what it would have started is
recorded, and that is compiled for each architecture.
"""

import functools
import importlib
import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench.cubins import Row, Usage, usages

ARCHITECTURES = (80, 90, 100)
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Launch(NamedTuple):
    """One kernel with the types, constants and options that a launch gave it."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments that 16 divides
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        names = {p.name for p in self.kernel.params if p.is_constexpr}
        chosen = [f"{name}={value}" for name, value in self.constants if name in names]
        types = dict(self.signature)
        first = next((t[1:] for t in types.values() if t.startswith("*")), "")
        return f"{self.kernel.__name__} {first} {' '.join(chosen)}"


def recorded(call: Callable[[], object]) -> list[Launch]:
    """Returns what `call` would have launched, without launching it."""
    found: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        # refuses an argument that is none of the kernel's: the interpreter leaves it out silently
        bound = inspect.signature(self.fn).bind(*args, **kwargs).arguments
        found.append(_launch(self, bound, options))

    before, JITFunction.run = JITFunction.run, record
    try:
        call()
    finally:
        JITFunction.run = before
    return found


def _launch(kernel: JITFunction, bound: dict[str, Any], options: dict[str, Any]) -> Launch:
    signature, constants, aligned = [], [], []
    for number, param in enumerate(kernel.params):
        value = bound[param.name]
        if param.is_constexpr or value is None:
            kind = "constexpr"
        elif isinstance(value, Tensor):
            kind = f"*{_TYPES[value.dtype]}"
            aligned.append(number)
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if not param.do_not_specialize and value == 1:
                kind = "constexpr"
            elif not param.do_not_specialize and value % 16 == 0:
                aligned.append(number)
        if kind == "constexpr":
            constants.append((param.name, value))
        signature.append((param.name, kind))
    return Launch(
        kernel, tuple(signature), tuple(constants), tuple(aligned), tuple(options.items())
    )


@functools.cache
def usage(launch: Launch, capability: int) -> Usage:
    """Returns what a kernel takes when compiled for an architecture, such as 90."""
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(number,): [["tt.divisibility", 16]] for number in launch.aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (found,) = usages(Path(file.name)).values()
    return found._replace(shared_bytes=compiled.metadata.shared)


def launches(capability: int) -> list[Launch]:
    """Returns every kernel, in the variants that the ops start on shapes as the benchmarks have.

    With the settings of an architecture, such as 90.
    """
    from sma_fast.kernels import launching

    found: dict[Launch, None] = {}
    with launching.on_architecture(f"sm_{capability}"):
        for op, cases in _cases().items():
            launch = importlib.import_module(f"sma_fast.kernels.{op}").launch
            for arguments in cases:
                found |= dict.fromkeys(recorded(functools.partial(launch, *arguments)))
    return list(found)


def _cases() -> dict[str, list[tuple]]:
    # protein, molecule and picture shapes, and rows too long to be held at once
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def ids(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64)

    half = torch.bfloat16
    padding, labels = empty(2, 1024, dtype=torch.bool), empty(2, 196, dtype=torch.bool)
    index, heads = ids(2, 38), ids(2, 38)
    query, key = empty(1, 8, 256, 32, dtype=half), empty(2, 8, 1024, 32, dtype=half)
    image, pixels = empty(1, 8, 512, 64, dtype=half), empty(1, 8, 9216, 64, dtype=half)
    full = (empty(1, 4, 128, 128, dtype=torch.float16), empty(1, 4, 4096, 128, dtype=torch.float16))
    self_query = empty(2, 12, 512, 64, dtype=half)
    indices = (ids(2, 17), ids(2, 17), empty(2, 3000, dtype=torch.bool))
    heads_of = [  # that are kept whole or not, in loads of 16 bytes or one by one
        *((torch.float32, width) for width in (32, 64, 72, 129)),
        *((half, width) for width in (20, 40, 64, 96, 600)),
        *((torch.float16, width) for width in (20, 64, 129)),
    ]
    strided = empty(2, 4, 300, 17, dtype=half)[..., :16]  # held at once, each number a load
    every_option = [
        (empty(2, 4, 64, width, dtype=dtype), empty(2, 4, 3000, width, dtype=dtype), *indices)
        for dtype, width in heads_of
    ]
    every_option.append((strided[:, :, :64], strided, *indices[:2], indices[2][:, :300]))
    for width in (16, 64):  # features that lie apart
        keys = empty(2, 4, width, 3000, dtype=half).mT
        every_option.append((empty(2, 4, 64, width, dtype=half), keys, *indices))
        every_option.append((keys[:, :, :64], keys[:, :, :300], *indices[:2], None))
    map_ = empty(2, 8, 256, 1024, dtype=half)
    no_share, none = (0.0, None), None
    scores, long, longer = empty(2, 1024), empty(2, 16384), empty(2, 65536)
    by_ratio, by_row = (0.15, none, none, none), (none, none, ids(2), none)
    return {
        "attention_scores": [
            (query, key, index, none, none, 0.125, "mean"),
            (query.float(), key.float(), index, none, padding, 0.125, "mean"),
            (query.half(), key.half(), index, heads, padding, 0.125, "mean"),
            (self_query, self_query, index, heads, padding[:, :512], 0.125, "mean"),
            (empty(2, 8, 128, 32), empty(2, 8, 128, 32), index, none, none, 0.125, "mean"),
            (empty(2, 1, 70, 600), empty(2, 1, 70, 600), none, none, none, 0.125, "mean"),
            *((*given, 0.125, "mean") for given in every_option),
            (image, pixels, ids(1, 32), none, none, 0.125, "mean"),
            (image.float(), pixels.float(), ids(1, 32), none, none, 0.125, "mean"),
            (*full, none, none, none, 0.125, "none"),
        ],
        "aggregate_attention": [
            (map_, index, none, "mean", False),
            (map_, index, heads, "mean", True),
            (map_.half(), index, heads, "mean", True),
            (map_.half(), none, none, "none", False),
            (map_.mT, index, heads, "mean", True),
            (empty(2, 8, 9000, 64, dtype=half).mT, index, heads, "mean", True),
            (empty(2, 8, 64, 1000, dtype=half), index, heads, "mean", False),
            (empty(2, 8, 64, 2000), index, heads, "mean", True),
            (empty(2, 8, 64, 4000, dtype=half), none, none, "none", True),
            (empty(1, 1, 2, 16384), none, none, "none", True),
            (empty(2, 8, 64, 9000, dtype=half), index, heads, "mean", True),
        ],
        "select_tokens": [
            (scores, none, none, *by_ratio, *no_share),
            (scores, padding, scores, *by_ratio, 0.5, none),
            (empty(2, 4096), none, none, none, 512, none, none, *no_share),
            (scores.to(half), padding, none, *by_row, *no_share),
            (long.half(), long > 0, long, *by_row, 0.5, none),
            (longer.half(), longer > 0, none, *by_row, *no_share),
            (empty(2, 8192), none, empty(2, 8192), *by_ratio, 0.0, 0.5),
            (long, none, long, *by_ratio, 0.5, none),
            (long, none, none, *by_ratio, *no_share, empty(2, 16384, dtype=torch.uint8)),
            (longer, none, longer, *by_ratio, 0.5, none),
            (longer, longer > 0, none, *by_ratio, *no_share, empty(2, 65536, dtype=torch.uint8)),
        ],
        "draw_queries": [
            (empty(2, 256), 38, none, none),
            (scores, 38, ids(2), padding),
            (long, 38, none, none),
            (long, 38, ids(2), long > 0),
        ],
        "gather_tokens": [
            (empty(2, 1024, 512, dtype=half), ids(2, 870)),
            (empty(2, 1024, 512), ids(2, 870)),
            (empty(2, 1024, 5, dtype=half), ids(2, 870)),
        ],
        "gather_tokens_backward": [
            (empty(2, 870, 512, dtype=half), ids(2, 870), 1024),
            (empty(2, 870, 5), ids(2, 870), 1024),
            (empty(2, 870, 512, dtype=torch.float16), ids(2, 870), 1024),
            (empty(2, 870, 512, dtype=torch.float64), ids(2, 870), 1024),
        ],
        "restore_tokens": [(empty(2, 49, 768, dtype=half), ids(2, 196), empty(768, dtype=half))],
        "restore_tokens_backward": [
            (empty(2, 196, 768, dtype=half), ids(2, 196), 49, none),
            (empty(2, 1024, 512), ids(2, 1024), 870, none),
            (empty(2, 1024, 512, dtype=torch.float16), ids(2, 1024), 870, none),
            (empty(2, 1024, 512, dtype=torch.float64), ids(2, 1024), 870, none),
        ],
        "self_guided_masking": [
            (
                *(self_query, self_query, [empty(2, 512, 768, dtype=half)], index, none, none),
                *(none, 0.3, 0.125, "mean", True, 0.0, none),
            )
        ],
        "random_masking": [
            (empty(2, 196, 768, dtype=half), empty(2, 196), 0.75),
            (empty(1, 16384, 8), empty(1, 16384), 0.75),
        ],
        "bipartition": [
            (empty(2, 196, 768), none, "ncut", 64, 1e-4),
            (empty(2, 196, 768, dtype=half), padding[:, :196], "pca", 64, 1e-4),
            (empty(2, 768, 196).transpose(1, 2), none, "ncut", 64, 1e-4),
            (empty(2, 64, 48, dtype=half), none, "ncut", 64, 1e-4),
            (empty(2, 2048, 768), none, "ncut", 64, 3e-4),
            (empty(2, 2048, 768, dtype=half), none, "ncut", 64, 3e-4),
            (empty(2, 2048, 768, dtype=half), none, "ncut", 64, 1e-4),
        ],
        "informed_scores": [
            (empty(2, 196, 768), labels, none, "object"),
            (empty(2, 196, 768, dtype=half), labels, padding[:, :196], "smaller"),
            (empty(2, 196, 192), labels, none, "object"),
            (empty(2, 196, 16384), labels, none, "larger"),
        ],
    }


def rows(only: str = "", architectures: tuple[int, ...] = ARCHITECTURES) -> Iterator[Row]:
    """Yields a row for each kernel with `only` in its name, for each architecture."""
    for capability in architectures:
        for launch in launches(capability):
            if only in str(launch):
                yield Row(str(launch), f"sm_{capability}", usage(launch, capability))
