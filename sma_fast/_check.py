"""Checks of arguments: each names the argument, what was given and what is allowed.

Shared by `sma_fast.ops`, `sma_fast.compat` and `sma_fast.masking`, which call them as
``_check.tensor(...)``. What runs here runs in every call, so it stays cheap.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCE = ("mean", "sum", "none")


def tensor(name: str, x: Tensor, rank: int, shape: str, dtypes: Sequence[torch.dtype] = ()) -> None:
    """`rank` below 0 is the least rank allowed, with its sign turned."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, allowed is a tensor {shape}")
    dense(name, x)
    if x.dim() != rank and (rank > 0 or x.dim() < -rank):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, allowed is {shape}")
    if dtypes:
        dtype(name, x, dtypes)


def dense(name: str, x: Tensor) -> None:
    if x.layout is not torch.strided or x.is_nested:  # a nested one may be strided too
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.").strip("_")
        raise TypeError(f"{name}: got a {kind} tensor, allowed is a dense one")


def dtype(name: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: got {x.dtype}, allowed is {allowed}")


def device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name}: is on {x.device}, allowed is {like.device}, as the first input")


def mask(name: str, mask: Tensor | None, shape: tuple[int, int], like: Tensor) -> None:
    if mask is None:
        return
    tensor(name, mask, 2, "of bool, True = padding", (torch.bool,))
    if mask.shape[0] != shape[0] or mask.shape[1] != shape[1]:
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}, allowed is {tuple(shape)}")
    device(name, mask, like)


def noise(noise: Tensor, batch: int, tokens: int, like: Tensor) -> None:
    tensor("noise", noise, 2, "(B, N)", (torch.float32,))
    if noise.shape[0] != batch or noise.shape[1] != tokens:
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, allowed is ({batch}, {tokens})")
    device("noise", noise, like)


def attention_map(name: str, x: Tensor) -> None:
    tensor(name, x, 4, "(B, H, M, N)", FLOATS)
    if x.shape[1] == 0:
        raise ValueError(f"{name}: got 0 heads, allowed is at least 1")


def ids(name: str, ids: Tensor, shape: str, tokens: Tensor) -> None:
    tensor(name, ids, 2, shape, (torch.int64,))
    if ids.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"{name}: got shape {tuple(ids.shape)}, allowed is {tokens.shape[0]} rows, the batch"
        )
    device(name, ids, tokens)


def query_key(query: Tensor, key: Tensor) -> None:
    tensor("query", query, 4, "(B or 1, H, M, D)", FLOATS)
    tensor("key", key, 4, "(B, H_kv, N, D)", FLOATS)
    query_batch, heads, _, width = query.shape
    batch, kv_heads, _, key_width = key.shape
    if query_batch != batch and query_batch != 1:
        raise ValueError(
            f"query: got batch {query_batch}, allowed is 1 or {batch}, the batch of key"
        )
    if width != key_width or width == 0:
        raise ValueError(
            f"query, key: got head widths {width} and {key_width}, allowed is one width of at "
            "least 1"
        )
    if heads == 0 or kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(
            f"key: got {kv_heads} heads, allowed is a divisor of the {heads} heads of query"
        )
    device("key", key, query)


def choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, allowed is {', '.join(map(repr, allowed))}")


def flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {_shown(value)}, allowed is True or False")


def number(name: str, value: float) -> None:
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {_shown(value)}, allowed is a number")


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str) else type(value).__name__


def ratio(name: str, value: float, low: float = 0.0) -> None:
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: got {_shown(value)}, allowed is a float in [{low}, 1]")
    if not low <= value <= 1:
        raise ValueError(f"{name}: got {value}, allowed is [{low}, 1]")


def shares(random_fraction: float, pool_ratio: float | None, mask_ratio: float | None) -> None:
    ratio("random_fraction", random_fraction)
    if pool_ratio is not None:
        ratio("pool_ratio", pool_ratio, mask_ratio or 0.0)
        if random_fraction > 0:
            raise ValueError(
                f"random_fraction, pool_ratio: got {random_fraction} and {pool_ratio}, allowed is "
                "at most one"
            )


def count(name: str, value: int, high: int | None) -> None:
    # `high` is put into words only to raise: under torch.compile that would pin the size
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {_shown(value)}, allowed is an int of at least 0")
    if high is None and value < 0:
        raise ValueError(f"{name}: got {value}, allowed is an int of at least 0")
    if high is not None and (value < 0 or value > high):
        raise ValueError(f"{name}: got {value}, allowed is an int in [0, {high}]")


def positive_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {_shown(value)}, allowed is an int of at least 1")
    if value < 1:
        raise ValueError(f"{name}: got {value}, allowed is an int of at least 1")


