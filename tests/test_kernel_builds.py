"""kernel.py compiled for GPUs that are not here: registers, spills, shared memory."""
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, SHIPPED, SLOW, kernel, needs_triton, triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump" if triton else None


def shapes(capability):
    """What is compiled: everything for sm_90; for the others everything with FMEM_SLOW, else a shape for each dtype and the
    largest."""
    return SHIPPED if SLOW or capability == 90 else [shape for shape in SHIPPED if shape[1] in (64, 512)]


def compile_kernels(*capabilities):
    """Prints a line of JSON for every kernel and shape: registers of a program, bytes of local (that is: spilled) and of shared
    memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    name = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    for capability, dtype, m, d in [(c, *shape) for c in capabilities for shape in shapes(c)]:
        low = "*bf16" if dtype == torch.bfloat16 else "*fp32"
        types = {**dict.fromkeys("write w1 w2 wF qF states states1 states2".split(), low),
                 **dict.fromkeys("x v v1 v2 out y".split(), name[dtype]), "T": "i32", "N": "i32", "eps": "fp32", "rows": "*i64"}
        step = dict(m=m, d=d, k=m // 4, DENSE=False, **kernel.step_tiles(m // 4, d))
        for label, (function, options) in {**kernel.launches(m, d, dtype), "step": (kernel.step_kernel, step)}.items():
            launch = {k: options[k] for k in ("num_warps", "num_stages") if k in options}
            constants = {k: v for k, v in options.items() if k not in launch}
            signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in function.arg_names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(function.arg_names) if signature[n].startswith("*")}
            source = ASTSource(function, signature, {(function.arg_names.index(k),): v for k, v in constants.items()}, aligned)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
            binary = Path(os.environ["TRITON_CACHE_DIR"], f"{capability}.cubin")
            binary.write_bytes(compiled.asm["cubin"])
            done = subprocess.run([CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True)
            use = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
            print(json.dumps({"capability": capability, "kernel": label, "dtype": str(dtype), "m": m, "d": d,
                              "registers": use["REG"] * 32 * launch["num_warps"],
                              "spilled": use["STACK"] + use["LOCAL"], "shared": compiled.metadata.shared}))


def start_builds(folder):
    """Compiles everything in a process of its own, at low priority: the session starts it and the test below, the last one to
    run, awaits it."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    code = "import os; os.nice(10); from tests.test_kernel_builds import compile_kernels; compile_kernels(90, 89, 80)"
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=env, stdout=out, stderr=err)


@needs_triton
def test_kernels_compile_without_spills_in_99_kb(builds):
    """For sm_80, sm_89 and sm_90, on a machine without a GPU (and not in the interpreter, hence a process of its own)."""
    if tuple(int(v) for v in triton.__version__.split(".")[:2]) < (3, 3):
        pytest.skip(f"compiling without a GPU is asked for in another way in Triton {triton.__version__}")
    if not CUOBJDUMP.exists():
        pytest.skip("Triton comes without NVIDIA's tools here")
    process, folder = builds
    assert process.wait() == 0, (folder / "err").read_text()
    rows = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    assert Counter(row["capability"] for row in rows) == {c: 14 * len(shapes(c)) for c in (80, 89, 90)}
    # Triton 3.9 spills nothing, 3.7 one register (8 bytes) in two of these kernels.
    assert not [row for row in rows if row["spilled"] > 8 or row["shared"] > 99 * 1024 or row["registers"] > 65536]
