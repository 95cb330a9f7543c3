"""kernel.py compiled for GPUs that are not here: registers, spills, shared memory."""
import json
import operator
import os
import subprocess
import sys
from collections import Counter

import pytest

from experiments.builds import build, tool
from tests.helpers import ROOT, SHIPPED, SLOW, needs_triton, triton

CUOBJDUMP = tool("cuobjdump") if triton else None
CAPABILITIES = (90, 80, 89, 100, 120)       # Hopper, Ampere, Ada, and Blackwell's two kinds
if triton and triton.__version__.startswith("3.2."):
    CAPABILITIES = CAPABILITIES[:3]         # it knows no Blackwell


def shapes(capability):
    """What is compiled: everything for sm_90; for the others everything with FMEM_SLOW, else a shape for each dtype and the
    largest, without the kernels of generation."""
    return SHIPPED if SLOW or capability == 90 else [shape for shape in SHIPPED if shape[1] in (64, 512)]


def compile_kernels(*capabilities):
    """Prints a line of JSON for every kernel and shape."""
    for capability in capabilities:
        for dtype, m, d in shapes(capability):
            for row, _ in build(capability, dtype, m, d, generation=SLOW or capability == 90):
                print(json.dumps(row))


def start_builds(folder):
    """Compiles everything in a process of its own, at low priority: the session starts it and the test below, the last one to
    run, awaits it."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    code = "import os; os.nice(10); from tests import test_kernel_builds as t; t.compile_kernels(*t.CAPABILITIES)"
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=env, stdout=out, stderr=err)


@needs_triton
def test_kernels_compile_without_spills_in_99_kb(builds):
    """For GPUs from Ampere to Blackwell, on a machine without a GPU (and not in the interpreter, hence a process of its own)."""
    if not CUOBJDUMP.exists():
        pytest.skip("Triton comes without NVIDIA's tools here")
    process, folder = builds
    assert process.wait() == 0, (folder / "err").read_text()
    rows = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    assert Counter(row["capability"] for row in rows) == {c: (18 if SLOW or c == 90 else 15) * len(shapes(c))
                                                          for c in CAPABILITIES}
    # What a version of Triton spills is recorded, nothing above 24 bytes by 3.9; of a version not recorded 24 are let through.
    # A program can have 99 KB of shared memory on all but sm_100, which has 227.
    known = json.loads((ROOT / "experiments/results/builds_triton.json").read_text(encoding="utf-8")).get(triton.__version__)
    key = operator.itemgetter("capability", "kernel", "dtype", "m", "d")
    recorded = {key(row): row["spilled"] for row in known["spills"]} if known else {}
    allowed = 0 if known else 24
    assert not [row for row in rows if row["spilled"] > recorded.get(key(row), allowed) or row["registers"] > 65536
                or row["shared"] > (227 if row["capability"] == 100 else 99) * 1024]
