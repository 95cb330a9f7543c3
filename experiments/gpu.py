"""The first half hour on a GPU, in parts of at most ten minutes: python -m experiments.gpu --out DIR [--minutes 8] [--part N]

    1 right      every shipped configuration of the kernels, outputs and all gradients, against float64
    2 races      the same scan again and again beside other work: bit for bit the same
    3 kernels    the time of each kernel, beside that of a copy and of a matrix product
    4 tiles      other tiles, warps and stages: the best of them as code for kernel.py
    5 steps      generation, recorded or joined against single calls: the same tokens, and how fast
    6 training   whole models: the kernels against the other forms, attention, Mamba-2
    7 peers      others' kernels on the same shapes, where they are installed

Each part writes DIR/part-N.json after every row. Nothing stops it: what fails is a row that says so, and so is what there is no
time for. Copied to experiments/results/gpu, the files become tables of docs/speed.md by experiments.report. Without a GPU the
kernels run in Triton's interpreter, with tiny shapes (TRITON_INTERPRET=1), to test this file.
"""
import functools
import platform
import sys
import time
from pathlib import Path

import torch

import fast
from data.messages import one_line
from data.token_files import write_json
from experiments.bench_models import train_step
from experiments.bench_scan import both, ceilings, inputs, least_bytes, specialists
from experiments.command import parser
from experiments.timing import DEVICE, GPU, clock
from fast import check
from fmem import scan
from variants.build import ModelConfig, build

DTYPES = (torch.bfloat16, torch.float16, torch.float32) if GPU else (torch.bfloat16, torch.float32)
DTYPE = torch.bfloat16 if GPU else torch.float32
SHAPE = dict(B=8, T=4096, d=1024) if GPU else dict(B=1, T=40, d=20)
LONG = dict(B=1, T=32768, d=1024) if GPU else dict(B=1, T=140, d=20)     # for which states_kernel has other tiles
ROWS = (64, 256) if GPU else (6,)


class Report:
    """Rows of a part, written to the disk one by one."""

    def __init__(self, folder, number, title, minutes):
        self.path, self.end = folder / f"part-{number}.json", time.monotonic() + 60 * minutes
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        try:
            import triton
            versions["triton"] = triton.__version__
        except ImportError:
            pass
        device = torch.cuda.get_device_name() if GPU else "CPU, Triton's interpreter"
        self.found = {"part": number, "title": title, "device": device, "versions": versions, "rows": []}

    def row(self, name, measure):
        """Call measure() -> {column: value} and keep what it returns, or why it failed."""
        start = time.monotonic()
        if start > self.end:
            got = {"left_out": "no time left"}
        else:
            try:
                got = measure()
            except Exception as e:                      # the next row may work
                got = {"failed": f"{type(e).__name__}: {one_line(e)}"}
        self.found["rows"].append({"name": name, **got, "took": round(time.monotonic() - start, 2)})
        words = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in got.items() if not isinstance(v, dict))
        print(f"  {name}: {', '.join(words)}", flush=True)
        write_json(self.path, self.found)


def kernels():
    import kernel
    return kernel


def right(report):
    """1. Relative errors of every output and gradient, each shipped configuration."""
    shapes = [(16, 1024), (32, 1024), (64, 1024), (80, 48), (256, 384), (512, 4096)] if GPU else [(6, 20)]
    for dtype in DTYPES:
        for m, d in shapes:
            def measure(m=m, d=d, dtype=dtype):
                from fast.step_gpu import step_triton
                errors = dict(check.errors(kernels(), step_triton, DEVICE, m, d, dtype))
                worst = max(errors, key=errors.get)
                return {"right": errors[worst] <= check.TOLERANCE[dtype], "worst": worst, "error": errors[worst]}
            report.row(f"{str(dtype)[6:]} m {m} d {d}", measure)


def races(report):
    """2. How often a scan, forward and backward, differs from its first run, beside products on another stream."""
    for m in (16, 32, 64) if GPU else (6,):
        def measure(m=m):
            leaves, dy = inputs(2, 4 * 64 + 3, m, 128, DTYPE) if GPU else inputs(1, 40, m, 20, DTYPE)
            first, different, n = None, 0, 5000 if GPU else 3
            side, load = (torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE)) if GPU else (None, None)
            for _ in range(n):
                if GPU:
                    with torch.cuda.stream(side):
                        load @ load
                out = scan(*leaves, form="kernel")
                got = [*out, *torch.autograd.grad(out[0], leaves, dy)]
                first = first or got
                different += not all(map(torch.equal, got, first))
            return {"runs": n, "different": different}
        report.row(f"m {m}", measure)


