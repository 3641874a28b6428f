"""The emulator that runs CUDA kernels on the CPU: it does what a GPU does, and sees what is wrong.

Compares with torch; the kernels are those of tests/emulated_cuda/self_test.cu.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch

pytestmark = pytest.mark.emulated

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent / "emulated_cuda"
SEEDS = ("0", "1", "2", "3")
ALL = range(32)


class Kernels:
    """The launchers of self_test.cu; they take tensors, and raise what the emulator found."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))

    def __getattr__(self, name: str) -> Any:
        function = self.library[f"run_{name}"]
        function.restype = ctypes.c_char_p

        def call(*arguments):
            error = function(
                *(
                    ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x
                    for x in arguments
                )
            )
            if error is not None:
                raise RuntimeError(error.decode())

        return call


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(
        emulation.builder().shared_library("self_test", {HERE / "self_test.cu": ["-O2"]}, [])
    )


@pytest.fixture(params=SEEDS)
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMA_EMULATED_SEED", request.param)


def integers(*shape: int, high: int = 1000) -> torch.Tensor:
    return torch.randint(high, shape, dtype=torch.int32)


@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_block_sums(kernels: Kernels, seed: None, threads: int):
    values, sums = integers(5, threads), integers(5)
    kernels.block_sums(True, 5, threads, values, sums)
    assert torch.equal(sums.long(), values.sum(1))


def test_a_missing_barrier_shows(kernels: Kernels, monkeypatch: pytest.MonkeyPatch):
    values, sums = integers(5, 256), integers(5)
    wrong = 0
    for seed in SEEDS:
        monkeypatch.setenv("SMA_EMULATED_SEED", seed)
        kernels.block_sums(False, 5, 256, values, sums)
        wrong += not torch.equal(sums.long(), values.sum(1))
    assert wrong == len(SEEDS)


def test_one_seed_is_one_order(kernels: Kernels):
    values, first, second = integers(5, 256), integers(5), integers(5)
    kernels.block_sums(False, 5, 256, values, first)
    kernels.block_sums(False, 5, 256, values, second)
    assert torch.equal(first, second)


def test_warp_operations(kernels: Kernels, seed: None):
    values = integers(32) - 500
    out = torch.zeros(10, 32, dtype=torch.int32)
    kernels.warp_operations(values, out)
    v = values.tolist()
    garbage = 0xDEADBEEF - (1 << 32)

    def bits(lanes) -> int:
        number = sum(1 << i for i in lanes)
        return number - (1 << 32) * (number >> 31)

    expected = [
        [v[5]] * 32,
        [v[i - 3] if i % 8 >= 3 else v[i] for i in ALL],
        [v[i + 3] if i < 29 else v[i] for i in ALL],
        [v[i ^ 9] for i in ALL],
        [bits(j for j in ALL[::2] if v[j] > 0) if i % 2 == 0 else sum(v[1::2]) for i in ALL],
        [max(v[::2]) if i % 2 == 0 else 0 for i in ALL],
        [garbage if i % 2 == 0 else 1 for i in ALL],
        # C++ divides towards zero
        [bits(j for j in ALL if int(v[j] / 16) == int(v[i] / 16)) for i in ALL],
        [bits(range(20)) if i < 20 else 0 for i in ALL],
        [min(v[:20]) if i < 20 else 0 for i in ALL],
    ]
    for row, (found, right) in enumerate(zip(out.tolist(), expected, strict=True)):
        assert found == right, row


def test_barriers_with_predicates(kernels: Kernels, seed: None):
    values = integers(50, high=3)
    out = torch.zeros(40, 3, dtype=torch.int32)
    kernels.votes(values, out)
    assert (out == torch.tensor([int((values[:40] > 0).sum()), 1, 0])).all()
    values[:] = 7
    kernels.votes(values, out)
    assert (out == torch.tensor([40, 1, 1])).all()


def test_atomics(kernels: Kernels, seed: None):
    values = integers(6, 64, high=60)
    histogram, total = torch.zeros(60, dtype=torch.int32), torch.zeros(1)
    most, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    kernels.count_values(6, 64, values, histogram, total, most, seen)
    assert torch.equal(histogram.long(), values.flatten().bincount(minlength=60))
    assert total == values.sum() and most == values.max()
    assert seen == sum(1 << v for v in set(values.flatten().tolist()))


