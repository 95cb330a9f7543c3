"""Speed of the scan in all its forms, its growth and a step: python -m experiments.bench_scan

Everything compared is alternated within one process and the median taken; [low-high] is the middle half of the repetitions.
Ratios from one run mean something on any quiet machine, absolute times only on a named GPU. The ceilings of the roofline, bytes
per second and FLOPs per second, are measured here too, by a large copy and large matrix products. On a GPU the specialists are
timed on the same shapes where they can be imported: flash-linear-attention's chunk_gla (the same recurrence without the row
norm), Mamba-2's chunk scan, PyTorch's attention.
"""
import argparse
import functools
import importlib
import os

import torch
import torch.nn.functional as F

import fast
from experiments.timing import DEVICE, GPU, clock, in_a_process, measure_peak, run_tables, show, show_beside
from fast.chunked import piece_size
from fmem import PREFILL, FactorizationMemory, FMem, FMemConfig, scan


def inputs(B, T, m, d, dtype=torch.float32, k=None, device=DEVICE):
    """theta, phi, x, h0 of a memory that routes sharply (about a third of the weight on the first row), and dy."""
    g = torch.Generator().manual_seed(0)
    alpha = torch.softmax(torch.randn(B, T, m, generator=g) * 3, -1)
    if k:
        alpha = torch.zeros_like(alpha).scatter(-1, *alpha.topk(k, -1)[::-1])
    theta = torch.rand(B, T, 1, generator=g) * alpha
    x, dy = torch.randn(2, B, T, d, generator=g)
    leaves = [v.to(device).requires_grad_() for v in (theta, alpha, x.to(dtype), torch.zeros(B, m, d))]
    return leaves, dy.to(device, dtype)


def forward(f, leaves):
    with torch.no_grad():
        return f(*leaves)


def both(f, leaves, dy=None):
    y = f(*leaves)[0]
    torch.autograd.grad(y, leaves, torch.ones_like(y) if dy is None else dy, allow_unused=True)


# --------------------------------------------------------------------------------------- what must be computed and moved

def flops(B, T, m, d, C, backward):
    """Of the matrix products with d in them, which are nearly all of the work: 3 m + 2 C multiply-adds per number of x in the
    forward pass (write, S, read; K, A x), 9 m + 5 C in both directions."""
    return 2 * B * T * d * ((9 * m + 5 * C) if backward else (3 * m + 2 * C))


def least_bytes(B, T, m, d, size, backward):
    """That a scan must move if nothing but its arguments and results touched memory: x, y, theta, phi and h (both ends);
    backward: again x, theta, phi, and dy, and their gradients."""
    gates, rows, state = 2 * B * T * m * 4, B * T * d * size, 2 * B * m * d * 4
    return (gates + 2 * rows + state) + ((2 * gates + 3 * rows + state) if backward else 0)


def ceilings(dtype):
    """(bytes per second of a copy, both directions counted; FLOPs per second of a matrix product in this dtype)."""
    n = 2**28 if GPU else 2**25
    a, b = torch.ones(n, device=DEVICE), torch.ones(n, device=DEVICE)
    size = 8192 if GPU else 2048
    u, v = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    t = clock({"copy": lambda: b.copy_(a), "product": lambda: u @ v}, 7)
    return 8 * n / t["copy"][0], 2 * size**3 / t["product"][0]


