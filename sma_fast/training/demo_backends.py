"""Every implementation this machine has, checked against the oracle and timed beside PyTorch.

Letters in the shapes: B batch, N tokens, V visible, K masked, H heads, M queries, R selected
queries, D head width, C token width.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import sma_fast
from sma_fast.testing import (
    assert_consistent,
    assert_mask_up_to_near_ties,
    assert_same_selection,
    assert_scores_close,
    score_bound,
)

OPS = ("attention_scores", "select_tokens", "gather_tokens", "self_guided_masking")
PLAIN = "plain PyTorch"
ROUNDS = 15
SECONDS = 0.01  # of each variant in a round
INTERPRETED = 4  # pictures for Triton's interpreter, which takes a second for them
SLOW = 0.3  # seconds a call from which one measurement will do: Triton's interpreter


class BackendMismatch(RuntimeError):
    """Raised where an implementation disagrees with the oracle."""


@dataclass(frozen=True)
class Batch:
    """One batch at the first attention layer, with the queries drawn already.

    Attributes:
        query: (1, H, M, D).
        key: (B, H, N, D).
        tokens: (B, N, C).
        query_index: (B, R) int64.
        mask_ratio: share of the N tokens to mask.
    """

    query: Tensor
    key: Tensor
    tokens: Tensor
    query_index: Tensor
    mask_ratio: float

    def first(self, number: int) -> "Batch":
        """Returns the first samples."""
        parts = {name: getattr(self, name)[:number] for name in ("key", "tokens", "query_index")}
        return dataclasses.replace(self, **parts)

    def to(self, device: str) -> "Batch":
        tensors = (self.query, self.key, self.tokens, self.query_index)
        return Batch(*(x.to(device) for x in tensors), self.mask_ratio)


@dataclass(frozen=True)
class Row:
    """How one implementation of one op did: `seconds` a call, `samples` a second."""

    op: str
    device: str
    backend: str
    seconds: float
    samples: float


def compare_backends(batch: Batch) -> tuple[list[Row], dict[str, str]]:
    """Returns times of every implementation that answers here, and why the others do not.

    Each is checked first: scores against the oracle's within tolerance, masks outside near ties;
    with the oracle's scores given, masks and ids bit for bit; gathered tokens bit for bit. Plain
    PyTorch is held to the same.

    Args:
        batch: on the CPU; a copy goes to the GPU where there is one.

    Returns:
        Rows, in the order of OPS, plain PyTorch first; and ``{"<backend> on <device>": reason}``
        for `self_guided_masking`.

    Raises:
        BackendMismatch: naming the op, the implementation and what differs.
    """
    rows, missing = [], {}
    table = sma_fast.backends()
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        here = batch.to(device)
        whole = here, _oracle(here)
        few = here.first(INTERPRETED)
        few = few, _oracle(few)
        for op in OPS:
            variants: dict[str, Callable[[], object]] = {}
            sizes = {PLAIN: len(here.key)}
            plain, (here, expected) = _PLAIN[op], whole
            scores = expected["attention_scores"]
            _check(op, device, PLAIN, plain(here, scores), expected, here)
            variants[PLAIN] = lambda plain=plain, here=here, scores=scores: plain(here, scores)
            for backend, state in table[op][device].items():
                if state not in ("answers", "ready"):
                    if op == "self_guided_masking":
                        missing[f"{backend} on {device}"] = state
                    continue
                given, right = few if (backend, device) == ("triton", "cpu") else whole
                given_scores, sizes[backend] = right["attention_scores"], len(given.key)
                with sma_fast.use_backend(backend):
                    _check(op, device, backend, _call(op, given, given_scores), right, given)
                variants[backend] = _forced(backend, op, given, given_scores)
            for backend, seconds in _time(variants, device).items():
                rows.append(Row(op, device, backend, seconds, sizes[backend] / seconds))
    return rows, missing


def _oracle(batch: Batch) -> dict[str, object]:
    # what each op should give; the ops after the first with its scores
    with sma_fast.use_backend("reference"):
        expected = {op: _call(op, batch, None) for op in OPS[:1] + OPS[3:]}
        scores = expected["attention_scores"]
        return expected | {op: _call(op, batch, scores) for op in OPS[1:3]}


def table(rows: list[Row], unit: str) -> str:
    """Returns `rows` as text, with each time over that of plain PyTorch."""
    lines = [f"{'op':<20} {'device':<7} {'backend':<14} {'ms/call':>9} {unit + '/s':>12} {'x':>6}"]
    plain = {(row.op, row.device): row.seconds for row in rows if row.backend == PLAIN}
    for row in rows:
        lines.append(
            f"{row.op:<20} {row.device:<7} {row.backend:<14} {row.seconds * 1e3:>9.3f} "
            f"{row.samples:>12,.0f} {plain[row.op, row.device] / row.seconds:>6.1f}"
        )
    return "\n".join(lines)


def _call(op: str, batch: Batch, scores: Tensor | None) -> object:
    if op == "attention_scores":
        return sma_fast.attention_scores(batch.query, batch.key, query_index=batch.query_index)
    if op == "select_tokens":
        return sma_fast.select_tokens(scores, mask_ratio=batch.mask_ratio)
    if op == "gather_tokens":
        return sma_fast.gather_tokens(batch.tokens, _visible(batch))
    return sma_fast.self_guided_masking(
        batch.query,
        batch.key,
        batch.tokens,
        mask_ratio=batch.mask_ratio,
        query_index=batch.query_index,
    )


def _forced(backend: str, op: str, batch: Batch, scores: Tensor) -> Callable[[], object]:
    def run() -> object:
        with sma_fast.use_backend(backend):
            return _call(op, batch, scores)

    return run


def _visible(batch: Batch) -> Tensor:
    # (B, V): every second token and so on, for gather_tokens alone
    batch_size, _, tokens, _ = batch.key.shape
    visible = tokens - round(batch.mask_ratio * tokens)
    ids = torch.arange(visible, device=batch.key.device) * tokens // max(visible, 1)
    return ids.expand(batch_size, -1).contiguous()


# Plain PyTorch of the best algebra: only the selected rows are scored.


def _plain_scores(batch: Batch, scores: Tensor | None = None) -> Tensor:
    count, heads, _, width = batch.key.shape
    index = batch.query_index[:, None, :, None].expand(-1, heads, -1, width)
    query = batch.query.expand(count, -1, -1, -1).gather(2, index)  # (B, H, R, D)
    logits = query @ batch.key.transpose(2, 3) * width**-0.5
    return logits.softmax(dim=3).sum(dim=2).mean(dim=1)  # (B, N)


def _plain_select(batch: Batch, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, tokens = scores.shape
    masked = round(batch.mask_ratio * tokens)
    ids_masked = scores.topk(masked, dim=1).indices.sort(dim=1).values
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, ids_masked, True)
    ids_visible = (~mask).nonzero()[:, 1].view(rows, tokens - masked)
    return mask, ids_visible, ids_masked


def _plain_gather(batch: Batch, scores: Tensor | None = None) -> Tensor:
    return _take(batch.tokens, _visible(batch))


def _plain_masking(batch: Batch, scores: Tensor | None = None) -> tuple:
    scores = _plain_scores(batch)
    selection = _plain_select(batch, scores)
    return selection, scores, (_take(batch.tokens, selection[1]),)


def _take(tokens: Tensor, ids: Tensor) -> Tensor:
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


_PLAIN = {
    "attention_scores": _plain_scores,
    "select_tokens": _plain_select,
    "gather_tokens": _plain_gather,
    "self_guided_masking": _plain_masking,
}


# Checks and clocks.


def _check(op: str, device: str, backend: str, got, expected: dict, batch: Batch) -> None:
    if not __debug__:
        raise BackendMismatch(f"{op} on {device}: {backend} is not checked under python -O")
    try:
        _assert_agrees(op, backend == PLAIN, got, expected, batch)
    except AssertionError as difference:
        raise BackendMismatch(
            f"{op} on {device}: {backend} disagrees with the oracle: {difference}. "
            "Its results are wrong: please report this with the output of `sma-fast info`"
        ) from None


def _assert_agrees(op: str, is_plain: bool, got, expected: dict, batch: Batch) -> None:
    scores = expected["attention_scores"]
    if op == "attention_scores":
        assert_scores_close(got, scores)
    elif op == "select_tokens" and is_plain:  # topk leaves open which of equal scores it takes
        assert_mask_up_to_near_ties(got[0], expected[op].mask, scores, 0.0)
    elif op == "select_tokens":
        assert_same_selection(got, expected[op])
    elif op == "gather_tokens":
        assert torch.equal(got, expected[op]), "gathered tokens"
    else:
        selection, own, (visible,) = got[:3]
        assert_scores_close(own, scores)
        right = expected[op].selection.mask
        assert_mask_up_to_near_ties(selection[0], right, scores, score_bound(scores))
        assert torch.equal(visible, _take(batch.tokens, selection[1])), "visible tokens"
        if not is_plain:
            assert_consistent(selection)
            with sma_fast.use_backend("reference"):
                same = sma_fast.select_tokens(own, mask_ratio=batch.mask_ratio)
            assert_same_selection(selection, same)


def _time(variants: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Returns seconds of a call in the best of ROUNDS rounds, in which the variants take turns."""

    def clock(run: Callable[[], object], calls: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    for run in variants.values():  # warm up: first calls load, compile and allocate
        run()
    best = {name: clock(run, 1) for name, run in variants.items()}
    calls = {name: max(1, int(SECONDS / seconds)) for name, seconds in best.items()}
    quick = {name: run for name, run in variants.items() if best[name] < SLOW}
    for _ in range(ROUNDS):
        for name, run in quick.items():
            best[name] = min(best[name], clock(run, calls[name]))
    return best
