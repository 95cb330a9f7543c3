"""What the host does for a scan of kernel.py besides launching its kernels: python -m experiments.bench_host [--json FILE]

The launches are left out, and the tensors small and on the CPU, so this needs no GPU: what is measured is the time that PyTorch
and Python take to check, allocate and differentiate, for a layer in a chain of them, forward and backward; as the function that
is used without torch.compile, and as the operator that it takes. They are alternated; medians of five rounds.
"""
import contextlib
import os
import statistics
import time
from pathlib import Path

import torch

from experiments.command import parser, save


def seconds_per_layer(operator, repeats, B=1, T=32, m=16, d=16):
    """operator: as torch.compile would have it, else as it is. The difference of 30 layers and 10, so that what a backward pass
    costs once is left out."""
    import kernel
    call, device_of, compiling = kernel.Launcher.__call__, torch.cuda.device_of, torch.compiler.is_compiling
    theta, phi = torch.rand(2, B, T, m)
    x, h0 = torch.randn(B, T, d, dtype=torch.bfloat16, requires_grad=True), torch.zeros(B, m, d)

    def chain(layers):
        taken = []
        for _ in range(repeats):
            start, y = time.perf_counter(), x
            for _ in range(layers):
                y, _ = kernel.scan_triton(theta, phi, y, h0)
            y.backward(torch.ones_like(x))
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[repeats // 10:])

    try:
        kernel.Launcher.__call__, torch.cuda.device_of = lambda *a: None, lambda x: contextlib.nullcontext()
        torch.compiler.is_compiling = lambda: operator
        return (chain(30) - chain(10)) / 20
    finally:
        kernel.Launcher.__call__, torch.cuda.device_of, torch.compiler.is_compiling = call, device_of, compiling


def main(argv=None):
    p = parser("bench_host", "The host's time for a scan.")
    p.add_argument("--repeats", type=int, default=100)
    p.add_argument("--json", metavar="FILE", type=Path, help="write the figures")
    a = p.parse_args(argv)
    if not 1 <= a.repeats <= 10**6:
        p.error(f"--repeats must be from 1 to 1,000,000, not {a.repeats}")
    os.environ["TRITON_INTERPRET"] = "1"                # before kernel.py is imported
    torch.set_num_threads(1)
    rounds = [[seconds_per_layer(operator, a.repeats) for operator in (False, True)] for _ in range(5)]
    found = dict(zip(("function", "operator"), map(statistics.median, zip(*rounds, strict=True)), strict=True))
    for name, seconds in found.items():
        print(f"{name:9} {1e6 * seconds:6.1f} us per layer, forward and backward")
    save("bench_host", a.json, {k: round(v, 7) for k, v in found.items()})


if __name__ == "__main__":
    main()
