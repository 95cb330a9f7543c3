"""Estimates, not measurements, of times on a GPU: python -m experiments.estimate [--json FILE]

The scan's kernels (B 8, T 4096, d 1024, m 64, bf16): the bytes of the tensors that each launch is given (read or written once),
the FLOPs of its products, and where it goes token by token the instructions that it executes (results/builds_sm90.json), from
which follows a time on an H100. And the GPU preset of train.py on three cards: time of a step, of the run, and memory.

What is assumed stands below as constants. `python -m experiments.gpu` measures the same on a GPU.
"""
import contextlib
import functools
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.builds import SERIAL
from experiments.command import parser, save
from experiments.tables import table
from training.device import flops_per_token
from training.options import PRESETS
from variants.build import ModelConfig, build, n_parameters

HERE = Path(__file__).resolve().parent
# bytes per second, FLOP/s of dense bf16 products, multiprocessors, cycles per second, bytes of memory, as their makers give them
CARDS = {"RTX 4090": (1.008e12, 165e12, 128, 2.52e9, 24e9), "A100 80 GB": (2.039e12, 312e12, 108, 1.41e9, 80e9),
         "H100": (3.35e12, 989e12, 132, 1.755e9, 80e9)}
BANDWIDTH, PRODUCTS, START = 0.85, 0.5, 3e-6    # what is reached of the first two; seconds until a kernel is under way
LATENCY = 4             # cycles between two instructions of a warp that depend on each other
HOST = 8e-6             # seconds that PyTorch takes to launch a kernel
PER_TOKEN_AND_LAYER = 63.3                      # bytes that autograd keeps, times d_model (docs/scaling.md)
SHAPE = dict(B=8, T=4096, d=1024, m=64)
# arguments that a launch does not touch, since the kernel has another use too
IDLE = {"states": ("w2", "v2"), "products_dy": ("rowdot",), "products_L": ("x", "K")}


def launched(B, T, d, m, C=None):
    """(forward, backward): [(name of a launch, bytes, FLOPs, programs)], in order. C: of other chunks than the shipped ones."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import kernel
    calls, launcher, tiles, device_of = [], kernel.Launcher.__call__, kernel.tiles, torch.cuda.device_of

    def record(run, name, *args):
        function = run.launches[name][0]
        names = [n for n in function.arg_names if n not in ("T", "N", "eps")]
        used = {id(v): v for n, v in zip(names, args, strict=False) if torch.is_tensor(v) and n not in IDLE.get(name, ())}
        options = run.launches[name][1]
        tokens, width = run.B * run.N * run.C, 0
        if name.startswith("states"):
            width = m * (2 if options["BACKWARD"] else 1)
        elif name.startswith("products"):
            width = m + (run.C if options["GRAM"] else 0)
        elif name.startswith("read"):
            width = (m + run.C) * (2 if options["BACKWARD"] else 1)
        calls.append((name, sum(v.numel() * v.element_size() for v in used.values()), 2 * tokens * width * d,
                      run.B * run.N * run.MR))

    theta, x = torch.empty(B, T, m, device="meta"), torch.empty(B, T, d, device="meta", dtype=torch.bfloat16)
    h = torch.empty(B, m, d, device="meta")
    try:
        kernel.Launcher.__call__, torch.cuda.device_of = record, lambda x: contextlib.nullcontext()
        if C:
            kernel.tiles = lambda m, d, dtype: {**tiles(m, d, dtype), "C": C}
        kernel.launches.cache_clear()
        _, _, *kept = kernel.forward(theta, theta.clone(), x, h, 1e-5, False)
        n = len(calls)
        kernel.backward(theta, theta.clone(), x, h, *kept, torch.empty_like(x), h.clone(), 1e-5)
    finally:
        kernel.Launcher.__call__, kernel.tiles, torch.cuda.device_of = launcher, tiles, device_of
        kernel.launches.cache_clear()
    return calls[:n], calls[n:]


def scan_seconds(card, code, B, T, d, m):
    """(forward, backward): a row for each launch of the scan, with its estimate. code: {kernel: what it is compiled to}."""
    forward, backward = launched(B, T, d, m)
    bandwidth, peak, processors, clock, _ = CARDS[card]

    def row(name, moved, flops, programs):
        bounds = {"memory": moved / bandwidth / BANDWIDTH, "products": flops / peak / PRODUCTS}
        if name in SERIAL:
            # of each of the four schedulers of a multiprocessor, and how many of them its registers hold at once
            warps, held = (n * code[name]["warps"] / 4 for n in (programs / processors, 2**16 // code[name]["registers"]))
            bounds["instructions"] = code[name]["executed"] * max(warps, LATENCY * math.ceil(warps / held)) / clock
        bound = max(bounds, key=bounds.get)
        return dict(kernel=name, bytes=moved, flops=flops, bound=bound, seconds=START + bounds[bound])

    return [row(*call) for call in forward], [row(*call) for call in backward]


class Launches(TorchDispatchMode):
    """Counts operators that compute something; those that only look at a tensor in another way launch no kernel."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.n += not func.is_view and "empty" not in func.name() and "detach" not in func.name()
        return out


