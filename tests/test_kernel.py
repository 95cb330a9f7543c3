"""More tests of the kernel: dtypes, strides, errors, torch.compile, compilation for GPUs."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fmem
from test_fmem import (
    DEVICE,
    FLOAT32_ERROR,
    LOOP_ERROR,
    assert_close,
    error,
    kernel,
    loop_recurrence,
    recurrence_inputs,
    scan_inputs,
    with_gradients,
)

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(kernel is None, reason="Triton is not installed")


@pytest.mark.parametrize("position", [0, 1])
def test_gradient_of_a_single_output_with_any_strides(position):
    inputs = recurrence_inputs(3, 7, 4, 5)
    strided = [v.transpose(0, 1).contiguous().transpose(0, 1) for v in inputs]
    gradients = []
    for recurrence, values in ((kernel.recurrence, strided), (loop_recurrence, inputs)):
        leaves = [v.to(DEVICE).detach().requires_grad_() for v in values]
        gradients.append(torch.autograd.grad(recurrence(*leaves)[position].sum(), leaves))
    assert_close(LOOP_ERROR, *gradients)


@pytest.mark.parametrize("types", [*itertools.product([torch.float32, torch.bfloat16], repeat=3)])
def test_kernel_dtypes(types):
    """The state is carried and returned in float32, and stored in the dtype of `write`."""
    inputs = [v.to(DEVICE, t) for v, t in zip(recurrence_inputs(2, 9, 3, 5), types, strict=True)]
    leaves = [v.requires_grad_() for v in inputs]
    before, last = kernel.recurrence(*leaves)
    assert before.dtype == types[1]
    assert last.dtype == torch.float32
    want_before, want_last = loop_recurrence(*(v.detach().cpu().double() for v in leaves))
    assert error(last.cpu(), want_last) < FLOAT32_ERROR
    bound = 4e-3 if types[1] == torch.bfloat16 else FLOAT32_ERROR
    assert error(before.cpu(), want_before) < bound
    gradients = torch.autograd.grad(before.float().sum() + last.sum(), leaves)
    assert [g.dtype for g in gradients] == list(types)


def test_kernel_refuses_wrong_shapes_and_dtypes():
    keep, write, first = recurrence_inputs(2, 7, 3, 5)
    for invalid in ((keep[:, 1:], write, first), (keep, write[0], first), (keep, write, first[:1])):
        with pytest.raises(ValueError, match="must be"):
            kernel.recurrence(*invalid)
    with pytest.raises(ValueError, match="floating-point"):
        kernel.recurrence(keep, write.long(), first)


def test_kernel_refuses_second_derivatives():
    leaves = [v.to(DEVICE).requires_grad_() for v in recurrence_inputs(1, 3, 2, 2)]
    _, last = kernel.recurrence(*leaves)
    gradients = torch.autograd.grad(last.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[1].sum().backward()


def without_interpreter(code, tmp_path):
    """The lines that a program prints with Triton as on a GPU. Tracing needs no GPU."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


TRACE = """
import torch, fmem, kernel

class Scan(torch.nn.Module):
    def forward(self, *inputs):
        return fmem.scan_chunked(*inputs)

fmem.recurrence = kernel.recurrence
inputs = torch.rand(2, 70, 6), torch.rand(2, 70, 6), torch.rand(2, 70, 10), torch.rand(2, 6, 10)
for module in torch.export.export(Scan(), inputs, strict=True).graph_module.modules():
    for node in module.graph.nodes:
        print(node.target)
"""


def test_compile_keeps_the_graph_whole(tmp_path):
    """torch.export raises an error where Dynamo would break the graph."""
    assert without_interpreter(TRACE, tmp_path).count("fmem.recurrence.default") == 2


@pytest.mark.skipif(DEVICE == "cpu", reason="compiled code needs a GPU")
def test_compiled_scan_matches_the_scan():
    inputs = [v.cuda() for v in scan_inputs(70)]
    compiled = torch.compile(fmem.scan_chunked, fullgraph=True)
    assert_close(1e-9, with_gradients(compiled, inputs), with_gradients(fmem.scan_chunked, inputs))


COMPILE = """
import itertools, triton, kernel
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

names = "keep", "write", "first", "before", "last", "steps", "width"
constants = dict.fromkeys(("D", "BLOCK", "REVERSE", "DTYPE"), "constexpr")
dtypes = [*itertools.product(("*fp32", "*bf16"), repeat=3), ("*fp64", "*fp64", "*fp64")]
for capability, (keep, write, first), reverse in itertools.product((80, 90, 100), dtypes, (0, 1)):
    last = "*fp64" if first == "*fp64" else "*fp32"
    types = keep, write, first, write, last, "i32", "i32"
    values = {"D": 192, "BLOCK": kernel.BLOCK, "REVERSE": bool(reverse)}
    values["DTYPE"] = tl.float64 if first == "*fp64" else tl.float32
    signature = {**dict(zip(names, types)), **constants}
    source = ASTSource(kernel.recurrence_kernel, signature, constexprs=values)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    print(capability, *types, reverse, len(compiled.asm["cubin"]) > 0)
"""


def test_kernel_compiles_for_gpus(tmp_path):
    """For sm_80, sm_90 and sm_100, with every combination of dtypes, in both directions."""
    lines = without_interpreter(COMPILE, tmp_path)
    assert len(lines) == 3 * 9 * 2
    assert all(line.endswith("True") for line in lines)