def as_tf32(x: torch.Tensor) -> torch.Tensor:
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "tf32"])
def test_products(kernels: Kernels, seed: None, kind: str):
    depth = 8 if kind == "tf32" else 16
    a, b, d = torch.randn(16, depth), torch.randn(depth, 8), torch.randn(16, 8)
    a[3] *= 1e-6  # subnormal in float16
    if kind == "tf32":
        bits = [x.view(torch.int32) for x in (a, b)]
        a, b = as_tf32(a), as_tf32(b)
    else:
        a, b = a.to(getattr(torch, kind)), b.to(getattr(torch, kind))
        bits = [x.view(torch.int16).int() & 0xFFFF for x in (a, b)]
    expected = (d.double() + a.double() @ b.double()).float()
    kernels.product(["bfloat16", "float16", "tf32"].index(kind), 32, *bits, d)
    torch.testing.assert_close(d, expected, rtol=1e-6, atol=1e-6)


def test_a_product_wants_the_whole_warp(kernels: Kernels):
    with pytest.raises(RuntimeError, match=r"mma without lane 31"):
        kernels.product(0, 31, integers(16, 16), integers(16, 8), torch.zeros(16, 8))


@pytest.mark.parametrize("count", [2, 4])
def test_matrices(kernels: Kernels, seed: None, count: int):
    rows = integers(32, 4)
    out = torch.zeros(count, 32, dtype=torch.int32)
    kernels.matrices(count, 32, rows, out)
    named = rows[[5 * i % 32 for i in range(8 * count)]]
    assert torch.equal(out, named.reshape(count, 32))
    with pytest.raises(RuntimeError, match="load_matrices without lane 20, which has returned"):
        kernels.matrices(count, 20, rows, out)


def test_some_threads_wait_for_each_other(kernels: Kernels, seed: None):
    out = torch.zeros(96, dtype=torch.int32)
    kernels.some_numbers(True, 256, 96, 4, out)
    assert torch.equal(out.long(), 6 * ((torch.arange(96) + 40) % 96))
    kernels.some_numbers(False, 256, 96, 4, out)
    assert not torch.equal(out.long(), 6 * ((torch.arange(96) + 40) % 96))
    with pytest.raises(RuntimeError, match="sync_some of 100 threads of 256"):
        kernels.some_numbers(True, 256, 100, 4, out)
    with pytest.raises(RuntimeError, match="sync_some of .* while others wait for|deadlock: 32 "):
        kernels.wait_for_different_numbers()


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_clusters(kernels: Kernels, seed: None, cluster: int):
    values, sums = integers(16, 64), integers(16, 64)
    kernels.cluster_sums(True, 16, cluster, 64, values, sums)
    each = values.view(-1, cluster, 64).sum(1).repeat_interleave(cluster, 0)
    assert torch.equal(sums.long(), each * 10 + (torch.arange(16) % cluster)[:, None])


def test_memory_of_a_block_that_left_its_cluster(kernels: Kernels):
    values, sums = integers(16, 64), integers(16, 64)
    kernels.cluster_sums(False, 16, 4, 64, values, sums)
    each = values.view(-1, 4, 64).sum(1).repeat_interleave(4, 0)
    assert not torch.equal(sums.long() // 10, each)


def test_all_blocks_wait_for_each_other(kernels: Kernels, seed: None):
    numbers, sums = integers(4), integers(5, 4, 64)
    kernels.grid_sums(True, True, 4, 64, 5, numbers, sums)
    assert torch.equal(
        sums, 10 * torch.arange(1, 6, dtype=torch.int32)[:, None, None].expand(5, 4, 64)
    )


def test_a_missing_grid_barrier_shows(kernels: Kernels):
    numbers, sums = torch.zeros(4, dtype=torch.int32), integers(5, 4, 64)
    kernels.grid_sums(False, True, 4, 64, 5, numbers, sums)
    assert not (sums[0] == 10).all()


def test_grid_barriers_need_all_blocks_at_once(kernels: Kernels):
    numbers, sums = integers(5), integers(5, 64)
    with pytest.raises(RuntimeError, match=r"a grid of \(5, 1, 1\) blocks, all at once"):
        kernels.grid_sums(True, True, 5, 64, 1, numbers, sums)
    with pytest.raises(RuntimeError, match="grid_sync in a launch that is not together"):
        kernels.grid_sums(True, False, 4, 64, 1, numbers, sums)


def test_a_block_that_leaves_before_the_others_wait_shows(kernels: Kernels, seed: None):
    with pytest.raises(RuntimeError, match="returned while others wait|after a block has returned"):
        kernels.leave_grid(4)


def test_copies_arrive_with_the_wait(kernels: Kernels, seed: None):
    rows = integers(9, 96, 4)
    out, unwaited = torch.empty_like(rows), torch.empty_like(rows)
    kernels.copy_rows(True, 96, 9, rows, out)
    assert torch.equal(out, rows)
    kernels.copy_rows(False, 96, 9, rows, unwaited)
    assert (unwaited[:2] == -1).all()
    assert not (unwaited == rows).flatten(1).all(1).any()


def test_copies_of_zeros_read_nothing(kernels: Kernels, seed: None):
    rows = integers(96, 4) + 1
    out = torch.empty_like(rows)
    kernels.copy_or_zero(96, rows, out)
    rows[::3] = 0
    assert torch.equal(out, rows)


def test_deadlocks(kernels: Kernels):
    with pytest.raises(RuntimeError, match="deadlock: ") as error:
        kernels.diverging(True)
    assert "63 threads wait in __syncthreads, the first is block (" in str(error.value)
    assert "1 threads wait in __shfl_sync with mask 0xffffffff" in str(error.value)
    assert "thread (7, 0, 0)" in str(error.value)
    with pytest.raises(RuntimeError, match="deadlock: 32 .* __shfl_sync.* 32 .* __shfl_xor_sync"):
        kernels.diverging(False)


def test_writing_behind_shared_memory(kernels: Kernels):
    kernels.write_behind(100, 99)
    for at in (100, 1000):
        with pytest.raises(RuntimeError, match=r"wrote behind the 100 bytes.*block \(1, 0, 0\)"):
            kernels.write_behind(100, at)
    kernels.write_behind(100, 99)


def test_faults(kernels: Kernels):
    out = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="illegal memory access .* thread"):
        kernels.read_null(out)
    kernels.recurse(10, out)
    with pytest.raises(RuntimeError, match="a stack that is full"):
        kernels.recurse(10_000, out)