class Timed:
    """Within it, the milliseconds of every launch of kernel.py by name, in `times`."""

    def __enter__(self):
        self.launcher, self.times = kernels().Launcher, {}
        self.call = call = self.launcher.__call__

        def timed(run, name, *args):
            if GPU:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call(run, name, *args)
            if GPU:
                torch.cuda.synchronize()
            self.times.setdefault(name, []).append(1e3 * (time.perf_counter() - start))

        self.launcher.__call__ = timed
        return self

    def __exit__(self, *error):
        self.launcher.__call__ = self.call

    def fastest(self):
        """Of each kernel, the fastest launch: what the host adds is the same for all, some 10 us."""
        return {name: min(some) for name, some in self.times.items()}


def kernel_times(report):
    """3. Milliseconds of each kernel, and the share of the time that reading and writing the least bytes would take."""
    for shape, m in [*((SHAPE, m) for m in ROWS), (LONG, ROWS[0])]:
        def measure(m=m, B=shape["B"], T=shape["T"], d=shape["d"]):
            leaves, dy = inputs(B, T, m, d, DTYPE)
            work = functools.partial(both, functools.partial(scan, form="kernel"), leaves, dy)
            work()
            with Timed() as timed:
                for _ in range(10 if GPU else 1):
                    work()
            whole = clock({"both": work}, 10 if GPU else 1)["both"][0]
            bytes_per_second, flops = ceilings(DTYPE) if GPU else (1e9, 1e9)
            least = least_bytes(B, T, m, d, leaves[2].element_size(), True) / bytes_per_second
            return {**{f"{name} ms": ms for name, ms in timed.fastest().items()}, "both ms": 1e3 * whole,
                    "share of the copy's speed": least / whole, "product TFLOP/s": flops / 1e12}
        report.row(f"B {shape['B']}, T {shape['T']}, m {m}", measure)


def tile_sweep(report):
    """4. Warps and stages of each kernel, one after the other, then chunk and tile: the best, as code."""
    k, m, d = kernels(), (64 if GPU else 16), (1024 if GPU else 32)
    work, long = (functools.partial(both, functools.partial(scan, form="kernel"), *inputs(shape["B"], shape["T"], m, d, DTYPE))
                  for shape in (SHAPE, LONG))
    for name, (_, options) in k.launches(m, d, DTYPE).items():
        def measure(name=name, options=options, work=long if "few" in name else work):
            before, found = dict(options), {}
            for warps in (1, 2, 4, 8) if GPU else (4,):
                for stages in ((1, 2, 3, 4) if "num_stages" in before and GPU else (None,)):
                    options.update(num_warps=warps, **({"num_stages": stages} if stages else {}))
                    try:
                        with Timed() as timed:
                            for _ in range(4 if GPU else 1):
                                work()
                        found[f"num_warps={warps}" + (f", num_stages={stages}" if stages else "")] = timed.fastest()[name]
                    except Exception as e:              # too much shared memory, say
                        found[f"num_warps={warps}, num_stages={stages}"] = one_line(e)
                    options.update(before)
            times = {key: ms for key, ms in found.items() if isinstance(ms, float)}
            best = min(times, key=times.get)
            return {"code": f"{name}: dict(..., {best})", "best ms": times[best], "all": found}
        report.row(name, measure)
    for C, BR, BD in [(C, BR, BD) for C in (32, 64, 128) for BR in (16, 32, 64) for BD in (64, 128)] if GPU else [(16, 16, 16)]:
        def measure(C=C, BR=BR, BD=BD):
            tiles = k.tiles
            try:
                k.tiles = lambda *shape: {**tiles(*shape), "C": C, "BR": BR, "BD": BD}
                k.launches.cache_clear()
                work()
                return {"both ms": 1e3 * clock({"both": work}, 5 if GPU else 1)["both"][0]}
            finally:
                k.tiles = tiles
                k.launches.cache_clear()
        report.row(f"C={C}, BR={BR}, BD={BD}", measure)


