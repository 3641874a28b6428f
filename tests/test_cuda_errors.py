"""What a CUDA kernel that cannot be launched says: the op, the device, the shapes, what to do.

In the emulator, whose runtime fails as it is told (SMA_EMULATED_ERROR).
"""

import re

import pytest
import torch
from test_cuda_launches import noted
from torch.utils._pytree import tree_leaves

import sma_fast
from sma_fast import _native
from sma_fast.testing import CASES, NATIVE_DTYPES, call, guided_inputs

pytestmark = pytest.mark.emulated

OPS = {  # a case, and what the error says of its shapes
    "attention_scores": (
        "15 selected",
        r"query \(2, 2, 20, 8\), key \(2, 2, 12, 8\), of which 15 queries are selected",
    ),
    "select_tokens": ("1000 tokens", r"scores \(3, 1000\)"),
    "gather_tokens": ("any ids", r"tokens \(3, 12\) of 20 bytes, ids \(3, 7\)"),
    "restore_tokens": ("mask token", r"visible \(3, 7\) of 20 bytes, ids_restore \(3, 12\)"),
    "self_guided_masking": (
        "index given",
        r"query \(2, 2, 5, 8\), key \(2, 2, 12, 8\), of which 3 queries are selected, "
        r"1 tensors of tokens",
    ),
    "random_masking": ("given noise", r"tokens \(3, 12\) of 20 bytes, of which 7 stay"),
    "bipartition": ("", r"embeddings \(2, 9, 6\)"),
    "gather_tokens_backward": ("", r"grad \(3, 7, 5\), of 12 tokens"),
    "restore_tokens_backward": ("", r"grad \(3, 12, 5\), of 7 visible tokens"),
}
ERRORS = {  # CUDA's number, its words, and what to do
    "built for other GPUs": (209, "no kernel image", "set SMA_FAST_CUDA_ARCHS to .* install again"),
    "without code for it": (98, "invalid device", "set SMA_FAST_CUDA_ARCHS to .* install again"),
    "driver too old": (35, "driver version is insufficient", "update the driver"),
    "PTX too new for the driver": (222, "unsupported toolchain", "update the driver"),
    "out of memory": (2, "out of memory", "Free memory on this GPU, or take a smaller batch"),
}
TOO_LARGE = (720, "too many blocks in cooperative launch", "use the backend triton")


def inputs_of(op: str) -> dict:
    if op == "bipartition":
        return {"embeddings": torch.randn(2, 9, 6)}
    if op == "gather_tokens_backward":
        return {"grad": torch.randn(3, 7, 5), "ids": torch.randint(12, (3, 7)), "tokens": 12}
    if op == "restore_tokens_backward":
        ids = torch.rand(3, 12).argsort(1)
        return {"grad": torch.randn(3, 12, 5), "ids": ids, "visible": 7, "fill": None}
    return next(case for case in CASES[op] if case.name == OPS[op][0]).build()


def perform(op: str, inputs: dict) -> object:
    if op.endswith("_backward"):
        return getattr(torch.ops.sma_fast, op)(*inputs.values())
    return call(op, inputs)


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("op", OPS)
def test_a_launch_that_fails(emulated, monkeypatch, op, name):
    number, words, advice = ERRORS[name]
    monkeypatch.setenv("SMA_EMULATED_ERROR", str(number))
    said = rf"^sma_fast\.{op} on CUDA device 0, {OPS[op][1]}: .*{words}.*\. .*{advice}"
    with pytest.raises(RuntimeError, match=said):
        perform(op, inputs_of(op))
    monkeypatch.delenv("SMA_EMULATED_ERROR")
    perform(op, inputs_of(op))  # the next one is not burdened


def test_an_error_without_advice(emulated, monkeypatch):
    monkeypatch.setenv("SMA_EMULATED_ERROR", "719")
    with pytest.raises(RuntimeError, match=r"select_tokens on CUDA device 0.*that was chosen$"):
        call("select_tokens", inputs_of("select_tokens"))


@pytest.mark.parametrize("op", OPS)
def test_a_device_that_is_not_there(emulated, monkeypatch, op):
    monkeypatch.setattr(_native, "_where", lambda x: (1, 0))
    said = rf"^sma_fast\.{op} on CUDA device 1, {OPS[op][1]}: .*device 1 of 1"
    with pytest.raises(RuntimeError, match=said):
        perform(op, inputs_of(op))