def positive(name: str, value: float) -> None:
    number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: got {value}, allowed is a finite number above 0")


def layer(value: int, depth: int | None = None) -> None:
    # without a `depth` any int: the model that has the layers is not known yet
    allowed = "an int" if depth is None else f"an int in [{-depth}, {depth - 1}]"
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (depth is not None and not -depth <= value < depth):
        raise ValueError(f"layer: got {value!r}, allowed is {allowed}")


def generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: got {type(generator).__name__}, allowed is a torch.Generator or None"
        )


def rows(name: str, rows: Tensor, batch: int, like: Tensor) -> None:
    if rows.shape[0] != batch:
        raise ValueError(f"{name}: got shape {tuple(rows.shape)}, allowed is ({batch},)")
    device(name, rows, like)


def agree(name: str, given: int | None, known: int) -> int:
    if given is not None and given != known:
        raise ValueError(f"{name}: got {given}, allowed is {known}, as in the tensor given")
    return known


# Checks that also return the argument as the ops take it


def named_device(value: torch.device | str | int | None) -> torch.device | None:
    if value is None or isinstance(value, torch.device):
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError(
            f"device: got {type(value).__name__}, allowed is a torch.device, its name or None"
        )
    try:
        return torch.device(value)
    except RuntimeError:
        raise ValueError(f"device: got {value!r}, allowed is a device that torch has") from None


def same_dtype(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    # under autocast latents often stay float32 beside bfloat16 keys: a matmul would take both down
    if query.dtype == key.dtype:
        return query, key
    device = key.device.type
    if not torch.is_autocast_enabled(device):
        raise TypeError(f"key: got {key.dtype}, allowed is {query.dtype}, the dtype of query")
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype)


def scale(scale: float | None, query: Tensor) -> float:
    if scale is None:
        return query.shape[3] ** -0.5
    if isinstance(scale, (bool, Tensor)) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"scale: got {type(scale).__name__}, allowed is a finite float")
    if not -sys.float_info.max <= scale <= sys.float_info.max:
        given = "an int that no float holds" if isinstance(scale, int) else scale
        raise ValueError(f"scale: got {given}, allowed is a finite float")
    return scale


def query_index(index: Tensor | None, batch: int, queries: int, like: Tensor) -> Tensor | None:
    if index is None:
        return None
    if not isinstance(index, Tensor):
        raise TypeError(
            f"query_index: got {type(index).__name__}, allowed is a tensor (B, R) or (R,)"
        )
    dense("query_index", index)
    dtype("query_index", index, INTS)
    index = index.long()
    if index.dim() == 1:  # samples share its one row
        index = index.contiguous().unsqueeze(0).expand(batch, -1)
    if index.dim() != 2 or index.shape[0] != batch or index.shape[1] > queries:
        raise ValueError(
            f"query_index: got shape {tuple(index.shape)}, allowed is (R,) or ({batch}, R) with R "
            f"at most {queries}, the number of queries"
        )
    device("query_index", index, like)
    return index


def head_index(
    index: Tensor | None,
    head_reduce: str,
    batch: int,
    queries: int,
    query_index: Tensor | None,
    like: Tensor,
) -> Tensor | None:
    if index is None:
        return None
    tensor("head_index", index, 2, "(B, R)", INTS)
    selected = queries if query_index is None else query_index.shape[1]
    if index.shape[0] != batch or index.shape[1] != selected:
        raise ValueError(
            f"head_index: got shape {tuple(index.shape)}, allowed is ({batch}, {selected}), one "
            "head for each selected query"
        )
    if head_reduce == "none":
        raise ValueError("head_index: got a tensor, allowed is None with head_reduce='none'")
    device("head_index", index, like)
    return index.long()


def masked_counts(
    mask_ratio: float | None,
    num_masked: int | Tensor | None,
    max_masked: int | None,
    scores: Tensor,
) -> tuple[int | None, Tensor | None]:
    # -> (num_masked for all rows, or num_masked of each row)
    batch, tokens = scores.shape
    if (mask_ratio is None) == (num_masked is None):
        raise ValueError(
            "mask_ratio, num_masked: got "
            + ("neither" if mask_ratio is None else "both")
            + ", allowed is exactly one"
        )
    if isinstance(num_masked, Tensor):
        tensor("num_masked", num_masked, 1, "(B,)", INTS)
        rows("num_masked", num_masked, batch, scores)
        if max_masked is not None:
            count("max_masked", max_masked, tokens)
        return None, num_masked
    if max_masked is not None:
        raise ValueError(
            f"max_masked: got {max_masked}, allowed only where num_masked is a (B,) tensor"
        )
    if mask_ratio is not None:
        ratio("mask_ratio", mask_ratio)
    else:
        count("num_masked", num_masked, tokens)
    return num_masked, None