def steps(report):
    """5. Tokens per second of generation with and without the faster step, and whether they are the same tokens."""
    size = dict(n_layer=8, d_model=384, n_rows=64, k_rows=16) if GPU else dict(n_layer=1, d_model=32, n_rows=8, k_rows=2)
    model, capture, n = build(ModelConfig(vocab_size=1025, **size)).to(DEVICE).eval(), fast.capture_step, 400 if GPU else 20

    def write(B, temperature):
        """-> tokens [n, B], tokens per second."""
        start, first = time.perf_counter(), torch.zeros(B, 1, dtype=torch.long, device=DEVICE)
        texts = model.generate(first, n, temperature, top_p=0.95, generator=torch.Generator(DEVICE).manual_seed(0))
        made = torch.stack(list(texts)).cpu()           # which waits for a GPU
        return made, B * n / (time.perf_counter() - start)

    def compare(B, temperature):
        made, speed = {}, {}
        try:
            for form in ("single calls", "faster") * 2:     # the first round compiles
                fast.capture_step = capture if form == "faster" else lambda *a: None
                made[form], speed[f"{form} tokens/s"] = write(B, temperature)
        finally:
            fast.capture_step = capture
        return {"same": bool(torch.equal(*made.values())), **speed}

    for B in (1, 64) if GPU else (1, 2):
        for temperature in (0, 0.8):
            report.row(f"B {B}, temperature {temperature}", functools.partial(compare, B, temperature))


def training(report):
    """6. Tokens per second of training steps, context 1024."""
    B, T = (4, 1024) if GPU else (1, 16)
    size = dict(d_model=512, n_layer=8, n_rows=64, k_rows=16)
    if not GPU:
        size = dict(d_model=32, n_layer=1, n_rows=8, k_rows=2, d_state=8)
    tokens = torch.randint(1025, (B, T + 1), device=DEVICE)

    def measure(**options):
        model = build(ModelConfig(vocab_size=1025, **size, **options)).to(DEVICE)
        return {"tokens/s": B * T / clock({"step": functools.partial(train_step, model, tokens)}, 10 if GPU else 2)["step"][0]}

    for form in ("kernel", "fast") if GPU else ("fast", "chunked"):
        report.row(f"memory, form {form}", functools.partial(measure, scan=form))
    for mixer in ("attention", "mamba2"):
        report.row(mixer, functools.partial(measure, mixer=mixer))


def peers(report):
    """7. Milliseconds forward and backward of others' kernels, and of ours."""
    for m in ROWS:
        leaves, dy = inputs(SHAPE["B"], SHAPE["T"], m, SHAPE["d"], DTYPE)
        found, absent = specialists(leaves)
        runs = {"ours": functools.partial(both, functools.partial(scan, form="kernel"), leaves, dy)}
        runs |= {name: functools.partial(both, f, given) for name, (f, given) in found.items()}
        for name, work in runs.items():
            report.row(f"{name}, m {m}", lambda work=work: {"ms": 1e3 * clock({"both": work}, 10 if GPU else 1)["both"][0]})
        for name, why in absent.items():
            report.row(f"{name}, m {m}", lambda why=why: {"absent": why})


PARTS = {1: right, 2: races, 3: kernel_times, 4: tile_sweep, 5: steps, 6: training, 7: peers}


def main(argv=None):
    p = parser("gpu", "The first half hour on a GPU.")
    p.add_argument("--out", metavar="DIR", type=Path, required=True)
    p.add_argument("--minutes", type=float, default=8.0, help="for each part (default: 8)")
    p.add_argument("--part", type=int, choices=PARTS, help="only this one (default: all)")
    a = p.parse_args(argv)
    try:
        if not 0 < a.minutes < 1e6:
            raise ValueError(f"--minutes must be above 0, not {a.minutes}")
        a.out.mkdir(parents=True, exist_ok=True)
        for number in [a.part] if a.part else PARTS:
            part = PARTS[number]
            print(f"{part.__doc__}", flush=True)
            report = Report(a.out, number, part.__name__, a.minutes)
            try:
                part(report)
            except Exception as e:                      # what a part needs before its rows
                report.row("the part", lambda e=e: (_ for _ in ()).throw(e))
    except (ValueError, OSError) as e:
        sys.exit(f"experiments.gpu: error: {one_line(e)}")


if __name__ == "__main__":
    main()
