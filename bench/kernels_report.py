"""Registers, shared memory and spills of every kernel: `python -m bench.kernels_report`.

Shared memory is what a launch asks for; of CUDA's kernels only what they have without asking. Needs
no GPU: what Triton and nvcc compile is for architectures that are not here. Ends with status
1 where a kernel spills registers or keeps an array in local memory, of more bytes than `--allow`.
"""

import argparse
import sys
from collections.abc import Sequence

from bench import cubins, kernels_cuda


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels_report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("compiler", nargs="?", choices=("triton", "cuda"), help="default: both")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels with this in the name")
    parser.add_argument(
        "--architectures",
        nargs="+",
        default=[],
        metavar="N",
        help="such as 80 90a (default: Triton's 80 90 100; CUDA's 80, 90a and nvcc's newest)",
    )
    parser.add_argument(
        "--allow", type=int, default=0, metavar="BYTES", help="of a kernel, spilled (default: 0)"
    )
    options = parser.parse_args(arguments)
    found = []
    if options.compiler != "cuda":
        from bench import kernels_triton

        numbers = [int(name.rstrip("af")) for name in options.architectures]
        found.append(kernels_triton.rows(options.only, numbers or kernels_triton.ARCHITECTURES))
    missing = options.compiler != "triton" and cubins.find_nvcc() is None
    if options.compiler != "triton" and not missing:
        found.append(kernels_cuda.rows(options.only, options.architectures))
    if missing:
        print("no nvcc on PATH or in CUDA_HOME: CUDA's kernels are left out\n")
    print("| kernel | architecture | registers | shared bytes | spilled bytes |")
    print("|---|---|---|---|---|")
    most = 0  # bytes that a kernel spills
    for rows in found:
        for name, architecture, usage in rows:
            most = max(most, usage.spilled_bytes)
            row = (name, architecture, usage.registers, usage.shared_bytes, usage.spilled_bytes)
            print(f"| {' | '.join(map(str, row))} |", flush=True)
    return int(most > options.allow or (missing and options.compiler == "cuda"))


if __name__ == "__main__":
    sys.exit(main())