#  grid, threads, shared memory and how much the kernel may have, cluster and if it may be large
@pytest.mark.parametrize(
    ("launch", "refused"),
    [
        ((7, 1, 1, 1024, 0, 0, 1, False), None),
        ((2, 65535, 1, 1, 0, 0, 1, False), None),
        ((1, 1, 1, 32, 232448, 232448, 1, False), None),
        ((32, 1, 1, 1024, 1000, 1000, 16, True), None),
        ((7, 1, 1, 1025, 0, 0, 1, False), "a block of .1025"),
        ((7, 1, 1, 0, 0, 0, 1, False), "a block of .0"),
        ((0, 1, 1, 32, 0, 0, 1, False), "a grid of .0"),
        ((1, 65536, 1, 32, 0, 0, 1, False), "a grid of .1, 65536"),
        ((1, 1, 65536, 32, 0, 0, 1, False), "a grid of .1, 1, 65536"),
        ((1, 1, 1, 32, 49153, 49152, 1, False), "49153 bytes of shared memory"),
        ((1, 1, 1, 32, 1, 232449, 1, False), "232449 bytes of shared memory"),
        ((16, 1, 1, 32, 0, 0, 16, False), "a cluster of .16"),
        ((17, 1, 1, 32, 0, 0, 17, True), "a cluster of .17"),
        ((6, 1, 1, 32, 0, 0, 4, False), "a grid of .6, 1, 1. blocks in clusters of .4"),
    ],
)
def test_launches(kernels: Kernels, launch: tuple, refused: str | None):
    out = torch.zeros(1, dtype=torch.int32)
    if refused is None:
        kernels.touch(*launch, out)
        assert out == launch[0]
        return
    with pytest.raises(RuntimeError, match=refused):
        kernels.touch(*launch, out)
    assert out == 0


def test_numbers(kernels: Kernels):
    half, tf32 = kernels.library["run_half_to_float"], kernels.library["run_to_tf32"]
    half.restype, tf32.restype = ctypes.c_float, ctypes.c_uint32
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    found = torch.tensor([half(ctypes.c_uint16(i)) for i in range(1 << 16)])
    torch.testing.assert_close(
        found, every.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True
    )
    to_half = kernels.library["run_float_to_half"]
    to_half.restype = ctypes.c_uint16
    halves = every.view(torch.float16).float()
    between = (halves[:-1] + halves[1:]) / 2  # ties, and what lies beside them
    floats = torch.cat([halves, between, between * (1 + 2e-7), between * (1 - 2e-7)])
    found = [to_half(ctypes.c_float(x)) for x in floats.tolist()]
    found = torch.tensor(found, dtype=torch.int32).to(torch.int16).view(torch.float16)
    torch.testing.assert_close(found, floats.half(), rtol=0, atol=0, equal_nan=True)
    for bits, right in [
        (0x3F800FFF, 0x3F800000),
        (0x3F801000, 0x3F802000),  # ties away from zero
        (0xBF801000, 0xBF802000),
        (0x7F800000, 0x7F800000),
        (0x7F7FFFFF, 0x7F800000),
    ]:
        x = torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)
        assert tf32(ctypes.c_float(x.item())) == right
    exp2 = kernels.library["run_exp2"]
    exp2.restype = ctypes.c_float
    for x, right in [(3, 8), (-126, 2**-126), (-127, 0), (-1e30, 0), (1e30, float("inf"))]:
        assert exp2(ctypes.c_float(x)) == right


