"""Clocks and memory meters for the benchmarks. Candidates are alternated within one process, medians compared."""
import json
import platform
import statistics
import subprocess
import sys
import time
from importlib import import_module, util
from pathlib import Path

import torch

from data.messages import one_line, printable

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
ROOT = Path(__file__).resolve().parent.parent


def clock(runs, repeats, device=DEVICE):
    """Seconds of each function in runs {name: f}, alternated: {name: (median, low, high)}; the first round is not counted."""
    times = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, f in runs.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            f()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - start)
    quarters = {name: statistics.quantiles(t, n=4) if len(t) > 1 else [t[0]] * 3 for name, t in times.items()}
    return {name: (q[1], q[0], q[2]) for name, q in quarters.items()}


def show(t):
    return f"{t[0] * 1e3:.2f} [{t[1] * 1e3:.2f}-{t[2] * 1e3:.2f}] ms"


def show_beside(times, name):
    """Every time, and in brackets its ratio to the one of that name."""
    return "  ".join(f"{k}: {show(t)} ({t[0] / times[name][0]:.2f})" for k, t in times.items())


def in_a_process(call):
    """The number that the function call `call`, "module.function(...)" of this folder, prints in a process of its own."""
    code = f"from experiments import bench_models, bench_scan; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout)


def measure_peak(f):
    """Bytes used at most while f() runs, beyond those before it."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:           # the high-water mark starts again
        reset.write("5")
    f()
    return resident("VmHWM") - before


def resident(which):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(which))


def run_tables(p, argv, tables, name):
    """The main function of a benchmark: runs every table and writes the figures to --out after each."""
    p.error = lambda message: p.exit(2, f"{name}: error: {one_line(message)}; --help lists the options\n")
    a = p.parse_args(argv)
    try:
        with open(a.out, "a"):                                  # fails now rather than after minutes of measuring
            pass
    except (OSError, ValueError) as e:
        sys.exit(f"{name}: error: --out: {one_line(e)}")
    torch.set_flush_denormal(True)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if util.find_spec("triton"):
        versions["triton"] = import_module("triton").__version__
    cpu = f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    where = torch.cuda.get_device_name() if GPU else cpu
    print(f"{where}; " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    result = dict(device=where, versions=versions, rows=[])
    wanted = getattr(a, "table", None)
    for table in [table for table in tables if table.__name__ == f"table_{wanted}"] if wanted else tables:
        print(f"\n{table.__doc__}")
        result["rows"] += table(a.quick)
        with open(a.out, "w") as f:
            json.dump(result, f, indent=1)
    print(printable(f"\nwritten to {a.out}"))