@pytest.mark.parametrize("op", OPS)
def test_another_device_than_the_current_one(emulated, monkeypatch, tmp_path, op):
    """Is the current one for the launches, and the other one again behind them."""
    inputs = inputs_of(op)
    expected = perform(op, inputs)
    monkeypatch.setenv("SMA_EMULATED_DEVICES", "2")
    monkeypatch.setenv("SMA_EMULATED_LAUNCHES", str(tmp_path / "launches"))
    monkeypatch.setattr(_native, "_where", lambda x: (1, 0))
    found = perform(op, inputs)
    lines = (tmp_path / "launches").read_text().splitlines()
    changes = "".join("L" if line.isdigit() else line[-1] for line in lines)
    assert re.fullmatch("(1L+0)+", changes)
    for x, y in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert x is y is None or torch.equal(x, y)


LATER = {  # what takes several launches
    "self_guided_masking": lambda: guided_inputs(
        batch=1, heads=1, queries=5, selected=3, tokens=60_000, width=4
    ),
    "random_masking": lambda: {"tokens": torch.randn(1, 60_000, 1), "mask_ratio": 0.5},
    "restore_tokens_backward": lambda: inputs_of("restore_tokens_backward"),
}


@pytest.mark.parametrize("op", LATER)
def test_a_later_launch_that_fails(emulated, monkeypatch, tmp_path, op):
    inputs = LATER[op]()
    with noted(tmp_path / "launches", monkeypatch) as launches:
        perform(op, inputs)
    assert len(launches) > 1
    for good in range(1, len(launches)):
        monkeypatch.setenv("SMA_EMULATED_ERROR", f"2,{good}")
        with pytest.raises(RuntimeError, match=rf"^sma_fast\.{op} on CUDA device 0.*Free memory"):
            perform(op, inputs)
        monkeypatch.delenv("SMA_EMULATED_ERROR")
        perform(op, inputs)


@pytest.mark.parametrize("number, words, advice", (*ERRORS.values(), TOO_LARGE))
def test_all_blocks_at_once_that_fail(emulated, monkeypatch, number, words, advice):
    """Of queries too many for a cluster to list."""
    monkeypatch.setenv("SMA_EMULATED_ERROR", str(number))
    query, key = torch.randn(1, 1, 4200, 4), torch.randn(1, 1, 40, 4)
    with pytest.raises(RuntimeError, match=rf"^sma_fast\.attention_scores .*{words}.*{advice}"):
        sma_fast.attention_scores(query, key)


def test_more_tokens_than_ids_count(emulated):
    """Refused before a launch: the kernels count tokens in 32 bits."""
    many = torch.empty((1, 1 << 31, 1), dtype=torch.float16)  # of memory that is never touched
    ids = torch.zeros((1, 1), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^tokens: got 2147483648 tokens, allowed is below 2\^31"):
        sma_fast.gather_tokens(many, ids)
    with pytest.raises(ValueError, match=r"^visible, fill: got 2147483649 tokens, allowed is"):
        sma_fast.restore_tokens(many, ids, torch.zeros(1, dtype=torch.float16))


def test_more_samples_than_a_launch_has_blocks(emulated, monkeypatch):
    """Refused before memory is touched, which is of a small batch here."""
    module = _native._module()
    select = module.select_tokens
    monkeypatch.setattr(
        module, "select_tokens", lambda *given: select(*given[:4], 1 << 31, *given[5:])
    )
    said = r"scores \(2147483648, 7\): the samples are more .*\. Take a smaller batch$"
    with pytest.raises(RuntimeError, match=said):
        sma_fast.select_tokens(torch.randn(2, 7), num_masked=3)


def test_heads_too_wide_for_shared_memory(emulated):
    """Refused before a launch, with what to do."""
    wide = torch.zeros(1, 1, 2, 40_000)
    with pytest.raises(RuntimeError, match="too wide for this GPU's shared memory. Use the back"):
        sma_fast.attention_scores(wide, wide)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("tokens, queries", ((30, 40), (3000, 3)))
def test_heads_that_fit_on_every_gpu(emulated, tokens, queries, dtype):
    """Wider ones are Triton's, where it is. Run for several GPUs in test_emulated_cuda.py."""
    width = _native._WIDE_HEAD // dtype.itemsize
    sizes = {"queries": queries, "selected": queries, "tokens": tokens, "width": width}
    inputs = guided_inputs(dtype, batch=1, heads=1, **sizes)
    scored = {name: inputs[name] for name in ("query", "key", "query_index")}
    with sma_fast.use_backend("reference"):
        expected = sma_fast.attention_scores(**scored)
    for scores in (
        sma_fast.attention_scores(**scored),
        call("self_guided_masking", inputs).scores,
    ):
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