def launches_of_a_step(preset):
    """How many kernels a training step launches without torch.compile, counted on a CPU: the scan as two operators, which on a
    GPU are as many launches as above. The optimiser's few and the copies of weights to bf16 are left out."""
    fields = {k: v for k, v in preset.items() if k in ("n_layer", "d_model", "n_rows", "k_rows", "dropout")}
    model, tokens = build(ModelConfig(vocab_size=64, **fields)), torch.zeros(1, 33, dtype=torch.long)
    with Launches() as count:
        logits, _ = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    forward, backward = launched(1, 64, preset["d_model"], preset["n_rows"])
    return count.n + preset["n_layer"] * (len(forward) + len(backward) - 2)


def preset_on(card, code, vocab_size=1025):
    """{what: number} of the GPU preset on a card."""
    preset = PRESETS["gpu"]
    bandwidth, peak, _, _, memory = CARDS[card]
    config = ModelConfig(vocab_size=vocab_size, **{k: preset[k] for k in ("n_layer", "d_model", "n_rows", "k_rows")})
    B, T, d, layers = preset["batch_size"], preset["context"], config.d_model, config.n_layer
    tokens, N = B * T, n_parameters(config)
    scan = sum(row["seconds"] for rows in scan_seconds(card, code, B, T, d, config.n_rows) for row in rows)
    kept, logits = PER_TOKEN_AND_LAYER * d * layers * tokens, tokens * vocab_size * (2 + 4 + 4)
    parts = {"products": 6 * N * tokens / peak / PRODUCTS, "scan": layers * scan,
             # what is kept is written once and read twice; each parameter's 16 bytes are read and written
             "other": (3 * (kept + logits) + 32 * N) / bandwidth / BANDWIDTH}
    n = launches_of_a_step(preset)
    step = max(sum(parts.values()), n * HOST)
    used = 16 * N + 2 * N + kept + logits
    return dict(card=card, **{f"{k}_seconds": v for k, v in parts.items()}, launches=n, host_seconds=n * HOST, step_seconds=step,
                run_seconds=step * preset["max_steps"], tokens_per_second=tokens / step,
                share=tokens / step * flops_per_token(config, T) / peak, bytes=used, fits=used < memory)


def tables(found):
    """The Markdown of docs/speed.md, from what --json wrote."""
    rows = [[r["kernel"], f"{r['bytes_before'] / 1e6:,.0f}", f"{r['bytes'] / 1e6:,.0f}",
             f"{r['flops'] / 1e9:.1f}", r["bound"], f"{1e6 * r['seconds']:.0f}"] for r in found["kernels"]]
    for way in ("forward", "backward"):
        rows.append([f"**{way}**", *(f"**{found[way][key] / 1e6:,.0f}**" for key in ("bytes_before", "bytes")), "", "",
                     f"**{1e6 * found[way]['seconds']:.0f}**"])
    cards = [[c["card"], *(f"{1e3 * c[f'{part}_seconds']:.0f}" for part in ("products", "scan", "other", "host", "step")),
              f"{c['run_seconds'] / 60:.1f}", f"{c['share']:.0%}", f"{c['bytes'] / 1e9:.1f}"] for c in found["preset"]]
    return (table(["kernel", "MB, chunks of 32", "MB", "GFLOP", "bound by", "us on an H100, estimated"], rows),
            table(["GPU preset, estimated", "products, ms", "scan", "other", "launches by the host", "a step, ms",
                   "650 steps, minutes", "share of the peak", "memory, GB"], cards))


@functools.cache
def estimates():
    code = {row["kernel"]: row for row in json.loads((HERE / "results/builds_sm90.json").read_text(encoding="utf-8"))}
    found = {"shape": SHAPE, "kernels": []}
    now, before_now = scan_seconds("H100", code, **SHAPE), launched(**SHAPE, C=32)
    for way, rows, before in zip(("forward", "backward"), now, before_now, strict=True):
        for row, (_, moved, *_) in zip(rows, before, strict=True):
            row["bytes_before"] = moved
        found["kernels"] += rows
        found[way] = {key: sum(row[key] for row in rows) for key in ("bytes", "bytes_before", "seconds")}
    return {**found, "preset": [preset_on(card, code) for card in CARDS]}


def main(argv=None):
    p = parser("estimate", "Estimate times on a GPU.")
    p.add_argument("--json", metavar="FILE", type=Path, help="write the figures")
    a = p.parse_args(argv)
    found = estimates()
    print(*tables(found), sep="\n")
    save("estimate", a.json, found)


if __name__ == "__main__":
    main()
