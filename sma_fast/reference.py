"""The oracle: every op of sma_fast in plain PyTorch, readable before fast.

Imports only torch. Each function has the signature of the registered op of the same name
(``sma_fast._schema``); `sma_fast.ops` checks arguments and fills in defaults before they get here.
Every other implementation is tested against this file, and every device without an implementation
of its own is answered by it.

Letters in the shape comments: B batch, N tokens, V visible, K masked, H heads, M queries,
R selected queries, D head width, C token width.
"""

import os

import torch
from torch import Tensor


@torch.no_grad()  # nothing that selects is differentiable
def attention_scores(
    query: Tensor,  # (B or 1, H, M, D)
    key: Tensor,  # (B, H_kv, N, D)
    query_index: Tensor | None,  # (B, R), -1 selects nothing
    head_index: Tensor | None,  # (B, R)
    key_padding_mask: Tensor | None,  # (B, N)
    scale: float,
    head_reduce: str,
) -> Tensor:  # (B, N), or (B, H, N) for head_reduce "none"
    batch, kv_heads = key.shape[:2]
    heads = query.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    if query_index is not None:
        check_index("query_index", query_index, -1, query.shape[2])
    query = query.to(dtype).expand(batch, -1, -1, -1)
    key = key.to(dtype).repeat_interleave(heads // kv_heads, dim=1)  # (B, H, N, D)
    with torch.autocast(key.device.type, enabled=False):  # which would round the products
        logits = _take_rows(query, query_index) @ key.transpose(2, 3) * scale  # (B, H, R, N)
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]
        logits = logits.masked_fill(padding, float("-inf"))
        attention = logits.softmax(dim=3).masked_fill(padding, 0.0)  # a row of padding gave NaN
    else:
        attention = logits.softmax(dim=3)
    return _reduce(attention, query_index, query.shape[2], head_index, head_reduce)


@torch.no_grad()
def aggregate_attention(
    attention: Tensor,  # (B, H, M, N)
    query_index: Tensor | None,  # (B, R)
    head_index: Tensor | None,  # (B, R)
    head_reduce: str,
    logits: bool,
) -> Tensor:  # (B, N), or (B, H, N) for head_reduce "none"
    if query_index is not None:
        check_index("query_index", query_index, -1, attention.shape[2])
    rows = _take_rows(attention, query_index)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # (B, H, R, N)
    if logits:
        rows = rows.softmax(dim=3)
    return _reduce(rows, query_index, attention.shape[2], head_index, head_reduce)


