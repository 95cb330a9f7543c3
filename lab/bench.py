"""Relative speed, measured in one process: python -m lab.bench scan [--device cuda]

    scan        the scan alone, forward and backward: as a loop and in chunks; on a GPU also
                without the kernel, and under torch.compile
    train       forward and backward of 4,096 tokens, by context, for the memory and the baselines
    generate    the time per token, and the bytes of the state, by the length of the context

The alternatives take turns in one process, and the median over the turns counts, so that a busy
machine slows all of them alike. First, each scan is compared with the loop, gradients included.
"""

import argparse
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import fmem
from lab.layers import Attention, ExtendedMemory, Mamba2, matched_d_mlp
from train import one_line_errors

MODELS = {
    "paper": (fmem.FactorizationMemory, {}),
    "ours": (ExtendedMemory, {"conv": 4, "gate": True, "shared_row": True, "shift": True}),
    "transformer": (Attention, {}),
    "transformer+conv": (Attention, {"conv": 4}),
    "mamba2": (Mamba2, {}),
}
SCANS = [(8, T, 64, 256) for T in (256, 1024, 4096)]  # B, T, m, d
SHAPE = {"d_model": 256, "n_layer": 4, "n_rows": 64, "k_rows": 16}  # of the models
TOKENS = 4096  # per training step
TRAIN_CONTEXTS = (256, 512, 1024, 2048, 4096)
GENERATE_CONTEXTS = (1024, 4096, 16384, 65536, 131072)
TURNS = {"scan": 7, "train": 7, "generate": 50}


def processor():
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def alternate(functions, turns, device):
    """Call the functions {name: f} in turn -> {name: median seconds}. The first turn warms up."""
    seconds = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(times), 7) for name, times in seconds.items()}


def measure(functions, beside, device, args, **about):
    """Time the functions, print them relative to the one named `beside`, and write a JSON line."""
    seconds = alternate(functions, TURNS[args.bench], device)
    print(args.bench, about, flush=True)
    for name, value in seconds.items():
        print(f"    {name:28}{value / seconds[beside]:8.2f}{1e3 * value:12.3f} ms")
    line = {"bench": args.bench, "date": time.strftime("%Y-%m-%d"), **about, "seconds": seconds}
    line["device"] = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    line |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    with open(args.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def scan_arguments(B, T, m, d, device):
    """theta, phi and xbar like those of a trained layer: sharp affinities, and theta of 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    alpha = torch.softmax(4 * torch.randn(B, T, m, generator=generator), -1)
    theta = alpha * torch.rand(B, T, 1, generator=generator)
    theta[:, ::7] = theta[:, ::7].round()
    phi = alpha * torch.rand(B, T, 1, generator=generator)
    xbar = torch.randn(B, T, d, generator=generator)
    return [v.to(device).requires_grad_() for v in (theta, phi, xbar)]


def forward_backward(scan, arguments):
    """The read, and the gradients of all arguments."""
    y = scan(*arguments)[0]
    return [y.detach(), *torch.autograd.grad(y.sum(), arguments)]


def scan_implementations(device):
    """{name: implementation of the scan}. Raises ValueError if one does not match the loop."""
    forms = {"loop": fmem.scan_loop, "chunked": fmem.scan_chunked}
    if device.type == "cuda":
        forms["chunked, no kernel"] = mock.patch.object(fmem, "kernel", None)(fmem.scan_chunked)
        forms["chunked, compiled"] = torch.compile(fmem.scan_chunked)
    arguments = scan_arguments(2, 100, 16, 32, device)
    expected = forward_backward(fmem.scan_loop, arguments)
    for name, scan in forms.items():
        for got, want in zip(forward_backward(scan, arguments), expected, strict=True):
            error = ((got - want).norm() / want.norm()).item()
            if not error < 1e-4:  # float32 rounds to a hundredth of that
                raise ValueError(f"the scan {name!r} is wrong by {error:.1e}; nothing was timed")
    return forms


def bench_scan(device, args):
    forms = scan_implementations(device)
    for B, T, m, d in SCANS:
        arguments = scan_arguments(B, T, m, d, device)
        if B * T * m * d > 2**28:  # the loop stores several times that for its gradient
            forms.pop("loop", None)
        runs = {name: partial(forward_backward, scan, arguments) for name, scan in forms.items()}
        measure(runs, "chunked", device, args, B=B, T=T, m=m, d=d)


def make_models(device):
    """{name: model} for MODELS, all with as many parameters as the paper's."""
    models = {}
    for name, (layer, arguments) in MODELS.items():
        d_mlp = matched_d_mlp(fmem.FMemConfig(**SHAPE), layer, arguments)
        config = fmem.FMemConfig(**SHAPE, d_mlp=d_mlp)
        models[name] = fmem.FMem(config, layer, arguments).to(device)
    return models


def training_step(model, tokens):
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits, _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    model.zero_grad()
    loss.backward()


def bench_train(device, args):
    scan_implementations(device)
    models = make_models(device)
    for T in TRAIN_CONTEXTS:
        tokens = torch.randint(1000, (TOKENS // T, T + 1), device=device)
        runs = {name: partial(training_step, model, tokens) for name, model in models.items()}
        if device.type == "cuda":
            for name, model in models.items():
                runs[f"{name}, compiled"] = partial(training_step, torch.compile(model), tokens)
        measure(runs, "transformer", device, args, context=T, **SHAPE)


def state_after(model, context, device):
    """A state as large and costly as after `context` tokens; attention's cache is random."""
    _, state = model(torch.zeros(1, device=device, dtype=torch.long))
    if model.layer_name != "Attention":
        return state
    shape = (*state[0][0].shape[:3], context, state[0][0].shape[4])
    return [(torch.randn(shape, device=device), context, past) for _, _, past in state]


def count_bytes(state):
    return sum(part.nbytes for part in pytree.tree_leaves(state) if torch.is_tensor(part))


def stepper(model, state, device):
    """A function that reads one more token per call, from the state after the previous call."""
    token = torch.zeros(1, device=device, dtype=torch.long)

    @torch.inference_mode()
    def step():
        nonlocal state
        _, state = model(token, state)

    return step


@torch.inference_mode()
def bench_generate(device, args):
    models = make_models(device)
    for context in GENERATE_CONTEXTS:
        runs = {}
        sizes = {}
        for name, model in models.items():
            state = state_after(model, context, device)
            sizes[name] = count_bytes(state)
            runs[name] = stepper(model, state, device)
            if device.type == "cuda":
                state = state_after(model, context, device)
                runs[f"{name}, compiled"] = stepper(torch.compile(model), state, device)
        measure(runs, "paper", device, args, context=context, **SHAPE, state_bytes=sizes)


BENCHES = {"scan": bench_scan, "train": bench_train, "generate": bench_generate}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m lab.bench", description="Measure speed.")
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", default="bench.jsonl", help="file to append to (bench.jsonl)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU; use --device cpu")
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    with one_line_errors("lab.bench"):
        BENCHES[args.bench](torch.device(args.device), args)


if __name__ == "__main__":
    main()
