"""What CUDA launches: one kernel for self_guided_masking, but for very long rows."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sma_fast
from sma_fast import _native
from sma_fast.testing import (
    assert_same,
    assert_same_selection,
    attention_inputs,
    call,
    guided_inputs,
)

pytestmark = pytest.mark.emulated

HALF, FLOAT = torch.bfloat16, torch.float32
PROTEIN = {"heads": 8, "queries": 40, "selected": 38, "tokens": 1024, "width": 32}
MOLECULE = {"heads": 12, "queries": 60, "selected": 51, "tokens": 512, "width": 64}
LONG = {"batch": 1, "heads": 1, "queries": 5, "selected": 3, "tokens": 8192}
ONE = {
    "protein": (HALF, {"batch": 1, "padding": "right", **PROTEIN}),
    "molecule": (HALF, {"batch": 1, "padding": "right", **MOLECULE}),
    "8192 tokens of 64 features": (FLOAT, {**LONG, "width": 64}),
    "8192 tokens of 128 features": (HALF, {**LONG, "width": 128}),
}
# keys that no cluster of blocks holds, in turns
WIDE = {**LONG, "width": 128}
TURNS = {
    "8192 tokens of 128 features": WIDE,
    "a turn for every sample": {**WIDE, "batch": 3, "padding": "left"},
    "turns for every head": {**WIDE, "heads": 2, "queries": 30, "selected": 20},
}
ROWS_OF_A_TURN = 4  # of 32 parts and the whole, at 8 bytes


@contextlib.contextmanager
def noted(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Gives a list that has the blocks of each launch within, at the end."""
    blocks = []
    file.write_bytes(b"")
    monkeypatch.setenv("SMA_EMULATED_LAUNCHES", str(file))
    yield blocks
    monkeypatch.delenv("SMA_EMULATED_LAUNCHES")
    blocks += map(int, filter(str.isdigit, file.read_text().splitlines()))