def select_tokens(
    scores: Tensor,  # (B, N)
    key_padding_mask: Tensor | None,  # (B, N)
    noise: Tensor | None,  # (B, N), uniform in [0, 1)
    mask_ratio: float | None,
    num_masked: int | None,
    num_masked_rows: Tensor | None,  # (B,)
    max_masked: int | None,
    random_fraction: float,
    pool_ratio: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens = scores.shape
    width_visible, width_masked = selection_widths(
        tokens, mask_ratio, num_masked, num_masked_rows is not None, max_masked
    )
    if key_padding_mask is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
    else:
        valid = ~key_padding_mask
    n_valid = valid.sum(dim=1)  # (B,)

    if mask_ratio is not None:
        count = round_half_even(mask_ratio * n_valid.double())
    elif num_masked_rows is not None:
        check_index("num_masked", num_masked_rows, 0, None)
        count = num_masked_rows.long().clamp(min=0, max=width_masked)
    else:
        count = torch.full_like(n_valid, num_masked)
    count = torch.minimum(count, n_valid)  # (B,)

    rank = _rank(scores, valid)
    if pool_ratio is not None:
        pool_size = torch.maximum(round_half_even(pool_ratio * n_valid.double()), count)
        in_pool = rank < pool_size[:, None]
        mask = in_pool & (_rank(-noise, in_pool) < count[:, None])
    elif random_fraction > 0:
        top = round_half_even((1.0 - random_fraction) * count.double())
        is_top = rank < top[:, None]
        mask = is_top | (_rank(-noise, valid & ~is_top) < (count - top)[:, None])
    else:
        mask = rank < count[:, None]
    return _selection(mask, valid, width_visible, width_masked)


def draw_queries(
    noise: Tensor,  # (B, M), uniform in [0, 1)
    num_queries: int,
    num_queries_rows: Tensor | None,  # (B,)
    padding_mask: Tensor | None,  # (B, M)
) -> Tensor:  # (B, R), the candidates of lowest noise, ascending, -1 behind a row's own number
    batch, candidates = noise.shape
    if padding_mask is None:
        valid = torch.ones_like(noise, dtype=torch.bool)
    else:
        valid = ~padding_mask
    if num_queries_rows is None:
        count = torch.full((batch,), num_queries, dtype=torch.int64, device=noise.device)
    else:
        check_index("num_queries", num_queries_rows, 0, None)
        count = num_queries_rows.long().clamp(max=num_queries)
    count = torch.minimum(count.clamp(min=1), valid.sum(dim=1))
    chosen = _rank(-noise, valid) < count[:, None]
    return _selection(chosen, valid, candidates, num_queries)[2]


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    # tokens (B, N, ...), ids (B, V) -> (B, V, ...); id -1 gives zeros
    count = tokens.shape[1]
    check_index("ids", ids, -1, count)
    if count == 0:
        return tokens.new_zeros(ids.shape + tokens.shape[2:])
    inside = (ids >= 0) & (ids < count)
    row = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    picked = tokens[row, torch.where(inside, ids, 0)]
    inside = inside.reshape(inside.shape + (1,) * (tokens.dim() - 2))
    zero = torch.zeros((), dtype=tokens.dtype, device=tokens.device)
    return torch.where(inside, picked, zero).contiguous()


def gather_tokens_backward(grad: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    # grad (B, V, ...), ids (B, V) -> (B, N, ...): row j is the sum of the grads whose id is j
    check_index("ids", ids, -1, num_tokens)
    batch = grad.shape[0]
    wide = torch.promote_types(grad.dtype, torch.float32)
    inside = (ids >= 0) & (ids < num_tokens)
    total = torch.zeros(
        (batch, num_tokens + 1) + grad.shape[2:], dtype=wide, device=grad.device
    )  # the last row takes what points nowhere
    row = torch.arange(batch, device=grad.device)[:, None]
    total.index_put_((row, torch.where(inside, ids, num_tokens)), grad.to(wide), accumulate=True)
    return total[:, :num_tokens].to(grad.dtype).contiguous()


def restore_tokens(visible: Tensor, ids_restore: Tensor, fill: Tensor) -> Tensor:
    # visible (B, V, C), ids_restore (B, N), fill (C,) or (B, K, C) -> (B, N, C); -1 gives zeros
    count = visible.shape[1]
    if fill.dim() == 3:
        check_index("ids_restore", ids_restore, -1, count + fill.shape[1])
        return gather_tokens(torch.cat([visible, fill], dim=1), ids_restore)
    check_index("ids_restore", ids_restore, -1, count + ids_restore.shape[1])
    from_visible = gather_tokens(visible, torch.where(ids_restore < count, ids_restore, -1))
    filled = (ids_restore >= count) & (ids_restore < count + ids_restore.shape[1])
    return torch.where(filled[:, :, None], fill, from_visible).contiguous()


def restore_tokens_backward(
    grad: Tensor,  # (B, N, C)
    ids_restore: Tensor,  # (B, N)
    num_visible: int,
    num_fill: int | None,  # K of a (B, K, C) fill, None for a (C,) fill
) -> tuple[Tensor, Tensor]:  # (B, V, C) and the shape of fill
    if num_fill is not None:
        check_index("ids_restore", ids_restore, -1, num_visible + num_fill)
        total = gather_tokens_backward(grad, ids_restore, num_visible + num_fill)
        return total[:, :num_visible].contiguous(), total[:, num_visible:].contiguous()
    bound = num_visible + ids_restore.shape[1]
    check_index("ids_restore", ids_restore, -1, bound)
    to_visible = torch.where(ids_restore < num_visible, ids_restore, -1)
    filled = (ids_restore >= num_visible) & (ids_restore < bound)
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad_fill = torch.where(filled[:, :, None], grad.to(wide), 0.0).sum(dim=(0, 1))
    return gather_tokens_backward(grad, to_visible, num_visible), grad_fill.to(grad.dtype)


def self_guided_masking(
    query: Tensor,  # (B or 1, H, M, D)
    key: Tensor,  # (B, H_kv, N, D)
    tokens: list[Tensor],  # each (B, N, ...)
    query_index: Tensor,  # (B, R)
    head_index: Tensor | None,  # (B, R)
    key_padding_mask: Tensor | None,  # (B, N)
    noise: Tensor | None,  # (B, N)
    mask_ratio: float,
    scale: float,
    head_reduce: str,
    mask_queries: bool,
    random_fraction: float,
    pool_ratio: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    scores = attention_scores(
        query, key, query_index, head_index, key_padding_mask, scale, head_reduce
    )  # (B, N)
    wanted = scores
    if mask_queries:
        drawn = scores.new_zeros(scores.shape[0], scores.shape[1] + 1)
        last = torch.full_like(query_index, scores.shape[1])
        drawn.scatter_(1, torch.where(query_index < 0, last, query_index), 1.0)
        wanted = scores.masked_fill(drawn[:, :-1] > 0, float("inf"))
    selection = select_tokens(
        wanted, key_padding_mask, noise, mask_ratio, None, None, None, random_fraction, pool_ratio
    )
    return (scores, *selection, [gather_tokens(x, selection[1]) for x in tokens])


def random_masking(
    tokens: Tensor,  # (B, N, ...)
    noise: Tensor,  # (B, N)
    mask_ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, V, ...), (B, N) float 0/1, (B, N)
    count = tokens.shape[1]
    keep = int(count * (1 - mask_ratio))
    valid = torch.ones_like(noise, dtype=torch.bool)
    masked = _rank(-noise, valid) >= keep
    mask, ids_visible, _, ids_restore, _, _ = _selection(masked, valid, keep, count - keep)
    return gather_tokens(tokens, ids_visible), mask.float(), ids_restore


@torch.no_grad()
def bipartition(
    embeddings: Tensor,  # (B, N, C)
    key_padding_mask: Tensor | None,  # (B, N)
    method: str,
    iterations: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    embeddings = without_padding(embeddings, key_padding_mask)
    check_finite("embeddings", embeddings)
    batch, tokens, _ = embeddings.shape
    valid = torch.ones((batch, tokens), dtype=torch.float64, device=embeddings.device)
    if key_padding_mask is not None:
        valid = (~key_padding_mask).double()
    number = valid.sum(1)[:, None].clamp(min=1)  # (B, 1)
    x = _unit_rows(embeddings)
    cosine = x @ x.transpose(1, 2)  # (B, N, N); 0 with a zero row
    if method == "ncut":
        weight = (valid[:, :, None] * valid[:, None, :] + cosine) / 2
        degree = weight.sum(2).clamp(min=1e-6 * number)  # (B, N)
        root = degree.rsqrt() * valid
        matrix = root[:, :, None] * weight * root[:, None, :]
        trivial = degree.sqrt() * valid
    else:
        root, trivial = valid, valid
        matrix = cosine / number[:, :, None]
    trivial = torch.nn.functional.normalize(trivial, dim=1)
    away = torch.eye(tokens, dtype=x.dtype, device=x.device) - (
        trivial[:, :, None] * trivial[:, None, :]
    )
    values, vectors = torch.linalg.eigh(away @ matrix @ away)  # ascending
    value = values[:, -1]
    next_value = values[:, -2] if tokens > 1 else torch.zeros_like(value)
    found = (value > 1e-6) & (valid.sum(1) > 1)
    vector = torch.nn.functional.normalize(vectors[:, :, -1] * root, dim=1) * found[:, None]
    large = vector.abs() >= (1 - 1e-3) * vector.abs().amax(1, keepdim=True)
    first = vector.gather(1, large.to(torch.uint8).argmax(1, keepdim=True))  # the first large one
    vector = torch.where(first < 0, -vector, vector)
    labels = vector > 1e-4 * vector.abs().amax(1, keepdim=True)  # 0 but for rounding is not above
    eigenvalue = torch.where(found, value, 0.0)
    if method == "ncut":
        eigenvalue = 1 - eigenvalue
    converged = found & (value - next_value > 1e-5 * value)
    ids = _compact(labels, labels.cumsum(1) - 1, tokens)
    return vector.float(), labels, ids, eigenvalue.float(), converged


@torch.no_grad()
def informed_scores(
    embeddings: Tensor,  # (B, N, C)
    labels: Tensor,  # (B, N) bool
    key_padding_mask: Tensor | None,  # (B, N)
    cluster: str,
) -> Tensor:  # (B, N), float32
    embeddings = without_padding(embeddings, key_padding_mask)
    check_finite("embeddings", embeddings)
    valid = torch.ones_like(labels) if key_padding_mask is None else ~key_padding_mask
    member, others = labels & valid, ~labels & valid
    number, others_number = member.sum(1), others.sum(1)  # (B,)
    swap = {
        "object": torch.zeros_like(number, dtype=torch.bool),
        "background": torch.ones_like(number, dtype=torch.bool),
        "smaller": others_number < number,
        "larger": others_number > number,
    }[cluster]
    member = torch.where(swap[:, None], others, member)
    x = _unit_rows(embeddings)
    total = torch.where(member[:, :, None], x, 0.0).sum(1, keepdim=True)
    mean = total / member.sum(1).clamp(min=1)[:, None, None]
    length = mean.norm(dim=2, keepdim=True)  # (B, 1, 1)
    mean = torch.where(length > 1e-6, mean / length, 0.0)
    scores = (x @ mean.transpose(1, 2))[:, :, 0]
    return torch.where(valid & ~scores.isnan(), scores, 0.0).float().contiguous()


# What the ops above share.


def selection_widths(
    tokens: int,
    mask_ratio: float | None,
    num_masked: int | None,
    per_row: bool,
    max_masked: int | None,
) -> tuple[int, int]:
    """Returns (V, K), the widths of ids_visible and ids_masked, without looking at any data."""
    if per_row:
        return tokens, tokens if max_masked is None else max_masked
    width_masked = num_masked if mask_ratio is None else round(mask_ratio * tokens)
    return tokens - width_masked, width_masked


def round_half_even(x: Tensor) -> Tensor:
    return x.round().long()


def looks_into(x: Tensor) -> bool:
    """Returns whether what `x` holds is checked: on a GPU, which has to wait for it, if asked."""
    return x.device.type == "cpu" or os.environ.get("SMA_FAST_CHECK") == "1"


def check_index(name: str, index: Tensor, low: int, high: int | None) -> None:
    """Raises ValueError where `index` leaves [low, high); on a GPU only under SMA_FAST_CHECK=1."""
    if index.numel() == 0:
        return
    if not looks_into(index):
        return
    for value in (int(index.min()), int(index.max())):
        if value < low or (high is not None and value >= high):
            raise_index_error(name, value, low, high)


def without_padding(rows: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Returns (B, N, C) with zeros where there is padding, which may hold anything."""
    if key_padding_mask is None:
        return rows
    return rows.masked_fill(key_padding_mask[:, :, None], 0)


def check_finite(name: str, x: Tensor) -> None:
    """Raises ValueError where `x` is NaN or infinite; on a GPU only under SMA_FAST_CHECK=1."""
    if not looks_into(x):
        return
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name}: holds NaN or infinity, allowed are finite numbers")


def raise_index_error(name: str, value: int, low: int, high: int | None) -> None:
    allowed = f"at least {low}" if high is None else f"{low} to {high - 1}"
    raise ValueError(f"{name}: holds {value}, allowed is {allowed}")


def _unit_rows(x: Tensor) -> Tensor:
    """Returns (B, N, C) float64 rows of length 1; 0 for those shorter than a normal number."""
    shortest = torch.finfo(torch.promote_types(x.dtype, torch.float32)).tiny
    x = x.double()
    largest = x.abs().amax(2, keepdim=True)
    x = x / torch.where(largest == 0, 1.0, largest)  # squares of extremes leave the range
    length = x.norm(dim=2, keepdim=True)
    short = largest * length < shortest
    return torch.where(short, 0.0, x / torch.where(short, 1.0, length))


def _take_rows(x: Tensor, query_index: Tensor | None) -> Tensor:
    # (B, H, M, D), (B, R) -> (B, H, R, D); an index outside reads row 0 and is dropped by _reduce
    if query_index is None:
        return x
    if x.shape[2] == 0:
        return x.new_zeros(x.shape[:2] + query_index.shape[1:] + x.shape[3:])
    inside = (query_index >= 0) & (query_index < x.shape[2])
    index = torch.where(inside, query_index, 0)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


def _reduce(
    attention: Tensor,  # (B, H, R, N)
    query_index: Tensor | None,  # (B, R) into num_queries; what points outside adds nothing
    num_queries: int,
    head_index: Tensor | None,  # (B, R)
    head_reduce: str,
) -> Tensor:  # (B, N) or (B, H, N), float32
    heads, tokens = attention.shape[1], attention.shape[3]
    if query_index is not None:
        outside = (query_index < 0) | (query_index >= num_queries)
        attention = attention.masked_fill(outside[:, None, :, None], 0.0)
    if head_index is not None:
        used = head_index if query_index is None else torch.where(outside, 0, head_index)
        check_index("head_index", used, 0, heads)
        inside = ((used >= 0) & (used < heads))[:, None, :, None]
        used = torch.where(inside, used[:, None, :, None], 0).expand(-1, -1, -1, tokens)
        return torch.where(inside, attention.gather(1, used), 0.0).sum(dim=(1, 2)).float()
    per_head = attention.sum(dim=2)  # (B, H, N)
    if head_reduce == "none":
        return per_head.float()
    total = per_head.sum(dim=1)
    return (total / heads if head_reduce == "mean" else total).float()


def _rank(values: Tensor, eligible: Tensor) -> Tensor:
    """Returns each token's place by descending value, ties to the lowest index, NaN as -inf.

    Tokens that are not eligible stand behind all others. (B, N), (B, N) -> (B, N) int64.
    """
    values = torch.where(values.isnan(), float("-inf"), values)
    order = values.argsort(dim=1, descending=True, stable=True)
    behind = (~eligible).gather(1, order).to(torch.uint8)
    order = order.gather(1, behind.argsort(dim=1, stable=True))
    place = torch.arange(values.shape[1], device=values.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    return torch.where(eligible, rank, values.shape[1])


def _selection(
    mask: Tensor, valid: Tensor, width_visible: int, width_masked: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # a (B, N) mask and the tokens that count -> the fields of TokenSelection
    mask = (mask & valid).contiguous()
    visible = (valid & ~mask).contiguous()
    at_visible = visible.cumsum(dim=1) - 1
    at_masked = mask.cumsum(dim=1) - 1
    ids_restore = torch.where(mask, width_visible + at_masked, torch.where(visible, at_visible, -1))
    return (
        mask,
        _compact(visible, at_visible, width_visible),
        _compact(mask, at_masked, width_masked),
        ids_restore,
        visible.sum(dim=1, dtype=torch.int32),
        mask.sum(dim=1, dtype=torch.int32),
    )


def _compact(member: Tensor, place: Tensor, width: int) -> Tensor:
    # the indices of the members of each row, ascending, -1 behind: (B, N) -> (B, width)
    out = torch.full((member.shape[0], width + 1), -1, dtype=torch.int64, device=member.device)
    token = torch.arange(member.shape[1], device=member.device).expand_as(place)
    out.scatter_(1, torch.where(member, place.clamp(max=width), width), token)
    return out[:, :width].contiguous()