def own_products(B, T, m, d, C=32):
    """A function that does the matrix products of form "fast", forward and backward, and nothing else: the same shapes,
    dtypes and number, in a row."""
    theta = torch.empty(B, T, m, device=DEVICE)
    G, N = min(piece_size(theta, C), T // C), T // C
    pieces, b = -(-N // G), G * B
    f32 = {"x": (b, C, d), "H": (b, m, d), "w": (b, C, m), "A": (b, C, C), "xdy": (b, 2 * C, d), "W": (b, 2 * C, m),
           "A2": (b, 2 * C, C)}
    sets = [{name: torch.randn(shape, device=DEVICE) for name, shape in f32.items()} for _ in range(pieces)]
    for s in sets:
        s.update({name + "64": s[name].double() for name in ("w", "A", "W", "A2")})

    def run():
        for s in sets:
            x, H, w, A, xdy, W, A2 = (s[name] for name in f32)
            w64, A64, W64, A264 = (s[name + "64"] for name in ("w", "A", "W", "A2"))
            w.mT @ x, x @ x.mT, x @ H.mT, A64 @ w64, w64 @ w64.mT, w @ H, A @ x         # forward, then backward
            xdy @ x.mT, xdy @ H.mT, A264 @ w64, W.mT @ xdy, W64 @ w64.mT, w @ H, A2.mT @ xdy, w @ H, A @ x, x @ H.mT
            A264.mT @ W64

    return run


# ------------------------------------------------------------------------------------------------------------- the tables

def forms(m, d, compile=False):
    """The forms of the scan that run here, by name, the slowest last."""
    names = ["kernel"] * (fast.choose("auto", DEVICE, m, d)[0] == "kernel") + ["fast", "chunked"]
    found = {name: functools.partial(scan, form=name) for name in names}
    if compile and compiled():
        found["compiled"] = compiled()
    return {**found, "loop": functools.partial(scan, form="loop")}


@functools.cache
def compiled():
    """torch.compile of the form "fast"; None, with a line that says why, where it does not work."""
    try:
        f, (leaves, dy) = torch.compile(functools.partial(scan, form="fast")), inputs(1, 8, 4, 8)
        both(f, leaves, dy)
        return f
    except Exception as e:
        print(f"absent: compiled ({type(e).__name__})")
        return None


def specialists(leaves):
    """Others' kernels on the same shapes as theta, phi, x {name: (function, inputs)}, and those absent {name: why}."""
    theta, phi, x = (v.detach() for v in leaves[:3])
    (B, T, m), d, dtype = theta.shape, x.shape[2], x.dtype

    def leaf(*shape):
        return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()

    def chunk_gla():
        given = phi.to(dtype), theta.to(dtype), x, torch.log1p(-theta.clamp(max=1 - 1e-6))
        given = [v[:, :, None].contiguous().requires_grad_() for v in given]                # one head
        return functools.partial(importlib.import_module("fla.ops.gla").chunk_gla, scale=1.0), given

    def mamba2():
        chunk_scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        rate, decay = torch.rand(B, T, d // 64, device=DEVICE), -torch.rand(d // 64, device=DEVICE)
        given = leaf(B, T, d // 64, 64), rate.requires_grad_(), decay.requires_grad_(), leaf(B, T, 1, m), leaf(B, T, 1, m)
        return lambda *a: (chunk_scan(*a, chunk_size=256),), given

    def attention():
        return lambda *a: (F.scaled_dot_product_attention(*a, is_causal=True),), [leaf(B, d // 64, T, 64) for _ in range(3)]

    found, absent = {}, {}
    for make in (chunk_gla, mamba2, attention):
        try:
            if not GPU:
                raise RuntimeError("timed on a GPU only")
            f, given = make()
            both(f, given)
            found[make.__name__] = f, given
        except Exception as e:                                  # not installed, or not for this shape: named, not hidden
            absent[make.__name__] = (str(e).splitlines() or [type(e).__name__])[0]
    return found, absent


def table_forms(quick):
    """(a) The forms of the scan against each other."""
    rows, dtype = [], torch.bfloat16 if GPU else torch.float32
    B, d = (8, 1024) if GPU else (8, 256)
    bandwidth, peak = ceilings(dtype)
    print(f"ceilings: {bandwidth / 1e9:.0f} GB/s, {peak / 1e12:.2f} TFLOP/s in {str(dtype)[6:]}")
    shapes = [(T, m) for m in (16, 64, 256) for T in (256, 1024, 4096, 8192)]
    for T, m in [(64, 16)] if quick else shapes:
        leaves, dy = inputs(B, T, m, d, dtype)
        ours = forms(m, d, compile=not quick)
        if B * T * m * d > (2**31 if GPU else 2**27):           # these two keep more than there may be room for
            ours.pop("loop")
        if B * T * m > (2**25 if GPU else 2**21):
            ours.pop("chunked")
        others, absent = specialists(leaves)
        repeats = 3 if quick else 7
        for direction in ("forward", "both"):
            if direction == "forward":
                runs = {name: functools.partial(forward, scan, leaves) for name, scan in ours.items()}
                runs |= {name: functools.partial(forward, scan, given) for name, (scan, given) in others.items()}
            else:
                runs = {name: functools.partial(both, scan, leaves, dy) for name, scan in ours.items()}
                runs |= {name: functools.partial(both, scan, given) for name, (scan, given) in others.items()}
                if not GPU:
                    runs["products"] = own_products(B, T, m, d)
            loop = {"loop": runs.pop("loop")} if "loop" in runs else {}
            times = clock(runs, repeats)
            if loop:                                            # so slow that a few are enough; still next to the others
                times |= clock({**loop, "again": runs["fast"]}, 3)
            back, size = direction == "both", 2 if GPU else 4
            row = dict(table="forms", B=B, T=T, m=m, d=d, dtype=str(dtype)[6:], direction=direction, absent=absent,
                       seconds={k: v for k, v in times.items() if k != "again"})
            best = "kernel" if "kernel" in times else "fast"
            C = 64 if best == "kernel" else 32
            row["share_of_roofline"] = max(least_bytes(B, T, m, d, size, back) / bandwidth,
                                           flops(B, T, m, d, C, back) / peak) / times[best][0]
            if loop:
                row["loop_over_fast"] = times["loop"][0] / times["again"][0]
            for over in ("products", "kernel", *others):
                if over in times:
                    row[f"fast_over_{over}"] = times["fast"][0] / times[over][0]
            for name in ("chunked", "compiled"):
                if name in times:
                    row[f"{name}_over_fast"] = times[name][0] / times["fast"][0]
            rows.append(row)
            print(f"T {T:5d} m {m:4d} {direction:8s}" + "".join(f"  {k} {show(v)}" for k, v in row["seconds"].items())
                  + "".join(f"  {k} {v:.2f}" for k, v in row.items() if isinstance(v, float)), flush=True)
    for name, why in rows[-1]["absent"].items():
        print(f"absent: {name} ({why})")
    return rows


def peak_memory(form, T, m, direction):
    """Bytes that a form needs at most beyond its arguments, in a process of its own."""
    return in_a_process(f"bench_scan.print_peak({form!r}, {T}, {m}, {direction!r})")


def print_peak(form, T, m, direction):
    d = 1024 if GPU else 256
    f = forms(m, d)[form]
    for tokens in (32, T):                                      # the first to warm up
        leaves, dy = inputs(8, tokens, m, d, torch.bfloat16 if GPU else torch.float32)
        peak = measure_peak(lambda: forward(f, leaves) if direction == "forward" else both(f, leaves, dy))  # noqa: B023
    print(peak)


def print_prompt_peak(T):
    model = FMem(FMemConfig(vocab_size=1025, d_model=64, n_layer=2, n_rows=16, k_rows=4)).to(DEVICE).eval()
    for tokens in (PREFILL, T):
        prompt = torch.zeros(1, tokens, dtype=torch.long, device=DEVICE)
        peak = measure_peak(lambda: list(model.generate(prompt, 2)))   # noqa: B023
    print(peak)


def table_memory(quick):
    """(a) Peak memory of the scan, and of a prompt by its length (beyond what a prompt of 4,096 tokens has left allocated)."""
    if not GPU and not os.path.exists("/proc/self/clear_refs"):
        print("peak memory: only on Linux")
        return []
    T, m = (64, 16) if quick else (1024, 64)
    rows = []
    for direction in ("both",) if quick else ("forward", "both"):
        row = dict(table="memory", T=T, m=m, direction=direction)
        for name in ("fast", "loop") if quick else forms(m, 1024 if GPU else 256):
            row[name] = peak_memory(name, T, m, direction)
        row["loop_over_fast"] = row["loop"] / row["fast"]
        rows.append(row)
        print(f"memory {direction:8s}" + "".join(f"  {k} {v / 2**20:.0f} MiB" for k, v in row.items() if isinstance(v, int)
                                                 and k not in ("T", "m")) + f"  loop/fast {row['loop_over_fast']:.1f}")
    lengths = (2**13,) if quick else (2**14, 2**20)
    row = dict(table="prompt", bytes={str(T): in_a_process(f"bench_scan.print_prompt_peak({T})") for T in lengths})
    rows.append(row)
    print("memory for a prompt" + "".join(f"  {int(T):,} tokens {v / 2**20:.1f} MiB" for T, v in row["bytes"].items()))
    return rows


def table_growth(quick):
    """(b) How the time of the scan grows with T, m, k and d, each from the same middle."""
    middle = dict(T=128, m=16, d=32) if quick else dict(T=1024, m=64, d=1024 if GPU else 256)
    rows = []
    name = next(iter(forms(middle["m"], middle["d"])))
    scan = forms(middle["m"], middle["d"])[name]
    for what, factors in (("T", (1, 2, 4, 8)), ("m", (0.25, 0.5, 1, 2, 4)), ("k", (0.0625, 0.25, 1)), ("d", (0.25, 0.5, 1, 2))):
        runs = {}
        for factor in factors:
            shape = dict(middle, **{what: int(middle["m" if what == "k" else what] * factor)})
            runs[shape[what]] = functools.partial(both, scan, *inputs(4, dtype=torch.bfloat16 if GPU else torch.float32, **shape))
        times = clock(runs, 3 if quick else 7)
        rows.append(dict(table="growth", form=name, what=what, middle=middle, B=4, seconds={str(k): v for k, v in times.items()}))
        print(f"{name}, forward and backward, by {what}: " + show_beside(times, next(iter(times))), flush=True)
    return rows


def table_step(quick):
    """(c) One step of the memory layer, by k; and of a whole model, after a context of 1k to 128k tokens."""
    rows, repeats = [], 5 if quick else 400
    d = 64 if quick else 1024 if GPU else 512
    for B in (1, 64):
        for m in (64, 256):
            layers = {k or m: FactorizationMemory(FMemConfig(d_model=64, d_memory=d, n_rows=m, k_rows=k)).to(DEVICE)
                      for k in (4, 16, None)}
            x, h = torch.randn(B, 64, device=DEVICE), torch.zeros(B, m, d, device=DEVICE)
            with torch.no_grad():
                times = clock({k: functools.partial(layer.step, x, h) for k, layer in layers.items()}, repeats)
            rows.append(dict(table="step", B=B, m=m, d=d, seconds={str(k): v for k, v in times.items()}))
            print(f"step of a layer, B {B} m {m} d {d}, by k: " + show_beside(times, m), flush=True)
    small = dict(d_model=32, n_layer=1, n_rows=8, k_rows=2) if quick else dict(d_model=256, n_layer=4, n_rows=64, k_rows=16)
    model = FMem(FMemConfig(vocab_size=1025, **small)).to(DEVICE).eval()
    contexts = (64, 256) if quick else (1024, 16384, 131072)
    for B in (1, 64):
        ends = {}
        with torch.no_grad():
            for context in contexts:                            # the state after a context of that length
                state, g = None, torch.Generator().manual_seed(0)
                for start in range(0, context, 1024):
                    tokens = torch.randint(1025, (1, min(1024, context - start)), generator=g).to(DEVICE)
                    state = model.hidden(tokens, state)[1]
                ends[context] = [h.repeat(B, 1, 1) for h in state]
            token = torch.zeros(B, dtype=torch.long, device=DEVICE)
            times = clock({c: functools.partial(model, token, s) for c, s in ends.items()}, repeats)
        flat = times[contexts[-1]][0] / times[contexts[0]][0]
        rows.append(dict(table="context", B=B, **small, seconds={str(k): v for k, v in times.items()}, last_over_first=flat))
        print(f"step of a model, B {B}, after tokens: {show_beside(times, contexts[0])}  last/first {flat:.3f}", flush=True)
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m experiments.bench_scan", description="Measure the speed of the scan and a step.")
    p.add_argument("--out", default="bench_scan.json", help="file for the figures (default: bench_scan.json)")
    p.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    run_tables(p, argv, (table_forms, table_memory, table_growth, table_step), "bench_scan")


if __name__ == "__main__":
    main()