def launches(inputs: dict, file: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Returns how many there are, once the answer is the reference's."""
    with noted(file, monkeypatch) as blocks:
        found = call("self_guided_masking", inputs)
    with sma_fast.use_backend("reference"):
        from_scores = sma_fast.select_tokens(
            found.scores,
            mask_ratio=inputs["mask_ratio"],
            key_padding_mask=inputs.get("key_padding_mask"),
        )
        scores = sma_fast.attention_scores(
            *(inputs[name] for name in ("query", "key")),
            **{x: inputs[x] for x in ("query_index", "key_padding_mask") if x in inputs},
        )
        visible = [sma_fast.gather_tokens(x, from_scores.ids_visible) for x in inputs["tokens"]]
    assert_same_selection(found.selection, from_scores)
    torch.testing.assert_close(found.scores, scores, rtol=1e-4, atol=1e-6)
    assert_same(found.visible, visible)
    return len(blocks)


@pytest.mark.parametrize("name", ONE)
def test_one_launch(emulated, monkeypatch, tmp_path, name):
    dtype, options = ONE[name]
    assert launches(guided_inputs(dtype, **options), tmp_path / "launches", monkeypatch) == 1


@pytest.mark.parametrize("name", TURNS)
def test_one_launch_in_turns(emulated, monkeypatch, tmp_path, name):
    monkeypatch.setattr(_native, "_SCRATCH", ROWS_OF_A_TURN * 33 * 8)
    inputs = guided_inputs(FLOAT, **TURNS[name])
    assert launches(inputs, tmp_path / "launches", monkeypatch) == 1


@pytest.mark.parametrize("batch", (1, 3))
def test_rows_too_long_for_one_block_to_select(emulated, monkeypatch, tmp_path, batch):
    """Scores, selection and the one gather have a launch each, whatever the batch."""
    monkeypatch.setattr(_native, "_SCRATCH", ROWS_OF_A_TURN * 33 * 8)
    inputs = guided_inputs(**{**LONG, "batch": batch, "tokens": 60_000, "width": 4})
    assert launches(inputs, tmp_path / "launches", monkeypatch) == 3


def test_one_launch_of_many_samples(emulated, monkeypatch, tmp_path):
    inputs = guided_inputs(batch=40, heads=2, queries=9, selected=4, tokens=30, width=16)
    assert launches(inputs, tmp_path / "launches", monkeypatch) == 1


def test_many_rows_of_a_head_are_shared(emulated, monkeypatch, tmp_path):
    """A few samples have all blocks there is room for, and the same bits as one of many."""
    inputs = attention_inputs(HALF, batch=5, heads=17, queries=130, tokens=70)
    alone = inputs | {name: inputs[name][4:] for name in ("query", "key")}
    with noted(tmp_path / "launches", monkeypatch) as blocks:
        found = call("attention_scores", alone)
    assert blocks == [8]  # two on each of the emulator's multiprocessors
    assert_same(call("attention_scores", inputs)[4:], found)
    with sma_fast.use_backend("reference"):
        torch.testing.assert_close(found, call("attention_scores", alone), rtol=1e-5, atol=1e-6)


def test_blocks_that_run_at_once(emulated, monkeypatch, tmp_path):
    """Two parts of a GPU, of 12 multiprocessors each, have no room for three clusters of 8."""
    parts = os.environ.get("SMA_EMULATED_MULTIPROCESSORS") == "24"
    inputs = attention_inputs(FLOAT, batch=3, heads=8, queries=5, tokens=70)
    with noted(tmp_path / "launches", monkeypatch) as blocks:
        found = call("attention_scores", inputs)
    assert blocks == [3 * 4 if parts else 3]
    with noted(tmp_path / "launches", monkeypatch) as blocks:  # two on a multiprocessor
        call("attention_scores", inputs | {x: inputs[x].to(HALF) for x in ("query", "key")})
    assert blocks == [3 * 8 if parts else 3 * 2]
    with noted(tmp_path / "launches", monkeypatch) as blocks:
        sma_fast.select_tokens(found.repeat(1, 250), mask_ratio=0.3)
    assert blocks == [3 * 4 if parts else 3]
    with noted(tmp_path / "launches", monkeypatch) as blocks:
        sma_fast.random_masking(torch.randn(3, 256, 256), 0.5)
    assert blocks == [3 * 4 if parts else 3]
    with sma_fast.use_backend("reference"):
        torch.testing.assert_close(found, call("attention_scores", inputs), rtol=1e-5, atol=1e-6)


def test_many_rows_have_the_whole_gpu(emulated, monkeypatch, tmp_path):
    """Not a cluster of the few blocks that hold the keys of a sample; the same bits in a batch."""
    options = {"heads": 9, "queries": 240, "tokens": 1060}
    inputs = attention_inputs(HALF, batch=2, **options)
    alone = inputs | {name: inputs[name][1:] for name in ("query", "key")}
    with noted(tmp_path / "launches", monkeypatch) as blocks:
        found = call("attention_scores", alone)
    assert len(blocks) == 1 and blocks[0] > 2
    assert_same(call("attention_scores", inputs)[1:], found)
    with sma_fast.use_backend("reference"):
        torch.testing.assert_close(found, call("attention_scores", alone), rtol=1e-5, atol=1e-6)


SHARED_ROWS = {  # what blocks that share a row choose by
    "ratio": {"mask_ratio": 0.3},
    "nothing": {"mask_ratio": 0.0},
    "half of a number at random": {"num_masked": 100, "random_fraction": 0.5},
    "pool": {"mask_ratio": 0.2, "pool_ratio": 0.5},
    "numbers": {"num_masked": torch.tensor([0, 20_000])},
}


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("dtype", (FLOAT, HALF), ids=str)
@pytest.mark.parametrize("name", SHARED_ROWS)
def test_a_long_row_has_several_blocks(emulated, monkeypatch, tmp_path, name, dtype, padded):
    """Of a cluster; without clusters, of a launch whose blocks wait for each other."""
    options = dict(SHARED_ROWS[name])
    if options.keys() & {"random_fraction", "pool_ratio"}:
        options["noise"] = torch.rand(2, 60_000)
    if padded:
        options["key_padding_mask"] = torch.rand(2, 60_000) < 0.3
    scores = torch.randn(2, 60_000).to(dtype)
    with noted(tmp_path / "launches", monkeypatch) as blocks:
        found = sma_fast.select_tokens(scores, **options)
    assert len(blocks) == 1 and blocks[0] >= 2 * 2
    with sma_fast.use_backend("reference"):
        assert_same_selection(found, sma_fast.select_tokens(scores, **options))


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("candidates", (60_000, 1_048_576))
def test_one_launch_draws_of_many_candidates(emulated, monkeypatch, tmp_path, candidates, padded):
    noise = torch.rand(2, candidates).mul(1000).floor().div(1000)  # with ties
    padding = torch.rand(2, candidates) < 0.3 if padded else None
    arguments = (noise, 500, torch.tensor([0, 500]), padding)
    with noted(tmp_path / "launches", monkeypatch) as blocks:
        found = torch.ops.sma_fast.draw_queries(*arguments)
    assert len(blocks) == 1
    with sma_fast.use_backend("reference"):
        assert_same(found, torch.ops.sma_fast.draw_queries(*arguments))


def test_one_block_a_row_where_several_blocks_cannot_run_at_once(emulated, monkeypatch, tmp_path):
    """Part of the GPU is kept from this process. Blocks of a cluster run at once in any case."""
    scores = torch.randn(2, 60_000)
    monkeypatch.setenv("SMA_EMULATED_ERROR", "720")
    with noted(tmp_path / "launches", monkeypatch) as blocks:
        found = sma_fast.select_tokens(scores, mask_ratio=0.3)
    if int(os.environ.get("SMA_EMULATED_ARCH", "90")) < 90:
        assert len(blocks) == 2 and blocks[0] >= 2 * 2 and blocks[1] == 2
    else:
        assert len(blocks) == 1 and blocks[0] >= 2 * 2
    with sma_fast.use_backend("reference"):
        assert_same_selection(found, sma_fast.select_tokens(scores, mask_ratio=0.3))


def test_long_rows_of_drawn_tokens_have_several_blocks(emulated, monkeypatch, tmp_path):
    inputs = guided_inputs(**{**LONG, "batch": 2, "tokens": 60_000, "width": 4})
    inputs["mask_queries"] = True
    inputs["query_index"] = inputs["query_index"] * 9_999
    inputs["query"] = torch.randn(1, 1, 60_000, 4).expand(2, -1, -1, -1)
    with noted(tmp_path / "launches", monkeypatch) as blocks:
        found = call("self_guided_masking", inputs)
    assert len(blocks) == 3 and blocks[1] >= 2 * 2
    drawn = inputs["query_index"]
    assert bool(found.selection.mask.gather(1, drawn).all())
    first = found.scores.scatter(1, drawn, float("inf"))
    with sma_fast.use_backend("reference"):
        expected = sma_fast.select_tokens(first, mask_ratio=inputs["mask_ratio"])
    assert_same_selection(found.selection, expected)
