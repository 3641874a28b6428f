"""What a call costs beside its work: microseconds on a 2 x 16 input, and the peak memory of long.

Triton's and CUDA's launches are counted in, as everything before them.
"""

from bench import bench_select_tokens, bench_self_guided_masking, harness


def bench_select_tokens_fixed_cost(measure, settings):
    case = bench_select_tokens.set_up(settings, "2x16")
    measure(harness.fixed_cost(case, "fixed cost"))


def bench_self_guided_masking_fixed_cost(measure, settings):
    case = bench_self_guided_masking.set_up(settings, "2x16")
    measure(harness.fixed_cost(case, "fixed cost"))


def bench_self_guided_masking_fixed_cost_drawn(measure, settings):
    case = bench_self_guided_masking.set_up(settings, "2x16", drawn=True)
    measure(harness.fixed_cost(case, "fixed cost, drawn"))


def bench_self_guided_masking_peak_memory(benchmark, settings):
    harness.measure_memory(benchmark, settings, "self_guided_masking", "long")