def test_the_module_builds_and_runs():
    module = emulation.builder().load()
    rows, ids = torch.randn(3, 11, 24), torch.randint(11, (3, 5))
    out = torch.empty(3, 5, 24)
    gather = [rows.data_ptr(), 11 * 24 * 4, 24 * 4, 24 * 4, 4, 4, out.data_ptr()]
    module.gather_tokens(gather, 3, 11, 5, ids.data_ptr(), (0, 0))
    assert torch.equal(out, rows.gather(1, ids[..., None].expand(-1, -1, 24)))
    with pytest.raises(RuntimeError, match="gather_tokens on CUDA device 1"):
        module.gather_tokens(gather, 3, 11, 5, ids.data_ptr(), (1, 0))


def run_kernels(files: list[str], only: str, **variables: str) -> None:
    """Runs tests of the emulated kernels in a process of its own; all of them must pass."""
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", only, *files],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # without the GPU, if there is one: the emulator stands in only where there is none
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "SMA_FAST_REQUIRE": "emulated",
            **variables,
        },
    )
    assert ended.returncode == 0 and " passed" in ended.stdout, ended.stdout[-3000:]


FITS = "test_heads_that_fit_on_every_gpu or in_turns or several_blocks or of_many_candidates"
OF_FITS = ["tests/test_cuda_errors.py", "tests/test_cuda_launches.py"]


def test_the_kernels_of_gpus_without_clusters():
    """As the first architecture that is built has them."""
    masking = ("draw_queries", "self_guided_masking", "random_masking")
    ops = ("attention_scores", "select_tokens", *masking)
    files = [f"tests/test_{op}.py" for op in ops] + OF_FITS
    some = "test_literal or test_cases and float32 or turns or too_long or many_blocks or logits"
    some += " or test_long_rows and 0.15 or test_drawn_tokens_of_long_rows"
    some = f"cuda-emulated and ({some}) or {FITS}"
    run_kernels(files, some, SMA_EMULATED_ARCH="80")


def test_the_kernels_of_gpus_with_little_shared_memory():
    files = [f"tests/test_{op}.py" for op in ("select_tokens", "self_guided_masking")] + OF_FITS
    some = "cuda-emulated and (test_large and float32 or test_long_rows and few and 0.15)"
    some += f" or {FITS}"
    run_kernels(files, some, SMA_EMULATED_ARCH="86", SMA_EMULATED_MULTIPROCESSORS="20")


def test_the_kernels_of_gpus_without_room_for_large_clusters():
    files = [f"tests/test_{op}.py" for op in ("select_tokens", "self_guided_masking")]
    some = "cuda-emulated and (test_large and wide and float32 or test_long_rows and few and 0.15)"
    run_kernels(files, some, SMA_EMULATED_CLUSTER="8")


def test_clusters_of_gpus_in_small_parts():
    parts = {"SMA_EMULATED_MULTIPROCESSORS": "24", "SMA_EMULATED_CLUSTER": "12"}
    run_kernels(["tests/test_cuda_launches.py"], "test_blocks_that_run_at_once", **parts)


OF_OTHER_ORDERS = (  # rows of a warp, of a block and of a cluster; heads and keys that are shared
    "cuda-emulated and (test_literal or test_cases and (float32 or bfloat16)"
    " or test_is_the_three_ops_in_a_row or test_drawn_tokens_of_long_rows or test_many_blocks"
    " or test_long_rows and few and 0.15 or with_several_ids or test_backward_of_one_fill)"
)


@pytest.mark.parametrize("other", SEEDS[1:2])
def test_the_kernels_in_another_order(other: str):
    """A barrier that is missing shows in one order of the threads, and not in another."""
    masking = ("select_tokens", "draw_queries", "self_guided_masking", "random_masking")
    ops = (*masking, "gather_tokens", "restore_tokens")
    files = [f"tests/test_{op}.py" for op in ops]
    run_kernels(files, OF_OTHER_ORDERS, SMA_EMULATED_SEED=other)


def test_the_compiler_s_words_are_in_the_error(tmp_path: Path):
    source = tmp_path / "broken.cu"
    source.write_text("int broken = missing;")
    with pytest.raises(RuntimeError, match="missing.* was not declared"):
        emulation.builder().shared_library("broken", {source: ["-O0"]}, [])
