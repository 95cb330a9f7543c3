"""The tests: python -m pytest. No network, no GPU, about seven minutes on two cores.

The recurrence is held against the paper's equations written out in float64 (`reference`), everything faster against the
loop, the programs against their own promises. Where a tolerance is not obvious its reason stands beside it.
"""
import ast
import contextlib
import csv
import dataclasses
import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")      # before kernel.py imports triton: the kernels run on the CPU, slowly
try:
    import triton

    import kernel
except ImportError:
    triton = None

import bench
import eval as eval_py
import experiments
import fmem
import report
import sample as sample_py
import sharded
import train as train_py
from data import prepare, recall
from fmem import FactorizationMemory, FMem, FMemConfig, scan_chunked, scan_loop

HERE = Path(__file__).resolve().parent
torch.set_flush_denormal(True)


# FMEM_SLOW=1 python -m pytest -m slow runs the tests of endurance at full length; what they did goes to results/survives.json
# and from there, with report.py, into the README. Without FMEM_SLOW each runs a short form of itself.
SLOW = bool(os.environ.get("FMEM_SLOW"))


def survived(test, **figures):
    """Note what an endurance test ran and found."""
    print(f"\n{test}: {figures}")
    if SLOW:
        path = HERE / "results/survives.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, test: figures}, indent=1, sort_keys=True) + "\n")


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in a test whether it runs alone or after others."""
    torch.manual_seed(0)


# Two ways to round the same float64 sum differ by about 1e-16 per operation; a few hundred operations follow each other.
EXACT = 1e-12


def error(got, want, floor=1e-30):
    """Relative root mean square error; floor: what the size of `want` counts for at least, where it may be zero."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(floor)).item()


def tiny(**changes):
    return FMemConfig(**{**dict(vocab_size=50, n_layer=2, d_model=16, d_memory=24, n_rows=8, k_rows=3, tau=0.5), **changes})


def scan_inputs(B=2, T=37, m=6, d=10, sharp=3.0, ends=True, h0=True, sparse=None, seed=0):
    """theta, phi, x, h0 in float64, from values that float32 holds exactly. ends: with theta of exactly 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    alpha = torch.softmax(torch.randn(B, T, m, generator=g) * sharp, -1)
    if sparse:
        top, rows = alpha.topk(sparse, -1)
        alpha = torch.zeros_like(alpha).scatter(-1, rows, top / top.sum(-1, keepdim=True))
    theta = torch.sigmoid(torch.randn(B, T, 1, generator=g) * sharp) * alpha
    phi = torch.sigmoid(torch.randn(B, T, 1, generator=g)) * alpha
    if ends:
        theta[0, ::7, 0] = 1.0
        theta[-1, T // 2:T // 2 + 20, 1] = 1.0              # many in a row, over the end of a chunk
        theta[-1, ::5] = 0.0
        theta[0, -1, -1] = 1 - 2**-24                       # the largest float32 below 1
    x = torch.randn(B, T, d, generator=g)
    h = torch.randn(B, m, d, generator=g) if h0 else None
    return [v if v is None else v.double() for v in (theta, phi, x, h)]


def with_gradients(scan, inputs, dtype=torch.float64, **options):
    """[y, hT, gradients of all inputs] of a random linear function of y and hT."""
    leaves = [v if v is None else v.to(dtype).detach().requires_grad_() for v in inputs]
    y, hT = scan(*leaves, **options)
    g = torch.Generator().manual_seed(1)
    weigh = [torch.randn(v.shape, generator=g, dtype=torch.float64).to(dtype) for v in (y, hT)]
    grads = torch.autograd.grad((y * weigh[0]).sum() + (hT * weigh[1]).sum(), [v for v in leaves if v is not None])
    return [y, hT, *grads]


# -------------------------------------------------------------------------------------------------------- recurrence

def reference(layer, x, h):
    """Equations 4 to 13 as the paper writes them, in float64, one text, token and row at a time."""
    c = layer.config
    W = {name: p.detach().double() for name, p in layer.named_parameters()}
    ys = []
    for x_t in x:
        logits = W["W_alpha.weight"] @ x_t / c.tau
        alpha = torch.exp(logits - logits.max()) / torch.exp(logits - logits.max()).sum()       # 4
        eta = 1 / (1 + torch.exp(-(W["w_eta.weight"] @ x_t)))                                   # 5
        mu = 1 / (1 + torch.exp(-(W["w_mu.weight"] @ x_t)))                                     # 6
        if c.k_rows:
            gamma = torch.zeros(c.n_rows, dtype=torch.float64)                                  # 12
            gamma[sorted(range(c.n_rows), key=lambda i: -alpha[i])[:c.k_rows]] = 1
            alpha = gamma * alpha / (gamma * alpha).sum()                                       # 13
        theta, phi = eta * alpha, mu * alpha                                                    # 7, 8
        xbar = W["W_i.weight"] @ x_t                                                            # 9
        h = torch.diag(1 - theta) @ h + torch.outer(theta, xbar)                                # 10
        norm = torch.stack([row / math.sqrt(sum(v * v for v in row.tolist()) / len(row) + c.norm_eps) for row in h])
        ys.append(W["W_o.weight"] @ (norm.T @ phi))                                             # 11
    return torch.stack(ys), h


@pytest.mark.parametrize("scan", ["loop", "chunked"])
@pytest.mark.parametrize("k_rows", [None, 1, 3])
def test_layer_is_the_papers_equations(scan, k_rows):
    layer = FactorizationMemory(tiny(k_rows=k_rows, scan=scan)).double()
    x, h = torch.randn(2, 21, 16, dtype=torch.float64), torch.randn(2, 8, 24, dtype=torch.float64)
    y, hT = layer(x, h)
    for b in range(2):
        want_y, want_h = reference(layer, x[b], h[b])
        assert error(y[b], want_y) < 1e-7 and error(hT[b], want_h) < 1e-7   # k = 1: theta = eta < 1, no TINY involved


@pytest.mark.parametrize("h0", [True, False])
@pytest.mark.parametrize("sharp, sparse", [(0.0, None), (3.0, None), (30.0, None), (3.0, 2), (3.0, 1)])
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 53])
def test_chunked_is_the_loop(T, sharp, sparse, h0):
    """Outputs, last state and all gradients, theta of exactly 0 and 1 included."""
    inputs = scan_inputs(T=T, sharp=sharp, sparse=sparse, h0=h0)
    want = with_gradients(scan_loop, inputs)
    # TINY = 2e-9 stands for 0, which is what float64 sees; its gradient divides rounding errors by it
    assert all(error(g, w) < 1e-7 for g, w in zip(with_gradients(scan_chunked, inputs), want, strict=True))
    # in float32: the project's bar, about 20 roundings of 2^-24
    got = with_gradients(scan_chunked, inputs, torch.float32)
    assert [g.dtype for g in got] == [torch.float32] * len(got)
    assert all(error(g, w) < 2e-6 for g, w in zip(got, want, strict=True)), [error(g, w) for g, w in zip(got, want, strict=True)]


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 32])
def test_chunked_to_rounding_inside_the_interval(chunk_size):
    inputs = scan_inputs(T=50, sharp=1.0, ends=False)
    got, want = (with_gradients(f, inputs, **o) for f, o in ((scan_chunked, {"chunk_size": chunk_size}), (scan_loop, {})))
    assert all(error(g, w) < EXACT for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_chunked_where_every_theta_is_an_end(value):
    """theta = 1 everywhere: each row is the last x, and the largest powers of TINY occur. theta = 0: nothing moves."""
    theta, phi, x, h0 = scan_inputs(T=40, ends=False)
    inputs = [torch.full_like(theta, value), phi, x, h0]
    want = with_gradients(scan_loop, inputs)
    for dtype in (torch.float64, torch.float32):
        got = with_gradients(scan_chunked, inputs, dtype)
        assert all(torch.isfinite(g).all() for g in got)        # erased: h0's gradient is 0, or what TINY leaves of it
        assert all(error(g, w, floor=0.1) < 2e-6 for g, w in zip(got, want, strict=True))


def test_chunked_when_rows_cancel():
    """A write that cancels a row makes its length the small difference of large numbers; the norm must not lose it."""
    theta, phi, x, h0 = scan_inputs(T=32, ends=False)
    x[:, 1::2] = -x[:, ::2]
    theta[:] = 0.5
    want = with_gradients(scan_loop, [theta, phi, x, h0])
    got = with_gradients(scan_chunked, [theta, phi, x, h0], torch.float32)
    assert all(error(g, w) < 2e-6 for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("scan", [scan_loop, scan_chunked])
def test_gradcheck(scan):
    """Against finite differences. theta keeps away from the ends by more than their step of 1e-6."""
    theta, phi, x, h0 = scan_inputs(B=1, T=19, m=3, d=4, ends=False)
    inputs = [v.requires_grad_() for v in (theta.clamp(1e-3, 1 - 1e-3), phi, x, h0)]
    assert torch.autograd.gradcheck(scan, inputs)


@pytest.mark.parametrize("scan", [scan_loop, scan_chunked])
def test_scan_works_on_strided_inputs_and_leaves_them_alone(scan):
    theta, phi, x, h0 = scan_inputs(T=20)
    strided = [theta.mT.contiguous().mT, phi.mT.contiguous().mT, x.mT.contiguous().mT, h0.mT.contiguous().mT]
    before = [v.clone() for v in strided]
    want, got = scan(theta, phi, x, h0), scan(*strided)
    assert all(error(g, w) < EXACT for g, w in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(strided, before, strict=True))


@pytest.mark.parametrize("G", [1, 2, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_chunked_piece_by_piece(G, recompute, monkeypatch):
    """However many chunks are done at once, and with the states computed a second time: the same to rounding."""
    monkeypatch.setattr(fmem, "piece_size", lambda theta, C: G)
    inputs = scan_inputs(T=53, sharp=1.0, ends=False)
    got = with_gradients(scan_chunked, inputs, chunk_size=8, recompute=recompute)
    assert all(error(g, w) < EXACT for g, w in zip(got, with_gradients(scan_loop, inputs), strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_chunked_keeps_its_inputs_and_the_chunk_states_only(recompute):
    B, T, m, d = 1, 320, 16, 128
    stored = []
    inputs = [v.float().requires_grad_() for v in scan_inputs(B=B, T=T, m=m, d=d)]
    with torch.autograd.graph.saved_tensors_hooks(lambda v: stored.append(v) or v, lambda v: v):
        scan_chunked(*inputs, recompute=recompute)
    ours = {v.untyped_storage().data_ptr() for v in inputs}
    stored = [v.numel() for v in stored if v.untyped_storage().data_ptr() not in ours]
    assert sum(stored) == (0 if recompute else B * (T // 32 + 1) * m * d)


def test_chunked_under_compile_and_checkpointing():
    """Compiled it is one node of an unbroken graph; checkpointed it runs twice. The same numbers, bit for bit."""
    from torch.utils.checkpoint import checkpoint
    torch._dynamo.reset()
    inputs = scan_inputs(T=40)
    want = with_gradients(scan_chunked, inputs, torch.float32)
    compiled = torch.compile(scan_chunked, fullgraph=True, backend="aot_eager")     # no C++ compiler needed
    for form in (compiled, lambda *a: checkpoint(scan_chunked, *a, use_reentrant=False)):
        assert all(torch.equal(g, w) for g, w in zip(with_gradients(form, inputs, torch.float32), want, strict=True))
    theta, phi, x, h0 = (v.requires_grad_() for v in inputs)
    args = theta, phi, x, h0, 1e-5, 32, True
    torch.library.opcheck(fmem.chunked, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    y, hT, states = fmem.chunked(*args)
    back = [v.detach() for v in (theta, phi, x, h0, states, y, hT)]
    torch.library.opcheck(fmem.chunked_backward, (*back, 1e-5, 32), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("scan", [scan_loop, scan_chunked])
def test_scan_says_what_does_not_fit(scan):
    theta, phi, x, h0 = scan_inputs(T=5)
    with pytest.raises(ValueError, match="T of at least 1"):
        scan(theta[:, :0], phi[:, :0], x[:, :0], h0)
    with pytest.raises(ValueError, match="B, T, m"):
        scan(theta[:, :3], phi[:, :3], x, h0)
    with pytest.raises(ValueError, match="the state must be"):
        scan(theta, phi, x, h0[:, 1:])


def test_without_float64_the_loop_takes_over():
    assert fmem.choose_scan("auto", "mps")[0] == "loop"
    assert fmem.choose_scan("loop", "cpu") == ("loop", "as asked")
    apple = types.SimpleNamespace(device=torch.device("mps"))
    with pytest.raises(RuntimeError, match="float64.*loop"):
        scan_chunked(apple, apple, apple)


# ------------------------------------------------------------------------------------------------------------- kernels

needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not GPU, reason="no NVIDIA GPU here: the kernels were run in Triton's interpreter only")
DEVICE = "cuda" if GPU else "cpu"
# float32: as for the chunked form. fp16 is multiplied in TF32 and bf16 as it is: 11 and 8 bits, a few roundings each.
KERNEL_ERROR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture
def poisoned():
    """What torch.empty and its like return is full of NaN: an output that is not written is noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def kernel_errors(inputs, dtype):
    """Relative errors of y, hT and all gradients against the loop in float64 on the same (rounded) x."""
    inputs = [inputs[0], inputs[1], inputs[2].to(dtype).double(), inputs[3]]
    want = with_gradients(scan_loop, inputs)
    inputs = [v if v is None else v.to(DEVICE) for v in inputs]
    got = with_gradients(lambda theta, phi, x, h0: kernel.scan_triton(theta, phi, x.to(dtype), h0), inputs, torch.float32)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    return [error(g.cpu(), w) for g, w in zip(got, want, strict=True)]


@needs_triton
@pytest.mark.parametrize("T, m, d, sharp, sparse, h0, dtype", [
    (1, 6, 10, 3.0, None, True, torch.float32), (1, 2, 1, 3.0, None, False, torch.bfloat16),
    (5, 17, 33, 0.0, None, True, torch.float32), (5, 3, 70, 30.0, 1, False, torch.float16),
    (63, 6, 10, 3.0, 2, True, torch.float32), (64, 6, 10, 30.0, None, True, torch.float32),
    (65, 17, 33, 3.0, None, True, torch.float32), (130, 6, 10, 3.0, None, True, torch.float32),
    (40, 70, 40, 3.0, 9, True, torch.float32), (63, 5, 65, 3.0, None, True, torch.bfloat16),
    (64, 20, 10, 3.0, 4, True, torch.float16), (65, 6, 10, 0.0, None, False, torch.bfloat16),
    (130, 6, 10, 30.0, None, True, torch.bfloat16), (33, 130, 20, 3.0, 8, True, torch.bfloat16)])
def test_kernels_are_the_loop(poisoned, T, m, d, sharp, sparse, h0, dtype):
    """Every kernel, with theta of exactly 0 and 1, a state in, and gradients into hT and out of h0."""
    errors = kernel_errors(scan_inputs(T=T, m=m, d=d, sharp=sharp, sparse=sparse, h0=h0), dtype)
    assert all(e < KERNEL_ERROR[dtype] for e in errors), errors


@needs_triton
def test_kernels_recompute_is_bit_for_bit():
    inputs = [v.to(DEVICE) for v in scan_inputs(T=40)]
    kept, again = (with_gradients(kernel.scan_triton, inputs, torch.float32, recompute=flag) for flag in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@needs_triton
@pytest.mark.parametrize("output", [0, 1])
def test_kernels_with_one_output_unused(output, poisoned):
    leaves = [v.float().to(DEVICE).requires_grad_() for v in scan_inputs(T=9)]
    got = torch.autograd.grad(kernel.scan_triton(*leaves)[output].square().sum(), leaves, materialize_grads=True)
    want = torch.autograd.grad(scan_loop(*leaves)[output].square().sum(), leaves, materialize_grads=True)
    assert all(error(g, w) < 2e-6 for g, w in zip(got, want, strict=True))


@needs_triton
def test_kernels_are_one_node_for_the_compiler_and_take_strided_inputs():
    torch._dynamo.reset()
    inputs = [v.float().to(DEVICE) for v in scan_inputs(T=9)]
    want = with_gradients(kernel.scan_triton, inputs, torch.float32)
    compiled = torch.compile(kernel.scan_triton, fullgraph=True, backend="aot_eager")
    strided = [v.mT.contiguous().mT for v in inputs]
    for form, given in ((compiled, inputs), (kernel.scan_triton, strided)):
        got = with_gradients(form, given, torch.float32)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    inputs = [v.float().to(DEVICE) for v in scan_inputs(T=9, m=16, d=16)]       # the operator itself takes these only
    for recompute in (False, True):
        torch.library.opcheck(kernel.scan, (*inputs, 1e-5, recompute), test_utils=("test_schema", "test_faketensor"))


@needs_triton
def test_kernels_say_why_they_do_not_run(capfd):
    kernel.say_once.cache_clear()
    inputs = scan_inputs(T=5)
    for _ in range(2):
        got = kernel.scan_triton(*inputs)                           # float64
    assert all(torch.equal(g, w) for g, w in zip(got, scan_chunked(*inputs), strict=True))
    line = capfd.readouterr().err
    assert line.count("\n") == 1 and "float32, bf16 and fp16, not torch.float64" in line
    assert "m up to 512" in kernel.why_not(torch.device(DEVICE), 513, 8, torch.float32)
    assert "d up to 4096" in kernel.why_not(torch.device(DEVICE), 8, 4097, torch.float32)
    with pytest.raises(ValueError, match="the state must be"):
        kernel.scan_triton(*inputs[:3], inputs[3][:, 1:])


@pytest.fixture
def fresh_choice():
    fmem.no_kernel.cache_clear()
    yield
    fmem.no_kernel.cache_clear()


def test_without_a_gpu_or_triton_the_chunked_form_is_taken(fresh_choice, monkeypatch, capfd):
    assert fmem.choose_scan("auto", "cpu")[0] == "chunked" and not capfd.readouterr().err
    if triton:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(kernel, "INTERPRETED", False)
        assert fmem.choose_scan("auto", "cuda", 8, 8)[0] == fmem.choose_scan("kernel", "cuda", 8, 8)[0] == "chunked"
        assert re.fullmatch("fmem: scan_chunked instead of .* NVIDIA GPU\n", capfd.readouterr().err)     # once
    fmem.no_kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "kernel", None)                # import kernel raises ImportError, as without Triton
    layer = FactorizationMemory(tiny(scan="kernel"))
    assert layer(torch.randn(1, 3, 16))[0].isfinite().all() and "not installed" in capfd.readouterr().err


@needs_triton
@pytest.mark.parametrize("k", [None, 1, 5])
def test_step_kernel_touches_only_its_rows(k, poisoned):
    g = torch.Generator().manual_seed(0)
    h, x = torch.randn(3, 20, 70, generator=g), torch.randn(3, 70, generator=g)
    theta, phi = torch.rand(2, 3, k or 20, generator=g)
    theta[0, 0], theta[1, 0] = 0.0, 1.0
    rows = k and torch.stack([torch.randperm(20, generator=g)[:k] for _ in range(3)])
    full = [v if k is None else torch.zeros(3, 20).scatter(1, rows, v) for v in (theta, phi)]
    want_y, want_h = scan_loop(*(v[:, None].double() for v in full), x[:, None].double(), h.double())
    now, rows = h.clone().to(DEVICE), rows if k is None else rows.to(DEVICE)
    y = kernel.step_triton(now, x.to(DEVICE), theta.to(DEVICE), phi.to(DEVICE), rows).cpu()
    assert error(y, want_y[:, 0]) < 1e-6 and error(now.cpu(), want_h) < 1e-6        # a few roundings of 2^-24
    if k:
        others = torch.ones(3, 20, dtype=torch.bool).scatter(1, rows.cpu(), False)
        assert torch.equal(now.cpu()[others], h[others])
    with pytest.raises(ValueError, match="float32 and contiguous"):
        kernel.step_triton(now.mT.contiguous().mT, x.to(DEVICE), theta.to(DEVICE), phi.to(DEVICE), rows)


@needs_triton
@pytest.mark.parametrize("k_rows", [None, 3])
def test_model_on_the_kernels(k_rows, fresh_choice):
    """Full pass, step by step and generation on the kernels: what the loop gives."""
    models = [FMem(tiny(k_rows=k_rows, scan=scan)).to(DEVICE).eval() for scan in ("loop", "kernel")]
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.randint(50, (2, 20), device=DEVICE)
    with torch.no_grad():
        want, state = models[0](tokens)
        got, got_state = models[1](tokens)
        steps, step_state = by_steps(models[1], tokens)
    for g, w in [(got, want), (torch.stack(steps, 1), want), *zip(got_state, state, strict=True),
                 *zip(step_state, state, strict=True)]:
        assert error(g, w) < 1e-5                                   # float32 through two layers
    texts = [list(m.generate(tokens[:, :5], 20, temperature=0)) for m in models]
    assert torch.equal(torch.stack(texts[0]), torch.stack(texts[1]))


def by_steps(model, tokens):
    """Logits of each step, and the last state."""
    logits, state = [], None
    for token in tokens.unbind(1):
        out, state = model(token, state)
        logits.append(out)
    return logits, state


@pytest.mark.parametrize("scan", ["auto", pytest.param("kernel", marks=needs_triton)])
def test_the_graph_of_a_compiled_model_is_whole(scan, fresh_choice):
    torch._dynamo.reset()
    model, tokens = FMem(tiny(scan=scan)).to(DEVICE), torch.randint(50, (2, 20), device=DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")            # fullgraph: a break is an error
    want, got = (torch.autograd.grad(form(tokens)[0].square().mean(), list(model.parameters())) for form in (model, compiled))
    assert all(error(g, w) < 1e-5 for g, w in zip(got, want, strict=True))          # float32, the same operations


# All tile configurations that ship: a dtype and a block of rows each, with one block, and several with a rest; the largest.
SHIPPED = [(dtype, m, d) for dtype in KERNEL_ERROR for m, d in ((16, 1024), (32, 1024), (64, 1024), (80, 48))]
SHIPPED += [(torch.bfloat16, 512, 4096)]


CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump" if triton else None


def compile_kernels(capability):
    """A line of JSON for every kernel and shipped configuration: registers of a program, bytes of local (that is: spilled)
    and of shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    name = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    for dtype, m, d in SHIPPED:
        low = "*bf16" if dtype == torch.bfloat16 else "*fp32"
        types = {**dict.fromkeys("write w1 w2 wF qF states states1 states2".split(), low),
                 **dict.fromkeys("x v v1 v2 out y".split(), name[dtype]), "T": "i32", "N": "i32", "eps": "fp32", "rows": "*i64"}
        step = dict(m=m, d=d, k=m // 4, DENSE=False, num_warps=8, **kernel.step_tiles(m // 4, d))
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
            print(json.dumps({"kernel": label, "dtype": str(dtype), "m": m, "d": d,
                              "registers": use["REG"] * 32 * launch["num_warps"],
                              "spilled": use["STACK"] + use["LOCAL"], "shared": compiled.metadata.shared}))


@needs_triton
def test_kernels_compile_without_spills_in_99_kb(tmp_path):
    """For sm_80, sm_89 and sm_90, on a machine without a GPU (and not in the interpreter, hence processes of their own)."""
    if tuple(int(v) for v in triton.__version__.split(".")[:2]) < (3, 3):
        pytest.skip(f"compiling without a GPU is asked for in another way in Triton {triton.__version__}")
    if not CUOBJDUMP.exists():
        pytest.skip("Triton comes without NVIDIA's tools here")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = "import test_fmem; test_fmem.compile_kernels({})"
    for process in [subprocess.Popen([sys.executable, "-W", "ignore", "-c", run.format(capability)], cwd=HERE, env=env, text=True,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE) for capability in (80, 89, 90)]:
        out, err = process.communicate()
        assert process.returncode == 0, err
        rows = [json.loads(line) for line in out.splitlines()]
        assert len(rows) == 14 * len(SHIPPED)
        # Triton 3.9 spills nothing, 3.7 one register (8 bytes) in two of these kernels.
        assert not [row for row in rows if row["spilled"] > 8 or row["shared"] > 99 * 1024 or row["registers"] > 65536]


@needs_gpu
@pytest.mark.parametrize("dtype, m, d", SHIPPED[:-1])
def test_gpu_kernels_are_the_loop(poisoned, dtype, m, d):
    """Every shipped configuration as compiled for this GPU, all gradients, against float64."""
    for T, sharp, sparse in ((200, 3.0, None), (64, 30.0, None), (129, 3.0, max(1, m // 4))):
        errors = kernel_errors(scan_inputs(T=T, m=m, d=d, sharp=sharp, sparse=sparse), dtype)
        assert all(e < KERNEL_ERROR[dtype] for e in errors), (T, sharp, sparse, errors)


@needs_gpu
def test_gpu_more_than_2_to_the_31_numbers():
    """The last text of a batch with B T d above 2^31 comes out as it does alone."""
    B, T, m, d = 3, 2**20, 16, 1024
    theta, phi = torch.rand(2, B, T, m, device="cuda")
    x = torch.randn(B, T, d, device="cuda", dtype=torch.bfloat16)
    y, hT = kernel.scan_triton(theta, phi, x)
    want_y, want_hT = kernel.scan_triton(theta[2:], phi[2:], x[2:])
    assert torch.equal(y[2:], want_y) and torch.equal(hT[2:], want_hT)


@needs_gpu
def test_gpu_compiled_model_is_the_eager_one():
    model = FMem(tiny(d_model=64, d_memory=64)).cuda()
    tokens = torch.randint(50, (2, 100), device="cuda")
    compiled = torch.compile(model)
    grads = [torch.autograd.grad(form(tokens)[0].square().mean(), list(model.parameters())) for form in (model, compiled)]
    assert all(error(g, w) < 1e-4 for g, w in zip(*grads, strict=True))     # float32, fused in another order


@needs_triton
def test_training_agrees_with_and_without_the_kernels(corpus, tmp_path, fresh_choice):
    """100 steps on a GPU; in the interpreter 2, with their evaluations and the sample at the end."""
    losses, steps = [], 100 if GPU else 2
    for scan in ("kernel", "chunked"):
        train_py.train(settings(corpus, tmp_path / scan, scan=scan, device=DEVICE, dtype="float32", max_steps=steps,
                                eval_every=steps))
        losses.append([loss for _, loss in log_rows(tmp_path / scan, "train_loss")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if GPU else 1e-5)     # rounding grows with the steps


@needs_gpu
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_gpu_generation_from_a_graph_is_the_eager_one(temperature, monkeypatch):
    model, tokens = FMem(tiny()).cuda().eval(), torch.randint(50, (3, 9), device="cuda")

    def run():
        g = torch.Generator("cuda").manual_seed(1)
        return torch.stack(list(model.generate(tokens, 50, temperature, generator=g)))

    graph = run()
    monkeypatch.setattr(fmem, "capture_step", lambda *a: None)
    assert torch.equal(graph, run())


# ------------------------------------------------------------------------------------------------------ layer and model

def test_k_equal_m_is_dense():
    dense, sparse = FMem(tiny(k_rows=None)).double(), FMem(tiny(k_rows=8)).double()
    sparse.load_state_dict(dense.state_dict())
    tokens = torch.randint(50, (2, 30))
    for got, want in zip(sparse(tokens)[1] + [sparse(tokens)[0]], dense(tokens)[1] + [dense(tokens)[0]], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("grad", [False, True])
def test_step_touches_only_k_rows(grad):
    layer = FactorizationMemory(tiny(k_rows=3))
    h = torch.randn(5, 8, 24)
    h[:, :, 0] = 7.0
    before = h.clone()
    with torch.set_grad_enabled(grad):
        _, after = layer.step(torch.randn(5, 16), h)
    assert ((after != before).any(-1).sum(-1) == 3).all()
    assert (after.data_ptr() == h.data_ptr()) is not grad       # in place without gradients, on a copy with them
    assert torch.equal(h, before) is grad


def test_a_row_outside_the_top_k_keeps_its_value_exactly():
    layer = FactorizationMemory(tiny(k_rows=1))
    x, h = torch.randn(1, 1, 16), torch.randn(1, 8, 24)
    rows = layer.route(x)[2].flatten().tolist()
    after = layer(x, h)[1]
    assert [i for i in range(8) if not torch.equal(after[0, i], h[0, i])] == rows


@pytest.mark.parametrize("scan", ["loop", "chunked"])
def test_causality(scan):
    """Change token t: nothing before it moves, and it itself does."""
    model = FMem(tiny(scan=scan)).double()
    tokens = torch.randint(50, (1, 40))
    before = model(tokens)[0]
    for t in (0, 15, 16, 39):
        changed = tokens.clone()
        changed[0, t] = (tokens[0, t] + 1) % 50
        moved = (model(changed)[0] - before).abs().amax(-1)[0]
        assert moved[:t].max().item() < EXACT if t else True    # the whole chunk is computed anew: rounding may differ
        assert moved[t] > 1e-9                                  # a later token may read other rows


@pytest.mark.parametrize("k_rows", [None, 3])
def test_full_pass_is_split_anywhere_is_step_by_step(k_rows):
    model = FMem(tiny(k_rows=k_rows)).double()
    tokens = torch.randint(50, (2, 37))
    want, want_state = model(tokens)
    for cut in (1, 15, 16, 17, 36):
        first, state = model(tokens[:, :cut])
        second, state = model(tokens[:, cut:], state)
        assert error(torch.cat([first, second], 1), want) < EXACT
        assert all(error(g, w) < EXACT for g, w in zip(state, want_state, strict=True))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            steps, state = [], None
            for t in range(37):
                logits, state = model(tokens[:, t], state)
                steps.append(logits)
        assert error(torch.stack(steps, 1), want) < EXACT
        assert all(error(g, w) < EXACT for g, w in zip(state, want_state, strict=True))


def test_forward_does_not_change_the_state_it_is_given():
    model, tokens = FMem(tiny()), torch.randint(50, (1, 20))
    with torch.no_grad():
        _, state = model(tokens)
        before = [h.clone() for h in state]
        model(tokens, state)
        list(model.generate(tokens, 5, state=state))
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


@pytest.mark.parametrize("k_rows", [None, 3])
def test_gradients_through_step(k_rows):
    """The sum of step losses has the gradients of the full pass, in every parameter."""
    model = FMem(tiny(k_rows=k_rows)).double()
    tokens = torch.randint(50, (2, 20))
    weigh = torch.randn(2, 20, 50, dtype=torch.float64)
    want = torch.autograd.grad((model(tokens)[0] * weigh).sum(), list(model.parameters()))
    total, state = 0, None
    for t in range(20):
        logits, state = model(tokens[:, t], state)
        total = total + (logits * weigh[:, t]).sum()
    got = torch.autograd.grad(total, list(model.parameters()))
    for (name, _), g, w in zip(model.named_parameters(), got, want, strict=True):
        assert error(g, w) < 1e-10, name                        # sums of 20 steps, once forwards, once backwards


def test_initialisation():
    config = FMemConfig(vocab_size=4000, d_model=256, n_layer=8, n_rows=64, tau=0.125, alpha_std=3.0)
    torch.manual_seed(0)
    model = FMem(config)
    block = model.blocks[3]
    small = fmem.INIT_STD / math.sqrt(256)                      # 256 inputs
    add = small / math.sqrt(16)                                 # 8 layers, two additions each
    for name, weight, std in [("embed", model.embed.weight, fmem.EMBED_STD), ("W_i", block.memory.W_i.weight, small),
                              ("W_o", block.memory.W_o.weight, add), ("W_gate", block.mlp.W_gate.weight, small),
                              ("W_up", block.mlp.W_up.weight, small),
                              ("W_alpha", block.memory.W_alpha.weight, 3.0 * 0.125 / 16)]:
        # 16,384 numbers or more: their standard deviation is known to 0.6 %; five times that
        assert weight.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(weight.mean().item()) < 0.05 * std, name
    assert block.mlp.W_down.weight.std().item() == pytest.approx(add * math.sqrt(256 / config.d_mlp), rel=0.03)
    assert not block.memory.w_eta.weight.any() and not block.memory.w_mu.weight.any()
    assert all((n.weight == 1).all() for n in model.modules() if isinstance(n, torch.nn.RMSNorm))
    assert model.head.weight is model.embed.weight
    x = F.rms_norm(torch.randn(512, 256), (256,))               # what init_weights promises of the logits
    assert (block.memory.W_alpha(x) / 0.125).std().item() == pytest.approx(3.0, rel=0.05)
    half = torch.full((512,), 0.5)
    assert all(torch.allclose(v.sum(-1), half) for v in block.memory.route(x)[:2])
    untied = FMem(tiny(tie_embeddings=False))
    assert untied.head.weight is not untied.embed.weight


def test_dtypes_under_autocast(monkeypatch):
    """Routing weights, norms and states stay float32 and unrounded under bf16; products of matrices are bf16."""
    model, seen = FMem(tiny()), []
    scan = scan_chunked
    monkeypatch.setattr(fmem, "scan_chunked", lambda *a: seen.append(a) or scan(*a))
    tokens = torch.randint(50, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(tokens)
        step_logits, step_state = model(tokens[:, 0], state)
    assert logits.dtype == step_logits.dtype == torch.bfloat16
    for theta, phi, x, *_ in seen:
        assert theta.dtype == phi.dtype == torch.float32 and x.dtype == torch.bfloat16
    assert all(h.dtype == torch.float32 for h in state + step_state)
    x, layer = torch.randn(2, 5, 16), model.blocks[0].memory
    with torch.autocast("cpu", torch.bfloat16):
        theta, phi, rows = layer.route(x)
    alpha, eta = torch.softmax(x @ layer.W_alpha.weight.T / 0.5, -1), torch.sigmoid(x @ layer.w_eta.weight.T)
    want = eta * alpha.gather(-1, rows) / alpha.gather(-1, rows).sum(-1, keepdim=True)
    assert error(theta, want) < 1e-6                            # bf16 would be wrong by 1e-3
    theta, phi, xs, h0 = (v.bfloat16().float() for v in scan_inputs(ends=False))
    for form in (scan_loop, scan_chunked):
        want = form(theta, phi, xs, h0)
        with torch.autocast("cpu", torch.bfloat16):             # bf16 x is widened, y rounded once
            y, hT = form(theta, phi, xs.bfloat16(), h0)
        assert torch.equal(y, want[0].bfloat16()) and torch.equal(hT, want[1])
    layer.W_i, layer.W_o, h = torch.nn.Identity(), torch.nn.Identity(), torch.randn(2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y, hT = layer.step(x[:, 0], h.clone())
    with torch.no_grad():
        want = layer.step(x[:, 0], h.clone())
    assert torch.equal(y, want[0]) and torch.equal(hT, want[1])
    assert FMem(tiny()).bfloat16()(tokens)[1][0].dtype == torch.float32         # also where the model itself is bf16


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = FMem(tiny(n_layer=2, d_model=32, d_memory=32))
    tokens = torch.randint(50, (4, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1                                    # it begins at log 50 = 3.9


@pytest.mark.parametrize("field, value", [
    ("vocab_size", 0), ("n_layer", -1), ("d_model", 2.5), ("n_rows", 0), ("k_rows", 9), ("k_rows", 0), ("tau", 0),
    ("tau", math.nan), ("tau", math.inf), ("dropout", 1.0), ("norm_eps", 0), ("alpha_std", -1), ("chunk_size", 33),
    ("chunk_size", 0), ("scan", "fast"), ("d_mlp", "wide"), ("d_memory", True)])
def test_config_says_what_is_wrong(field, value):
    with pytest.raises(ValueError, match=field):
        tiny(**{field: value})


# ---------------------------------------------------------------------------------------------------------- generation

def counts(n=4000, **choice):
    """How often each of five tokens is drawn from known logits, as shares."""
    logits = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log().expand(n, -1)
    drawn = fmem.sample(logits, generator=torch.Generator().manual_seed(0), **choice)
    return (torch.bincount(drawn, minlength=5) / n).tolist()


def test_sample_on_known_logits():
    near = dict(abs=0.03)                                       # 4,000 draws: standard deviation at most 0.008
    assert counts() == pytest.approx([0.4, 0.3, 0.15, 0.1, 0.05], **near)
    assert counts(temperature=0) == [1, 0, 0, 0, 0]
    assert counts(temperature=1e-30) == [1, 0, 0, 0, 0]
    assert counts(top_k=1) == [1, 0, 0, 0, 0]
    assert counts(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0], **near)
    assert counts(top_k=99) == counts()
    assert counts(top_p=1e-9) == [1, 0, 0, 0, 0]
    assert counts(top_p=0.6) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0], **near)
    assert counts(top_p=0.75) == pytest.approx([0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0], **near)
    assert counts(top_p=1.0) == counts()
    hot = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).sqrt()
    assert counts(temperature=2.0) == pytest.approx((hot / hot.sum()).tolist(), **near)
    assert counts(temperature=0.5, top_k=3, top_p=0.9) == pytest.approx([16 / 25, 9 / 25, 0, 0, 0], **near)
    equal = torch.zeros(500, 4)                                 # ties: still exactly k
    assert len(set(fmem.sample(equal, top_k=2).tolist())) == 2


def test_generate():
    torch.manual_seed(0)
    model = FMem(tiny())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)                                           # logits that differ
    prompt = torch.randint(50, (2, 23))

    def run(n, **options):
        return torch.stack(list(model.generate(prompt, n, **options)), 1)

    greedy, tokens = run(12, temperature=0), prompt
    for _ in range(12):                                         # the slow way: the whole text anew for every token
        tokens = torch.cat([tokens, model(tokens)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(greedy, tokens[:, 23:])
    seeded = [run(12, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    assert list(model.generate(prompt, 0)) == []


def test_generate_continues_from_its_state(monkeypatch):
    model, prompt = FMem(tiny()), torch.randint(50, (1, 40))
    whole = [t.item() for t in model.generate(prompt, 20, temperature=0)]

    def first_part():
        nonlocal state
        state = yield from model.generate(prompt, 8, temperature=0)

    state = None
    parts = [t.item() for t in first_part()]
    parts += [t.item() for t in model.generate(torch.tensor([parts[-1:]]), 12, temperature=0, state=state)]
    assert parts == whole
    monkeypatch.setattr(fmem, "PREFILL", 7)                     # a prompt in pieces is the same prompt
    hidden, sizes = model.hidden, []
    monkeypatch.setattr(model, "hidden", lambda tokens, state: sizes.append(tokens.shape) or hidden(tokens, state))
    assert [t.item() for t in model.generate(prompt, 20, temperature=0)] == whole
    assert sizes == [(1, 7)] * 5 + [(1, 5)] + [(1,)] * 19       # and no more than that at once


# --- endless streams

def resident():
    """Memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def endless_model():
    torch.manual_seed(0)
    return FMem(FMemConfig(vocab_size=300, n_layer=2, d_model=64, n_rows=32, k_rows=8)).eval()


def flat(sizes):
    """By how much the second half is larger than the first, as a share of it. (The peaks: an allocator breathes.)"""
    half = len(sizes) // 2
    return max(sizes[half:]) / max(sizes[:half]) - 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_endless_generation(capsys):
    """A million tokens with FMEM_SLOW, else 3,000: the memory of the process stays as it is, all numbers finite."""
    n, model, sizes = (10**6 if SLOW else 3000), endless_model(), []
    texts, seen = model.generate(torch.zeros(1, 1, dtype=torch.long), n, generator=torch.Generator().manual_seed(0)), set()
    for i in itertools.count():
        try:
            seen.add(next(texts).item())
        except StopIteration as end:
            state = end.value
            break
        if i % (n // 20) == n // 40:                    # the first after a fortieth: caches have been filled
            sizes.append(resident())
    assert i == n and len(seen) > 100 and len(sizes) == 20
    assert all(h.isfinite().all() for h in state) and flat(sizes) < 0.01
    survived("endless_generation", tokens=n, growth_percent=round(100 * flat(sizes), 3), megabytes=sizes[0] >> 20)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_endless_reading():
    """Ten million tokens with FMEM_SLOW, else 100,000, in pieces of 4,096."""
    n, model, sizes, state = (10**7 if SLOW else 10**5), endless_model(), [], None
    g, pieces = torch.Generator().manual_seed(0), 0
    with torch.no_grad():
        for pieces in range(n // 4096 + 1):
            logits, state = model(torch.randint(300, (1, 4096), generator=g), state)
            if pieces >= 5:
                sizes.append(resident())
            assert logits[:, -1].isfinite().all()
    assert all(h.isfinite().all() for h in state) and flat(sizes) < 0.01
    survived("endless_reading", tokens=(pieces + 1) * 4096, growth_percent=round(100 * flat(sizes), 3), megabytes=sizes[0] >> 20)


@pytest.mark.slow
def test_step_and_chunks_agree_after_a_long_text():
    """100,000 tokens with FMEM_SLOW, else 2,000: one at a time and 4,096 at a time, and the same in float64."""
    n, model = (10**5 if SLOW else 2000), endless_model()
    tokens = torch.randint(300, (1, n), generator=torch.Generator().manual_seed(0))
    results = {}
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            state, by_step = None, None
            for piece in tokens.split(4096, 1):
                logits, state = model.to(dtype)(piece, state)
            for token in tokens[0]:
                step, by_step = model(token[None], by_step)
            results[dtype] = logits[:, -1], torch.stack(state), step, torch.stack(by_step)
    chunked, state, step, by_step = results[torch.float32]
    exact, exact_state, exact_step, _ = results[torch.float64]
    assert error(exact_step, exact) < 1e-10             # the two forms are the same to rounding
    # The forget of a memory forgets its rounding errors too, so they do not grow with the length.
    errors = {"logits": error(step, chunked), "state": error(by_step, state), "chunked": error(chunked, exact),
              "step": error(step, exact), "state_exact": error(by_step, exact_state)}
    assert all(e < 1e-5 for e in errors.values()), errors
    survived("step_and_chunks", tokens=n, **{name: float(f"{e:.1e}") for name, e in errors.items()})


@pytest.mark.parametrize("wrong", [dict(tokens=torch.tensor([[]], dtype=torch.long)), dict(tokens=torch.tensor([1, 2])),
                                   dict(max_new_tokens=-1), dict(temperature=-1), dict(temperature=math.nan), dict(top_k=0),
                                   dict(top_p=0.0), dict(top_p=1.1)])
def test_generate_says_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):    # at the call, not at the first token
        FMem(tiny()).generate(**{**dict(tokens=torch.tensor([[1]]), max_new_tokens=1), **wrong})


# ---------------------------------------------------------------------------------------------------------------- data

WORDS = "the memory of a river keeps the water that went by, über naïve façades – 東京 🙂 1905".split()
EVERY_KIND = "a\r\n\tb   c'll 12,345\x00\x1b[31m " + "".join(map(chr, range(0x80, 0x250))) + " 東京 🙂🙃 \U0010ffff"


def some_text(n, seed=0):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + rng.choice(["", "", ",", ".\n"]) for _ in range(n))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small prepared folder."""
    out = tmp_path_factory.mktemp("data") / "corpus"
    documents = {f"doc{i}": some_text(700, seed=i) for i in range(12)}
    prepare.prepare(out, documents, corpus="a test corpus", vocab_size=300)
    return out


def slow_bpe(text, vocab_size):
    """Byte-pair encoding as it is defined: count every pair of the whole text anew for every merge."""
    words = [[bytes([b]) for b in w.encode()] for w in regex.findall(prepare.GPT2_PATTERN, text)]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        pairs = Counter(pair for w in words for pair in itertools.pairwise(w))
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        ranks.setdefault(best[0] + best[1], len(ranks))
        for w in words:
            i = 0
            while i < len(w) - 1:
                if (w[i], w[i + 1]) == best:
                    w[i:i + 2] = [best[0] + best[1]]
                i += 1
    return ranks


@pytest.mark.parametrize("text", [some_text(300), "aaaaaaaaab aaaa ababababab bbbb aaaaa", "x", ""])
def test_bpe_is_its_definition(text):
    assert prepare.train_bpe([text], 320) == slow_bpe(text, 320)


def test_tokenizer_keeps_any_text(corpus):
    _, _, fields, _ = prepare.load(corpus)
    enc = prepare.load_tokenizer(json.loads(json.dumps(fields)))
    for text in ("", EVERY_KIND, some_text(50), "<|endoftext|>"):
        tokens = enc.encode_ordinary(text)
        assert enc.decode(tokens) == text and enc.eot_token not in tokens
    pieces = prepare.token_strings(enc)
    assert all(bytes([b]) in pieces for b in range(256))        # so any bytes at all can be written
    assert b"".join(pieces[t] for t in enc.encode_ordinary(EVERY_KIND)) == EVERY_KIND.encode()
    assert pieces[enc.eot_token] == b"" and len(pieces) == enc.n_vocab == 301
    assert prepare.dump_tokenizer(enc) == fields


def test_prepared_folder(corpus):
    train, val, fields, meta = prepare.load(corpus)
    enc = prepare.load_tokenizer(fields)
    assert meta["train"]["sources"] == [f"doc{i}" for i in range(10)] and meta["val"]["documents"] == 2
    for tokens, name, first in ((train, "train", 0), (val, "val", 10)):
        texts = enc.decode(tokens[:].tolist()).split("<|endoftext|>")
        assert texts.pop() == "" and len(texts) == meta[name]["documents"]
        assert texts[0] == some_text(700, seed=first) or texts[0] == some_text(700, seed=11)
        assert len(tokens) == meta[name]["tokens"] and tokens.dtype == np.uint16


def test_split(tmp_path):
    def parts(texts, val=None):
        splits = prepare.split([prepare.Source(name, text=text) for name, text in texts.items()], val)
        return {name: [(s.name, "".join(block for part in prepare.read_text(s, "") for block in part)) for s in sources]
                for name, (sources, _) in splits.items()}

    (_, train), = (whole := parts({"a": "0123456789" * 10}))["train"]
    assert train == "0123456789" * 9 and [text for _, text in whole["val"]] == ["0123456789"]
    three = parts({"a": "x" * 50, "b": "y" * 45, "c": "z" * 5})
    assert three == {"train": [("a", "x" * 50)], "val": [("b", "y" * 45), ("c", "z" * 5)]}
    assert parts({"a": "x", "b": "y"}, {"a"}) == {"train": [("b", "y")], "val": [("a", "x")]}
    for empty in ({}, {"a": "x"}):
        with pytest.raises(prepare.DataError):
            parts(empty)


def test_wide_vocabularies_take_four_bytes(tmp_path):
    prepare.write_tokens(tmp_path / "t.bin", [[1, 2], [70000]], 70001, bytes(32))
    assert prepare.read_tokens(tmp_path / "t.bin").tolist() == [1, 2, 70000]


def test_token_file_errors_name_the_command(tmp_path):
    path = tmp_path / "train.bin"
    prepare.write_tokens(path, [[1, 2, 3]], 300, b"t" * 32)
    good = path.read_bytes()
    assert prepare.read_tokens(path, b"t" * 32).tolist() == [1, 2, 3]
    cases = {"does not exist": None, "not a file of tokens": b"hello", "is damaged": good[:-1], "damaged": good + b"x",
             "has version 9": good[:8] + b"\x09" + good[9:], "is not a file": b"\0" * 64}
    for message, content in cases.items():
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(prepare.DataError, match=f"{message}.*run: python data/prepare.py"):
            prepare.read_tokens(path)
    path.write_bytes(good)
    with pytest.raises(prepare.DataError, match="another tokenizer"):
        prepare.read_tokens(path, b"u" * 32)
    with pytest.raises(prepare.DataError, match="not a prepared folder.*python data/prepare.py"):
        prepare.load(tmp_path)


def test_prepare_never_replaces_a_folder_unasked(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(prepare.DataError, match="--overwrite"):
        prepare.prepare(tmp_path / "out", {"a": some_text(99)}, corpus="x", vocab_size=260)
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    assert os.listdir(tmp_path) == ["out"]                      # nothing half-made is left behind


def test_plays_are_cleaned():
    markdown = ("# The Play\n\n## ACT I\n\n_Enter ROMEO,\nand others_\n\n**ROMEO**  \n_[Aside]_  \nBut soft!  what\\ light "
                "_[To\nher]_ \nbreaks\n\n_Exit_\n\n**A MAN**  \n_Dies_\n\n**ROMEO**  \nAnd\n\n_Music_\n\nso on.\nTHE PLAY\n")
    assert prepare.clean_play(markdown, "the-play") == "ROMEO:\nBut soft! what light\nbreaks\n\nROMEO:\nAnd\nso on.\n"


@pytest.mark.parametrize("internet", ["unreachable", "wrong"])
def test_without_network_the_standard_library_is_the_corpus(internet, tmp_path, monkeypatch, capsys):
    def urlopen(*args, **options):
        if internet == "unreachable":
            raise OSError("no network")
        return io.BytesIO(b"<html>please log in</html>")        # must fail its checksum
    no_pip = subprocess.CompletedProcess([], 1, "", "No module named pip")
    monkeypatch.setattr(prepare.subprocess, "run", lambda *a, **k: no_pip)
    monkeypatch.setattr(prepare.urllib.request, "urlopen", urlopen)
    meta = prepare.prepare(tmp_path / "out", vocab_size=300)
    said = capsys.readouterr().out
    assert "standard library" in meta["corpus"] and "standard library" in said
    assert "No module named pip" in said and ("no network" if internet == "unreachable" else "sha256 differs") in said
    assert 0.02 < meta["val"]["bytes"] / meta["train"]["bytes"] < 0.3


def test_prepare_command(tmp_path):
    def run(*arguments):
        command = [sys.executable, HERE / "data/prepare.py", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    zero = tmp_path / "0.txt"
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(some_text(200, seed=i), encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    done = run("--input", zero, tmp_path / "1.txt", "--val", tmp_path / "2.txt", "--out", tmp_path / "o", "--vocab_size", 280)
    assert done.returncode == 0, done.stderr
    assert prepare.load(tmp_path / "o")[3]["val"]["sources"] == [str(tmp_path / "2.txt")]
    for arguments, message in [(["--input", tmp_path / "bad.txt"], "not UTF-8"),
                               (["--input", tmp_path / "no.txt"], "No such file"),
                               (["--input", zero, "--vocab_size", 9, "--out", tmp_path / "p"], "256 "),
                               (["--input", zero, "--tokenizer", "nonsense", "--out", tmp_path / "p"], "nonsense"),
                               (["--inputs", zero], "--inputs"), (["--vocab_size", "x"], "--vocab_size"),
                               (["--input", zero, "--out", tmp_path / "o"], "--overwrite")]:
        done = run(*arguments)
        assert done.returncode != 0 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("name", ["gpt2", "cl100k", "o200k"])
def test_pieces_have_the_tokens_of_the_whole(name, corpus, monkeypatch):
    """A cut falls where every tokenizer's pattern ends a word; and where there is no such place, no character is lost."""
    patterns = {"gpt2": prepare.GPT2_PATTERN,
                "cl100k": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"""
                          r"""\s*[\r\n]|\s+(?!\S)|\s""",
                "o200k": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
                         r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}"""
                         r"""\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"""
                         r"""\s+(?!\S)|\s+"""}
    enc = prepare.load_tokenizer({**prepare.load(corpus)[2], "pat_str": patterns[name]})
    rng = random.Random(0)
    monkeypatch.setattr(prepare, "PIECE", 40)
    whole = 0
    for _ in range(200):
        words = [*WORDS, "a'll", " ", "  \n", "!\r\n", "12345", "e\u0301 ", "— ", "..."]
        text = "".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randrange(80)))
        blocks = [text[i:i + 33] for i in range(0, len(text), 33)]
        pieces = list(prepare.cut(blocks))
        assert "".join(pieces) == text and all(0 < len(p) <= 40 for p in pieces)
        good = [re.search(r"[^\W\d_]\Z", a) and b[0] == " " for a, b in itertools.pairwise(pieces)]
        for a, b, is_good in zip(pieces, pieces[1:], good, strict=False):
            assert is_good or (len(a) == 40 and not re.search(r"[^\W\d_] ", (a + b)[20:40])), (a, b)
        if all(good):
            whole += 1
            assert prepare.encode(enc, text).tolist() == enc.encode_ordinary(text)
        assert b"".join(prepare.token_strings(enc)[t] for t in prepare.encode(enc, text)) == text.encode()
    assert whole > 100
    monkeypatch.setattr(prepare, "PIECE", 2**18)
    for hard in ("a" * 10**6, " " * 10**6 + "a", "\n " * 10**6 + "x", "\x00" * 10**6, "東" * 10**6, "\ud800" * 1000):
        tokens = prepare.encode(enc, hard)              # tiktoken alone panics on the second
        assert b"".join(map(prepare.token_strings(enc).__getitem__, tokens)) == hard.encode("utf-16", "surrogatepass").decode(
            "utf-16", "replace").encode()


def zoo(folder, documents=60, words=300):
    """Files of every kind that prepare.py reads, with what each document is: {name: [texts]}."""
    folder.mkdir()
    texts = [some_text(words, seed=i) for i in range(documents)]
    (folder / "sub").mkdir()
    (folder / "sub/a.txt").write_text(texts[0], encoding="utf-8", newline="")
    (folder / "b.txt").write_text("", encoding="utf-8")
    lines = ["".join(json.dumps({"text": t, "id": i}, ensure_ascii=bool(i % 2)) + "\n\n" for i, t in enumerate(part))
             for part in (texts[1:documents // 2], texts[documents // 2:])]
    (folder / "c.jsonl").write_text(lines[0], encoding="utf-8")
    with gzip.open(folder / "d.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write(lines[1])
    (folder / "notes.md").write_text("not a corpus", encoding="utf-8")
    named = {"c.jsonl": texts[1:documents // 2], "d.jsonl.gz": texts[documents // 2:], "sub/a.txt": texts[:1]}
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        import pyarrow.parquet
        rows = [some_text(50, seed=1000 + i) for i in range(40)]
        pyarrow.parquet.write_table(pyarrow.table({"text": rows, "n": list(range(40))}), folder / "e.parquet", row_group_size=7)
        named["e.parquet"] = rows
    return {name: named[name] for name in sorted(named)}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_prepare_reads_every_kind_and_gives_the_same_bytes_for_any_workers(tmp_path, monkeypatch):
    documents = [text for texts in zoo(tmp_path / "in").values() for text in texts]
    monkeypatch.setattr(prepare, "JOB", 3000)
    monkeypatch.setattr(prepare, "PIECE", 800)
    results = []
    for workers in (1, 2, 5):
        out = tmp_path / f"out{workers}"
        prepare.main(["--input", str(tmp_path / "in"), "--out", str(out), "--vocab_size", "300", "--workers", str(workers),
                      "--shard_tokens", "20000"])
        results.append(contents(out))
    assert results[0] == results[1] == results[2]
    train, val, fields, meta = prepare.load(tmp_path / "out2")
    enc = prepare.load_tokenizer(fields)
    assert meta["train"]["shards"] > 2 and [len(f) >= 20000 for f in train.files[:-1]] == [True] * (meta["train"]["shards"] - 1)
    end = "<|endoftext|>"
    assert enc.decode(val[:].tolist()).split(end) == documents[::10] + [""]                 # every tenth, the first included
    assert enc.decode(train[:].tolist()).split(end) == [d for i, d in enumerate(documents) if i % 10] + [""]
    assert meta["train"]["documents"] + meta["val"]["documents"] == len(documents)
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == sum(len(d.encode()) for d in documents)
    whole = np.concatenate(train.files)
    for start, stop in ((0, 5), (19990, 20020), (len(whole) - 3, len(whole) + 9), (7, 7), (0, None)):
        assert np.array_equal(train[start:stop], whole[start:stop])
    assert train[20001] == whole[20001] and len(train) == len(whole)
    assert not list(tmp_path.glob(".*"))                # neither lock nor work is left behind


PREPARE_KILLS = 30 if SLOW else 4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
def test_prepare_killed_at_any_moment(tmp_path, monkeypatch):
    """SIGKILL at random moments: the same command goes on, and ends with the bytes of a run that was never killed."""
    zoo(tmp_path / "in", documents=40 * PREPARE_KILLS)
    command = ["--input", str(tmp_path / "in"), "--vocab_size", "300", "--shard_tokens", "4000"]
    code = f"""
import os, random, signal, time
from data import prepare
prepare.JOB, g, kills = 3000, random.Random(1), 0
encode = prepare.encode
prepare.encode = lambda *a: time.sleep(0.03) or encode(*a)     # spreads the work over the time of the kills
while True:
    child = os.fork()
    if child == 0:
        os.dup2(os.open({str(tmp_path / "said")!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        prepare.main({command!r} + ["--out", {str(tmp_path / "killed")!r}, "--workers", str(1 + kills % 3)])
        os._exit(0)
    if kills < {PREPARE_KILLS}:
        time.sleep(g.uniform(0.05, 0.9))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status != signal.SIGKILL:
        break
    kills += 1
print(status, kills)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr
    status, kills = map(int, done.stdout.split())
    goes_on = (tmp_path / "said").read_text().count("goes on")
    assert status == 0 and kills >= PREPARE_KILLS // 2 and goes_on >= 1, done.stdout
    survived("prepare_killed", kills=kills, resumed=goes_on)
    monkeypatch.setattr(prepare, "JOB", 3000)
    prepare.main([*command, "--out", str(tmp_path / "whole")])
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def big_corpus(folder, size):
    """About `size` bytes of text as .txt, .jsonl and .jsonl.gz, of 200,000 different words as frequent as words are."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxzéü東"))
    words = np.array(["".join(rng.choice(letters, n)) for n in 1 + rng.poisson(4, 200_000)])

    def text(n):                                                    # Zipf's law: rank r with a frequency like 1 / r
        return " ".join(words[(200_001 ** rng.random(n)).astype(int) - 1])

    paragraphs = [text(int(n)) for n in rng.integers(50, 2000, 3000)]
    mean = sum(len(p.encode()) for p in paragraphs) / len(paragraphs)
    for name, share in (("a.txt", 0.2), ("b/c.txt", 0.2), ("d.jsonl", 0.3), ("e.jsonl.gz", 0.3)):
        (folder / name).parent.mkdir(exist_ok=True)
        with (gzip.open if name.endswith("gz") else open)(folder / name, "wb") as f:
            for i in rng.integers(len(paragraphs), size=int(share * size / mean)):
                f.write((paragraphs[i] if name.endswith("txt") else json.dumps({"text": paragraphs[i]})).encode() + b"\n")
    return paragraphs


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
def test_prepare_a_corpus_larger_than_its_memory(tmp_path):
    """FMEM_SLOW: 2 GB of text in less than 1 GB of memory; else 20 MB."""
    size, workers = (2 * 10**9 if SLOW else 2 * 10**7), len(os.sched_getaffinity(0))
    paragraphs = big_corpus(tmp_path / "in", size)
    code = "import sys; from data import prepare; prepare.main(sys.argv[1:]); print(open('/proc/self/status').read())"
    command = [sys.executable, "-c", code, "--input", tmp_path / "in", "--out", tmp_path / "out", "--workers", workers]
    start = time.perf_counter()
    child = subprocess.run(list(map(str, command)), cwd=HERE, capture_output=True, encoding="utf-8", errors="replace")
    seconds, said = time.perf_counter() - start, child.stdout
    assert child.returncode == 0, child.stderr
    peak = int(re.search(r"^VmHWM:\s+(\d+) kB", said, flags=re.M)[1])
    _, _, fields, meta = prepare.load(tmp_path / "out", check=True)
    done, enc = meta["train"]["bytes"] + meta["val"]["bytes"], prepare.load_tokenizer(fields)
    assert 0.8 * size < done < 1.2 * size and 0 < meta["val"]["bytes"] < 0.11 * done
    assert peak < 1e6, peak                             # in KiB
    if SLOW:
        assert "s left" in said and meta["train"]["shards"] > 5
    sample = (paragraphs * 10)[:20000 if SLOW else 1000]
    start = time.perf_counter()
    enc.encode_ordinary_batch(sample, num_threads=workers)
    own = sum(len(p.encode()) for p in sample) / (time.perf_counter() - start)
    shutil.rmtree(tmp_path / "in")
    shutil.rmtree(tmp_path / "out")
    survived("prepare_large", bytes=done, seconds=round(seconds), workers=workers, peak_mb=round(peak / 1024),
             files=meta["train"]["shards"], mb_per_second=round(done / seconds / 1e6, 1),
             tiktoken_mb_per_second=round(own / 1e6, 1))


def test_prepare_says_what_is_wrong(tmp_path, capsys):
    good = json.dumps({"text": "some words"}) + "\n"
    (tmp_path / "empty").mkdir()
    parquet = "cannot be read as .parquet" if importlib.util.find_spec("pyarrow") else "pip install pyarrow"
    cases = {"cut.jsonl.gz": (gzip.compress(good.encode() * 500)[:-20], "line .* cannot be read"),
             "not.jsonl.gz": (b"hello", "line 1 cannot be read"),
             "broken.jsonl": (good.encode() + b'{"text": "a', "line 2 cannot be read"),
             "other.jsonl": (b'{"body": "words"}\n', "line 1 has no text in a field text"),
             "list.jsonl": (b'["words"]', "line 1 has no text"),
             "number.jsonl": (b'{"text": 5}', "line 1 has no text"),
             "deep.jsonl": (b"[" * 10**5, "line 1 cannot be read"),
             "latin.jsonl": (b'{"text": "caf\xe9"}', "line 1 cannot be read"),
             "latin.txt": (b"x" * 2**20 + b"caf\xe9", "not UTF-8 text .byte 1048579"),
             "half.txt": (b"caf\xc3", "not UTF-8 text .byte 3"),
             "null.parquet": (b"PAR1PAR1", parquet),
             "one.jsonl": (good.encode(), "no document is left for training"),
             "two.jsonl": (good.encode() * 2, None), "empty": (None, "has no file"), "nothing": (None, "No such file"),
             "/dev/null": (None, "neither a file nor a folder")}
    for name, (content, message) in cases.items():
        if content:
            (tmp_path / name).write_bytes(content)
        if message:
            with pytest.raises(SystemExit, match=f"data/prepare.py: error: .*{message}") as e:
                prepare.main(["--input", str(tmp_path / name), "--out", str(tmp_path / "out"), "--vocab_size", "260"])
            assert "\n" not in str(e.value) and (name in str(e.value) or "left" in message), name
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "out").exists()
    prepare.main(["--input", str(tmp_path / "two.jsonl"), "--out", str(tmp_path / "out"), "--vocab_size", "260"])
    assert prepare.load(tmp_path / "out")[3]["train"]["documents"] == 1
    prepare.main(["--check", str(tmp_path / "out")])
    (tmp_path / "out/val-00000.bin").write_bytes((tmp_path / "out/val-00000.bin").read_bytes()[:-2] + b"\1\0")
    with pytest.raises(SystemExit, match="a checksum differs"):
        prepare.main(["--check", str(tmp_path / "out")])


def test_what_is_kept_is_of_use_to_the_same_command_only(tmp_path, monkeypatch, capsys):
    """A full disk after three files of tokens: the message says what is kept; other options, or another text, start anew."""
    zoo(tmp_path / "in")
    monkeypatch.setattr(prepare, "JOB", 3000)
    write_tokens, calls = prepare.write_tokens, itertools.count()

    def full_disk(*args):
        if next(calls) % 4 == 3:
            raise OSError(28, "No space left on device")
        return write_tokens(*args)

    def run(out, vocab_size="300"):
        prepare.main(["--input", str(tmp_path / "in"), "--out", str(tmp_path / out), "--vocab_size", vocab_size,
                      "--shard_tokens", "4000"])
        return contents(tmp_path / out), capsys.readouterr().out.count("goes on")

    for changed in ("nothing", "option", "text", "kept file"):
        if changed == "text":
            (tmp_path / "in/sub/a.txt").write_text("other words", encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "write_tokens", full_disk)
            with pytest.raises(SystemExit, match=r"No space left.*is kept in .*\.part; the same command goes on"):
                run("out")
        kept = tmp_path / ".out.part"
        assert (kept / "train-00002.bin").exists()
        if changed == "kept file":
            (kept / "train-00001.bin").write_bytes(mutated((kept / "train-00001.bin").read_bytes(), random.Random(0))[1])
        elif changed == "text":
            (tmp_path / "in/sub/a.txt").write_text("quite other words", encoding="utf-8")
        size = "301" if changed == "option" else "300"
        got, went_on = run("out", size)
        assert went_on == (changed == "nothing")
        shutil.rmtree(tmp_path / "out")
        assert got == run("fresh", size)[0]
        shutil.rmtree(tmp_path / "fresh")
        assert not kept.exists()


def test_what_waits_for_the_workers_is_bounded():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    with prepare.ThreadPoolExecutor(2) as pool:
        for done, result in enumerate(prepare.in_order(pool, lambda i: i * i, items(), 4)):
            assert result == done * done and len(taken) <= done + 4


def test_two_prepares_of_one_folder_do_not_mix(tmp_path):
    pytest.importorskip("fcntl", reason="locks on files are for Unix")
    with prepare.locked(tmp_path / ".out.lock"), pytest.raises(prepare.DataError, match="another process"):
        prepare.prepare(tmp_path / "out", {"a": some_text(99)}, corpus="x", vocab_size=260)
    prepare.prepare(tmp_path / "out", {"a": some_text(99)}, corpus="x", vocab_size=260)


# ------------------------------------------------------------------------------------------------------------ training

def settings(corpus, out, **more):
    return {**dict(data=str(corpus), out=str(out), device="cpu", n_layer=1, d_model=16, n_rows=8, k_rows=2, context=24,
                   batch_size=4, max_steps=20, eval_every=5, eval_tokens=100, log_every=1, sample_tokens=3, warmup=2,
                   dropout=0.1, lr=4e-3, tau=0.25, alpha_std=1.0), **more}


def log_rows(out, column):
    with open(Path(out) / "log.csv", newline="", encoding="utf-8") as f:
        return [(int(r["step"]), float(r[column])) for r in csv.DictReader(f) if r[column]]


def same(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="session")
def run20(corpus, tmp_path_factory):
    """A run of 20 steps that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train_py.train(settings(corpus, out))


# Ten training losses. They change only if the model, its initialisation, the data order or the optimiser does; a new PyTorch
# may round otherwise, hence 1e-4. Without dropout, whose random numbers differ between versions of PyTorch.
FIRST_LOSSES = [5.73879, 5.68521, 5.58876, 5.5535, 5.53525, 5.41731, 5.40571, 5.32003, 5.37472, 5.36832]


def test_first_losses(corpus, tmp_path):
    train_py.train(settings(corpus, tmp_path / "out", max_steps=10, dropout=0.0))
    losses = [loss for _, loss in log_rows(tmp_path / "out", "train_loss")]
    assert losses == pytest.approx(FIRST_LOSSES, abs=1e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resume_is_bit_for_bit(number, corpus, run20, tmp_path, monkeypatch):
    """20 steps = 10, a signal, a resume, 10: weights, optimiser, log, dropout included."""
    batch = train_py.Batches.__call__

    def interrupting(self, step, *part):
        if step == 9:
            signal.raise_signal(number)
        return batch(self, step, *part)

    given = settings(corpus, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(train_py.Batches, "__call__", interrupting)
        assert train_py.train(given)["step"] == 10
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    with open(tmp_path / "out/log.csv", "a") as f:
        f.write("11,1056,0.1,3.0,1e-3,1,9,,,,\n1")                 # a kill: a row after the checkpoint, and half a row
    resumed = train_py.train({"out": given["out"], "resume": True})
    whole = run20[1]
    for part in ("model", "optimizer", "config", "tokenizer", "best", "random"):
        assert same(resumed[part], whole[part]), part
    for column in ("train_loss", "val_loss", "lr", "grad_norm"):
        assert log_rows(given["out"], column) == log_rows(run20[0], column)
    assert same(train_py.load_checkpoint(run20[0] / "last.pt")["model"], whole["model"])


def test_best_checkpoint_is_the_best(corpus, tmp_path, monkeypatch):
    losses = iter([4.0, 3.0, 5.0, 3.5, 1.0])                    # after 5, 10, 15, 20 steps; at the end, of all tokens
    monkeypatch.setattr(train_py, "evaluate", lambda *a: (next(losses), 1.0))
    out = tmp_path / "out"
    train_py.train(settings(corpus, out))
    best, last = (train_py.load_checkpoint(out / name) for name in ("best.pt", "last.pt"))
    assert (best["step"], best["best"]) == (10, 3.0) and (last["step"], last["best"]) == (20, 3.0)
    assert not same(best["model"], last["model"])
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".png") == ["best.pt", "last.pt", "log.csv"]


def test_a_run_never_overwrites_another(corpus, run20, tmp_path):
    shutil.copytree(run20[0], tmp_path / "out")
    given = settings(corpus, tmp_path / "out", max_steps=1)
    before = (tmp_path / "out/last.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run.*--resume.*--out.*--overwrite"):
        train_py.train(given)
    assert (tmp_path / "out/last.pt").read_bytes() == before
    with pytest.raises(ValueError, match="--d_model is not that of the run"):
        train_py.train({"out": given["out"], "resume": True, "d_model": 32})
    assert train_py.train({**given, "overwrite": True, "eval_every": 9})["step"] == 1
    assert train_py.load_checkpoint(tmp_path / "out/best.pt")["step"] == 1      # nothing is left of the run before


def test_a_failed_save_keeps_the_last_checkpoint(run20, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    train_py.save_checkpoint(run20[1], path)
    before = path.read_bytes()

    def full_disk(checkpoint, f):
        f.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        train_py.save_checkpoint(run20[1], path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


KILLS = 100 if SLOW else 4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
def test_killed_at_any_moment(corpus, tmp_path):
    """SIGKILL at random moments, a checkpoint after every step, so that many hit one half-written: each life goes on where
    the last one ended, and the weights at the end are those of a run that was never killed."""
    given = settings(corpus, tmp_path / "killed", eval_every=1, max_steps=40 * KILLS, eval_tokens=30)
    code = f"""
import os, random, signal, sys, time
import train
given, g, kills, half = {given!r}, random.Random(1), 0, 0
out = train.Path(given["out"])
while True:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        begun = (out / "last.pt").is_file()
        train.train(dict(given, resume=True) if begun else dict(given, overwrite=True))
        os._exit(0)
    if kills < {KILLS}:
        time.sleep(g.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status == signal.SIGKILL:
        kills += 1
        half += any(path.stat().st_size for path in out.glob(".*.pt.tmp"))
    else:
        print(status, kills, half)
        break
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, encoding="utf-8", errors="replace",
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    status, kills, half = map(int, done.stdout.split())
    survived("killed", kills=kills, half=half)
    assert status == 0 and (kills == KILLS or (not SLOW and kills >= KILLS // 2)), done.stderr
    whole = train_py.train({**given, "out": str(tmp_path / "whole")})
    last = train_py.load_checkpoint(tmp_path / "killed/last.pt")
    for part in ("model", "optimizer", "step", "best", "random"):
        assert same(last[part], whole[part]), part
    left = sorted(path.name for path in (tmp_path / "killed").iterdir() if path.suffix != ".png")
    assert left == ["best.pt", "last.pt", "log.csv"]
    for column in ("train_loss", "val_loss"):
        assert log_rows(tmp_path / "killed", column) == log_rows(tmp_path / "whole", column)


def limited(run, *options, limit=None, during=""):
    """train.py --resume in a process of its own that cannot write files beyond `limit` bytes, `during` run at its sixth step."""
    code = f"""
import os, resource, shutil, signal, sys
import train
if {limit}:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
call = train.Batches.__call__
def batch(self, step, *part):
    if step == 25:
        {during or "pass"}
    return call(self, step, *part)
train.Batches.__call__ = batch
train.main(sys.argv[1:])
"""
    return subprocess.run([sys.executable, "-c", code, "--out", str(run), "--resume", "--max_steps", "40", *options], cwd=HERE,
                          capture_output=True, encoding="utf-8", errors="replace")


def test_a_full_disk_and_a_vanished_folder(run20, tmp_path):
    """A limit on the size of files stands for the disk: in the middle of a checkpoint, and of the log."""
    pytest.importorskip("resource", reason="limits on files are for Unix")
    for limit in ((run20[0] / "last.pt").stat().st_size // 2, (run20[0] / "log.csv").stat().st_size + 30):
        run = tmp_path / str(limit)
        shutil.copytree(run20[0], run)
        before = (run / "last.pt").read_bytes()
        done = limited(run, limit=limit)
        assert done.returncode == 1 and re.fullmatch("train.py: error: .*\n", done.stderr), done.stderr
        assert (run / "last.pt").read_bytes() == before and not list(run.glob(".*.tmp"))
        assert train_py.train({"out": str(run), "resume": True, "max_steps": 22})["step"] == 22      # with room again, it goes on
    run = tmp_path / "vanishes"
    shutil.copytree(run20[0], run)
    done = limited(run, during=f"shutil.rmtree({str(run)!r})")
    assert done.returncode == 1 and re.fullmatch("train.py: error: .*vanishes.*\n", done.stderr), done.stderr


def test_damaged_checkpoints_are_refused_in_one_line(run20, tmp_path):
    whole = (run20[0] / "last.pt").read_bytes()
    foreign = tmp_path / "foreign.pt"
    torch.save({"model": {}}, foreign)
    evil = tmp_path / "evil.pt"
    torch.save({"format": train_py.FORMAT, "model": Evil()}, evil)
    contents = {"cut": whole[:len(whole) // 2], "empty": b"", "text": b"hello", "foreign": foreign.read_bytes(),
                "evil": evil.read_bytes()}
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError) as e:
            train_py.load_checkpoint(path)
        assert name in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="does not exist"):
        train_py.load_checkpoint(tmp_path / "nothing.pt")
    assert not Evil.ran


def mutated(whole, g):
    """-> (what was done, the bytes after it)."""
    raw, at, n = bytearray(whole), g.randrange(len(whole)), g.randrange(1, 200)
    kind = g.choice(["turned", "cut", "zeroed", "put in", "doubled"])
    if kind == "turned":
        raw[at] ^= 1 << g.randrange(8)
    elif kind == "cut":
        del raw[at:]
    elif kind == "zeroed":
        raw[at:at + n] = bytes(len(raw[at:at + n]))
    elif kind == "put in":
        raw[at:at] = g.randbytes(n)
    else:
        raw[at:at] = raw[at:at + n]
    return kind, bytes(raw)


MUTATIONS = 1000 if SLOW else 100


@pytest.mark.slow
@pytest.mark.parametrize("what", ["checkpoint", "state"])
def test_no_mutation_of_a_checkpoint_loads_to_something_else(what, run20, tmp_path, capsys):
    """Bits turned, pieces lost, zeroed, doubled or put in: refused in one line, or, where nothing reads that byte, the same."""
    path, form = run20[0] / "last.pt", train_py.FORMAT
    if what == "state":
        path, form = tmp_path / "text.state", sample_py.STATE
        sample_py.main(["--checkpoint", str(run20[0] / "best.pt"), "--max_new_tokens", "5", "--save-state", str(path)])
    whole, g, outcomes = path.read_bytes(), random.Random(0), Counter()
    want = train_py.load_checkpoint(path, form=form)
    for _ in range(MUTATIONS):
        kind, raw = mutated(whole, g)
        (tmp_path / "x.pt").write_bytes(raw)
        try:
            assert same(train_py.load_checkpoint(tmp_path / "x.pt", form=form), want), kind
            outcomes["same"] += 1
        except ValueError as e:
            outcomes["several lines" if "\n" in str(e) else kind] += 1
    assert all(outcomes[kind] > MUTATIONS // 12 for kind in ("turned", "cut", "zeroed", "put in", "doubled")), outcomes
    assert not outcomes["several lines"] and outcomes["same"] < 0.1 * MUTATIONS, outcomes
    survived(f"mutations_{what}", mutations=MUTATIONS, refused=MUTATIONS - outcomes["same"])


JUNK = [None, -1, 0, 10**12, 2**63, 1e308, math.nan, "", "\x1b[2J", "x" * 1000, b"x", [], [1], {}, {"a": 1}, (), True,
        torch.zeros(0), torch.full((3, 3), math.nan), torch.zeros(2, dtype=torch.int64)]


def replaced(value, g):
    """The same, but for something in it, at any depth, which is now something else, or gone."""
    if isinstance(value, dict) and value and g.random() < 0.9:
        key, value = g.choice(list(value)), dict(value)
        if g.random() < 0.2:
            del value[key]
        else:
            value[key] = replaced(value[key], g)
        return value
    if isinstance(value, (list, tuple)) and value and g.random() < 0.9:
        i, items = g.randrange(len(value)), list(value)
        items[i] = replaced(items[i], g)
        return type(value)(items)
    if isinstance(value, torch.Tensor) and g.random() < 0.5:
        return g.choice([value * math.nan, value * 1e38, value.double(), value.flatten()[:1], value.flatten(),
                         value.expand(2, *value.shape)])
    return g.choice(JUNK)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["sample", "eval", "resume", "state"])
def test_whole_files_with_wrong_content_get_one_line(program, run20, tmp_path, capsys, monkeypatch):
    """What no checksum can tell: files that are whole but were made by somebody else. They work, or get one line."""
    checkpoint, g, outcomes = train_py.load_checkpoint(run20[0] / "last.pt"), random.Random(0), Counter()
    best, state = str(run20[0] / "best.pt"), tmp_path / "text.state"
    sample_py.main(["--checkpoint", best, "--max_new_tokens", "5", "--save-state", str(state)])
    if program == "state":
        checkpoint = train_py.load_checkpoint(state, form=sample_py.STATE)
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/last.pt"
    commands = {"sample": (sample_py.main, ["--checkpoint", str(path), "--max_new_tokens", "3"]),
                "eval": (eval_py.main, [str(path)]),
                "resume": (train_py.main, ["--out", str(path.parent), "--resume", "--max_steps", "21", "--sample_tokens", "1"]),
                "state": (sample_py.main, ["--checkpoint", best, "--load-state", str(path), "--max_new_tokens", "3"])}
    main, arguments = commands[program]
    n = {"sample": MUTATIONS, "eval": MUTATIONS // 5, "resume": MUTATIONS // 2, "state": MUTATIONS}[program]
    for i in range(n):
        # as save_checkpoint does, but without waiting for the disk
        torch.save(replaced(checkpoint, g), path)
        capsys.readouterr()
        try:
            main(arguments)
            outcomes["works"] += 1
        except SystemExit as e:
            said = e.code if isinstance(e.code, str) else capsys.readouterr().err.strip()
            assert re.match(r"(sample|eval|train)\.py: error: ", said) and said.isprintable() and len(said) < 600, (i, said)
            outcomes["refused"] += 1
        out = capsys.readouterr().out
        assert "\x1b" not in out
    assert outcomes["refused"] > 0.2 * n, outcomes
    survived(f"wrong_content_{program}", files=n, refused=outcomes["refused"])


def test_weights_and_states_that_are_not_finite_are_refused(run20, tmp_path):
    checkpoint = train_py.load_checkpoint(run20[0] / "last.pt")
    model = train_py.model_from(checkpoint, "cpu")
    with torch.no_grad():
        _, state = model(torch.zeros(1, 5, dtype=torch.long))
    train_py.check_state(model, state, torch.zeros(1, dtype=torch.long), "x")
    for wrong in ([h * math.nan for h in state], [h[:, 1:] for h in state], state * 2, 5):
        with pytest.raises(ValueError, match="x does not hold a state of this model"):
            train_py.check_state(model, wrong, torch.zeros(1, dtype=torch.long), "x")
    checkpoint["model"]["norm.weight"][3] = math.nan
    with pytest.raises(ValueError, match="not a finite number"):
        train_py.model_from(checkpoint, "cpu")


def test_resume_takes_new_rates(corpus, run20, tmp_path):
    """Options given again replace the saved ones, those of the optimiser too; what it has learnt stays."""
    shutil.copytree(run20[0], tmp_path / "out")
    resumed = train_py.train({"out": str(tmp_path / "out"), "resume": True, "max_steps": 21, "weight_decay": 0.5, "beta2": 0.5})
    groups = resumed["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0] and all(g["betas"] == (0.9, 0.5) for g in groups)
    assert all(state["step"] == 21 for state in resumed["optimizer"]["state"].values())
    with pytest.raises(ValueError, match="grouped in another way"):
        train_py.train({"out": str(tmp_path / "out"), "resume": True, "max_steps": 22, "router_lr": 0.5})


@pytest.mark.parametrize("change", [lambda c: c.pop("config"), lambda c: c["config"].update(d_model=17), lambda c: c.pop("model"),
                                    lambda c: c["config"].update(colour="red"), lambda c: c.update(model=[1, 2]),
                                    lambda c: c["config"].update(n_rows="many"), lambda c: c["model"].popitem()])
def test_a_checkpoint_without_a_model_is_refused_in_one_line(change, run20):
    checkpoint = train_py.load_checkpoint(run20[0] / "last.pt")
    larger = {**checkpoint, "config": {**checkpoint["config"], "n_layer": 50}}
    with pytest.raises(ValueError, match="parameters, which it does not have"):     # before they are built
        train_py.model_from(larger, "cpu")
    change(checkpoint)
    with pytest.raises(ValueError) as e:
        train_py.model_from(checkpoint, "cpu")
    assert "\n" not in str(e.value)


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 on a CPU needs a newer PyTorch")
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "group").as_uri(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded_model(seed):
    torch.manual_seed(seed)
    model = sharded.shard(FMem(tiny(n_layer=1, d_model=8, d_memory=8)), torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.arange(20)[None])[0].square().sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.slow
def test_no_mutation_of_a_checkpoint_in_parts_loads_to_something_else(alone, run20, tmp_path):
    """Those of --fsdp: refused in one line, by the checksums; and code in PyTorch's table of contents, a pickle, does not run."""
    model, optimizer = sharded_model(1)
    run = {**run20[1], "model": None, "optimizer": None}
    sharded.save(tmp_path, 5, model, optimizer, lambda path: train_py.save_checkpoint(run, path))
    folder = sharded.newest(tmp_path)
    want = {name: value.clone() for name, value in sharded.tensors(model, optimizer).items()}
    other, moments = sharded_model(2)
    assert not same(want, sharded.tensors(other, moments))
    sharded.load(folder, other, moments)
    assert same(want, sharded.tensors(other, moments)) and "optimizer.blocks.0.memory.W_i.weight.exp_avg_sq" in want
    g, outcomes, bad = random.Random(0), Counter(), tmp_path / "bad"
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) == 4
    data, = (name for name in files if name.endswith(".distcp"))
    for i in range(1000 if SLOW else 200):
        shutil.copytree(folder, bad, dirs_exist_ok=True)
        name = files[i // 2 % 4] if i % 2 else data     # half of them the weights
        (bad / name).write_bytes(mutated((bad / name).read_bytes(), g)[1])
        try:
            assert same(train_py.load_checkpoint(bad / "run.pt"), run)
            sharded.load(bad, other, moments)
            assert same(want, sharded.tensors(other, moments))
            outcomes["same"] += 1
        except (ValueError, OSError) as e:
            outcomes["several lines" if "\n" in str(e) else name] += 1
    assert not outcomes["several lines"] and outcomes["same"] < 0.2 * (i + 1) and len(outcomes) >= 4, outcomes
    survived("mutations_in_parts", mutations=i + 1, refused=i + 1 - outcomes["same"])
    shutil.copytree(folder, bad, dirs_exist_ok=True)
    for evil in (pickle.dumps(Evil()), pickle.dumps({"a": torch.distributed.checkpoint.metadata.BytesStorageMetadata()})):
        (bad / ".metadata").write_bytes(evil)
        (bad / "sums-0.txt").write_text(f"{prepare.file_hash(bad / '.metadata')}  .metadata\n")
        with pytest.raises(OSError, match="which no checkpoint of ours does"):
            sharded.load(bad, other, moments)
    assert not Evil.ran
    (folder / "run.pt").unlink()                        # as a kill before the end of `save` leaves it
    assert sharded.newest(tmp_path) is None


def kept_for_backward(n_layer, T, d_model):
    """Bytes that autograd keeps, but for the parameters themselves, under autocast to bf16."""
    model, kept = FMem(FMemConfig(vocab_size=1000, n_layer=n_layer, d_model=d_model, n_rows=64, k_rows=8)), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor     # alive, so that no address comes twice
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.zeros(1, T, dtype=torch.long))
    del out
    return sum(size for size, _ in kept.values())


def test_the_plan_for_larger_models_adds_up():
    """docs/scaling.md: its code prints its tables, and the bytes kept per token and layer are those of the code (to 2 %)."""
    page = (HERE / "docs/scaling.md").read_text(encoding="utf-8")
    code, = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "scaling.md", "exec"), {})
    lines = printed.getvalue().splitlines()
    assert len(lines) == 8 and all(line in page for line in lines), printed.getvalue()
    bytes_per_token = (kept_for_backward(2, 512, 512) - kept_for_backward(1, 512, 512)
                       - kept_for_backward(2, 256, 512) + kept_for_backward(1, 256, 512)) / 256
    said = float(re.search(r"^\| 512 \| ([\d,]+) \|", page, flags=re.M)[1].replace(",", ""))
    assert bytes_per_token == pytest.approx(said, rel=0.02)


def test_no_program_runs_what_a_file_says():
    """No eval, exec or unpickling in the sources, but for the unpickler of sharded.py, which knows a list of names only."""
    found = []
    for path in [*HERE.glob("*.py"), *HERE.glob("data/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if name in ("eval", "exec", "compile") or re.match("(pickle|marshal|shelve|dill|yaml)\\.", name) or (
                        name == "torch.load" and options.get("weights_only") != "True") or "allow_pickle" in options:
                    found.append((path.name, name))
    assert {file for file, _ in found} <= {"test_fmem.py", "sharded.py"}
    assert [name for file, name in found if file == "sharded.py"] == ["pickle.UnpicklingError"]


def test_fsdp_says_what_is_wrong(corpus, run20, tmp_path):
    with pytest.raises(ValueError, match="start them with torchrun"):
        train_py.train(settings(corpus, tmp_path / "out", fsdp=True))
    shutil.copytree(run20[0], tmp_path / "run")
    with pytest.raises(ValueError, match="was begun without --fsdp"):
        train_py.train({"out": str(tmp_path / "run"), "resume": True, "fsdp": True})


@pytest.mark.slow
@pytest.mark.parametrize("resigned", [False, True])
def test_no_mutation_of_the_data_loads_to_something_else(resigned, corpus, tmp_path):
    """resigned: with checksums that agree, as somebody would who means harm; then what loads can at least be worked with."""
    g, outcomes = random.Random(0), Counter()
    *want, fields, meta = prepare.load(corpus)
    names = "train-00000.bin", "val-00000.bin", "tokenizer.tiktoken", "meta.json"
    for i in range(MUTATIONS * len(names)):
        folder = tmp_path / "data"
        shutil.copytree(corpus, folder, dirs_exist_ok=True)
        path = folder / names[i % 4]
        path.write_bytes(mutated(path.read_bytes(), g)[1])
        if resigned:
            if path.name == "meta.json":
                path.write_text(json.dumps(replaced(meta, g), default=str))
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                new = json.loads((folder / "meta.json").read_text())
                new["files"] = {name: prepare.file_hash(folder / name) for name in names[:3]}
                (folder / "meta.json").write_text(json.dumps({**new, "sha256": prepare.meta_hash(new)}))
        try:
            *got, got_fields, got_meta = prepare.load(folder)
            enc = prepare.load_tokenizer(got_fields)
            if resigned:
                assert enc.n_vocab <= 2**24 and prepare.encode(enc, EVERY_KIND).max() < enc.n_vocab
                assert max(int(tokens[:].max()) for tokens in got) < enc.n_vocab
            else:
                assert all(np.array_equal(a[:], b[:]) for a, b in zip(got, want, strict=True)) and got_fields == fields
                assert got_meta == meta or "sha256" not in got_meta     # its name was hit: taken for a folder from before
            outcomes["works"] += 1
        except prepare.DataError as e:
            outcomes["several lines" if "\n" in str(e) else path.name] += 1
    assert outcomes["several lines"] == 0 and len(outcomes) >= 5 - resigned, outcomes
    assert resigned or outcomes["works"] < 0.05 * (i + 1), outcomes
    survived(f"mutations_data{'_resigned' * resigned}", mutations=i + 1, refused=i + 1 - outcomes["works"])


@pytest.mark.slow
def test_damaged_input_to_prepare_gets_one_line(tmp_path, capsys):
    zoo(tmp_path / "in", documents=8)
    g, outcomes = random.Random(0), Counter()
    paths = sorted(path for path in (tmp_path / "in").rglob("*") if path.suffix in (".txt", ".jsonl", ".gz", ".parquet"))
    for i in range(MUTATIONS):
        path = paths[i % len(paths)]
        bad = tmp_path / path.name
        bad.write_bytes(mutated(path.read_bytes() or b"x", g)[1])
        try:
            prepare.main(["--input", str(bad), "--out", str(tmp_path / "out"), "--vocab_size", "257", "--overwrite"])
            outcomes["works"] += 1
        except SystemExit as e:
            outcomes[path.suffix if re.match(r"data/prepare\.py: error: ", e.code) and e.code.isprintable() else e.code] += 1
    assert len(outcomes) == len({path.suffix for path in paths}) + 1, outcomes
    assert not list(tmp_path.glob(".*"))
    survived("mutations_corpora", mutations=MUTATIONS, refused=MUTATIONS - outcomes["works"])


def test_tokenizers_with_impossible_numbers_are_refused(corpus):
    fields = prepare.load(corpus)[2]
    ranks, special = fields["ranks"], fields["special_tokens"]
    named_twice = prepare.load_tokenizer({**fields, "special_tokens": {**special, "<|other|>": 300}})   # as o200k_harmony does
    assert named_twice.n_vocab == 301 and prepare.encode(named_twice, EVERY_KIND).max() < 300
    for wrong in ({**fields, "special_tokens": {**special, "<|other|>": 7}}, {**fields, "special_tokens": {prepare.EOT: 2**24}},
                  {**fields, "special_tokens": {}}, {**fields, "ranks": ranks.replace(" 299\n", " 298\n")},
                  {**fields, "ranks": ranks.replace("YQ== 97\n", "")}, {**fields, "ranks": ranks.replace(" 299\n", " -1\n")}):
        with pytest.raises(prepare.DataError, match="the tokenizer is damaged"):
            prepare.load_tokenizer(wrong)


@pytest.mark.parametrize("pattern", ["", "a", "x*", "(", r"(a+)+$|(?s:.)", r"\w+", None, 5, "(?s:.{1,3})"])
def test_hostile_tokenizer_patterns_are_refused_at_once(pattern, corpus):
    fields = {**prepare.load(corpus)[2], "pat_str": pattern}
    start = time.perf_counter()
    if pattern == "(?s:.{1,3})":                        # odd, but it works
        enc = prepare.load_tokenizer(fields)
        assert enc.decode(prepare.encode(enc, EVERY_KIND).tolist()) == EVERY_KIND
    elif pattern == r"(a+)+$|(?s:.)":                   # takes exponential time on a's that something follows
        with contextlib.suppress(prepare.DataError):
            prepare.load_tokenizer(fields)
    else:
        with pytest.raises(prepare.DataError):
            prepare.load_tokenizer(fields)
    assert time.perf_counter() - start < 5


class Evil:
    ran = False

    def __reduce__(self):
        return setattr, (Evil, "ran", True)


@pytest.mark.parametrize("n, context", [(1000, 24), (25, 24), (49, 24), (30, 1)])
def test_batches_cover_the_text_once_per_epoch(n, context):
    batches = train_py.Batches(np.arange(n, dtype=np.uint16), context, 3, seed=1)
    steps = math.ceil(2 * batches.per_epoch / 3)
    windows = torch.cat([batches(step) for step in range(steps)])
    assert (windows == windows[:, :1] + torch.arange(context + 1)).all()        # each a piece of the text
    for epoch in range(2):
        targets = windows[epoch * batches.per_epoch:(epoch + 1) * batches.per_epoch, 1:].flatten().tolist()
        assert len(set(targets)) == len(targets) >= n - 2 * context             # no token twice, few left out
    again = train_py.Batches(np.arange(n, dtype=np.uint16), context, 3, seed=1)
    assert torch.equal(again(steps - 1), batches(steps - 1))                    # a step does not depend on those before
    assert torch.equal(torch.cat([again(0, slice(0, 1)), again(0, slice(1, 3))]), batches(0))
    if n > 100:
        assert not torch.equal(train_py.Batches(batches.tokens, context, 3, seed=2)(0), batches(0))


def test_batches_need_enough_text():
    with pytest.raises(ValueError, match="--context"):
        train_py.Batches(np.arange(24), 24, 1, 0)


def test_evaluate_counts_every_token_once(corpus):
    _, val, fields, _ = prepare.load(corpus)
    enc = prepare.load_tokenizer(fields)
    sizes = np.array([len(piece) for piece in prepare.token_strings(enc)])
    model = FMem(tiny(vocab_size=enc.n_vocab)).eval()
    val = val[:130]                                             # five windows of 24 and a last one of 9
    loss, bpb = train_py.evaluate(model, val, 24, sizes, torch.device("cpu"), contextlib.nullcontext, batch=2)
    nats = 0.0
    for a in range(0, 129, 24):
        window = torch.from_numpy(val[a:a + 25].astype(np.int64))
        nats += F.cross_entropy(model(window[None, :-1])[0][0], window[1:], reduction="sum").item()
    assert loss == pytest.approx(nats / 129, rel=1e-5)
    text = enc.decode([t for t in val[1:].tolist() if t != enc.eot_token], errors="surrogateescape")
    size = sum(len(enc.decode_single_token_bytes(t)) for t in val[1:].tolist() if t != enc.eot_token)
    assert text and bpb == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert model.training                                       # as the training loop expects it


def test_learning_rate():
    s = train_py.Settings(**{**train_py.PRESETS["cpu"], "lr": 1.0, "warmup": 9, "min_lr": 0.1})
    assert [train_py.learning_rate(s, i, 0) for i in range(11)] == pytest.approx([min(1, (i + 1) / 10) for i in range(11)])
    assert train_py.learning_rate(s, 100, 0.5) == pytest.approx(0.55)
    assert train_py.learning_rate(s, 100, 1.0) == train_py.learning_rate(s, 100, 1.5) == pytest.approx(0.1)


def test_weight_decay_groups():
    model = FMem(tiny())
    s = train_py.Settings(**train_py.PRESETS["cpu"])
    decayed, free = train_py.make_optimizer(model, s, torch.device("cpu")).param_groups
    name = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    names = sorted(name[id(p)].split(".")[-2] for p in free["params"])
    assert names == ["embed", "memory_norm", "memory_norm", "mlp_norm", "mlp_norm", "norm"]
    assert len(decayed["params"]) == 2 * 8 and len(free["params"]) == len(name) - 2 * 8


def test_seconds_finishes_the_schedule(corpus, tmp_path):
    done = train_py.train(settings(corpus, tmp_path / "out", max_steps=10**6, seconds=1.5, eval_every=10**5))
    assert 1.5 <= done["seconds"] < 10 and 5 < done["step"] < 10**5
    rates = [lr for _, lr in log_rows(tmp_path / "out", "lr")]
    assert rates[-1] < 0.1 * max(rates)                         # the cosine has come down to its end of 0.05


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_never_reaches_the_weights(wrong, corpus, tmp_path, monkeypatch, capsys):
    """Steps 4 and from 8 on have a loss that is not a number, or infinite: each is skipped, three in a row end the run."""
    given = settings(corpus, tmp_path / "out", keep_every=1, max_skipped=3, eval_every=100)
    losses, true_loss = itertools.count(1), F.cross_entropy

    def cross_entropy(*args, **options):
        loss = true_loss(*args, **options)
        return loss if options or (i := next(losses)) < 4 or 4 < i < 8 else loss * wrong      # options: an evaluation

    with monkeypatch.context() as patch:
        patch.setattr(train_py.F, "cross_entropy", cross_entropy)
        with pytest.raises(ValueError, match="not finite in 3 steps in a row.*--resume"):
            train_py.train(given)
    kept = [train_py.load_checkpoint(tmp_path / f"out/step-{i}.pt") for i in range(10)]
    assert [same(kept[i]["model"], kept[i + 1]["model"]) for i in range(9)] == [False] * 3 + [True] + [False] * 3 + [True] * 2
    last = train_py.load_checkpoint(tmp_path / "out/last.pt")
    assert last["step"] == 10 and same(last["model"], kept[7]["model"])
    assert same(last["optimizer"]["state"], kept[7]["optimizer"]["state"])      # moments and step counts
    assert capsys.readouterr().out.count("\nskipped ") == 4 and log_rows(given["out"], "skipped")[-1] == (7, 1)
    resumed = train_py.train({"out": given["out"], "resume": True})          # whatever it was is over
    assert resumed["step"] == 20 and not same(resumed["model"], last["model"])


def test_gradient_accumulation_changes_nothing(corpus, tmp_path):
    runs = [train_py.train(settings(corpus, tmp_path / str(n), micro_batch=n, max_steps=5, dropout=0.0)) for n in (1, 4)]
    for a, b in zip(runs[0]["model"].values(), runs[1]["model"].values(), strict=True):
        assert error(a, b) < 1e-4                               # float32 sums in another order, through AdamW's square root


def torchrun(n, out, given, *options):
    """train.py in n processes, started."""
    options = [w for k, v in given.items() if k != "out" for w in (f"--{k}", str(v))] + list(map(str, options))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), str(HERE / "train.py")]
    popen = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", start_new_session=True)
    return subprocess.Popen([*command, "--out", str(out), *options], env={**os.environ, "OMP_NUM_THREADS": "1"}, **popen)


def finished(process):
    try:
        said, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, said, errors


def like(a, b, rel=1e-5):
    """The same losses to rounding."""
    for column in ("train_loss", "val_loss"):
        want = [(step, pytest.approx(value, rel=rel)) for step, value in log_rows(b, column)]
        assert len(want) > 1 and log_rows(a, column) == want


@pytest.mark.parametrize("n, options", [(2, []), (4, []), (2, ["--fsdp"]), (4, ["--fsdp", "--micro_batch", 1]),
                                        (2, ["--fsdp", "--dtype", "bf16"])])
def test_processes_train_like_one(n, options, corpus, tmp_path):
    """2 and 4 processes, the model whole in each of them or split over them, have the losses and weights of one process."""
    if options and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 on a CPU needs a newer PyTorch")
    given = settings(corpus, tmp_path / "one", max_steps=6, eval_every=3, dropout=0.0, batch_size=8, d_memory=24)
    one = train_py.train({**given, "dtype": "bf16" if "bf16" in options else "float32"})
    code, _, errors = finished(torchrun(n, tmp_path / "n", given, *options))
    assert code == 0, errors
    rounding = 1e-3 if "bf16" in options else 1e-5      # bf16 has 8 bits, and the losses are means over 192 tokens
    like(tmp_path / "n", tmp_path / "one", rel=rounding)
    best, whole = (train_py.load_checkpoint(tmp_path / run / "best.pt") for run in ("n", "one"))
    assert best["step"] == whole["step"] == 6 and best["model"].keys() == whole["model"].keys()
    for a, b in zip(best["model"].values(), one["model"].values(), strict=True):
        assert error(a, b) < 10 * rounding                      # as for gradient accumulation
    names = {path.name for path in (tmp_path / "n").iterdir() if path.suffix != ".png"}
    assert names == {"best.pt", "log.csv", "step-6" if options else "last.pt"}


def parent(stat):
    """The parent of the process whose /proc/PID/stat this is: the second word after its name, which may hold anything."""
    try:
        return int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:                                     # it has ended
        return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("options, processes", [([], (2, 1)), (["--fsdp"], (2, 4))])
def test_a_dead_process_ends_the_run_and_it_goes_on_with_another_number(options, processes, corpus, tmp_path):
    if options and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 on a CPU needs a newer PyTorch")
    given = settings(corpus, tmp_path / "n", max_steps=10**6, eval_every=4, dropout=0.0, batch_size=8, min_lr=1.0)
    run = torchrun(processes[0], tmp_path / "n", given, *options)
    deadline = time.time() + 120

    def saved():
        return [*(tmp_path / "n").glob("last.pt"), *(tmp_path / "n").glob("step-*/run.pt")]

    while time.time() < deadline and not saved():
        time.sleep(0.02)
    ranks = [path.parent.name for path in Path("/proc").glob("[0-9]*/stat") if parent(path) == run.pid]
    os.kill(int(ranks[-1]), signal.SIGKILL)
    begun = time.time()
    code, _, errors = finished(run)
    assert code != 0 and time.time() - begun < 60
    assert len(ranks) == processes[0] and not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert "train.py: error: another process of this run has ended" in errors and 'train.py", line' not in errors, errors
    steps = 4 + max(train_py.load_checkpoint(path)["step"] for path in saved())
    code, said, errors = finished(torchrun(processes[1], tmp_path / "n", {"max_steps": steps}, "--resume"))
    assert code == 0 and "resumed" in said, errors
    train_py.train({**given, "out": str(tmp_path / "one"), "max_steps": steps})
    like(tmp_path / "n", tmp_path / "one", rel=1e-4)
    survived(f"dead_process{''.join(options)}", processes=processes[0], resumed_with=processes[1])


def test_trains_in_bf16(corpus, run20, tmp_path):
    """Under autocast the weights and the optimiser stay float32, and twenty steps lead where float32 leads."""
    done = train_py.train(settings(corpus, tmp_path / "out", dtype="bf16", max_steps=20))
    assert {v.dtype for v in done["model"].values()} == {torch.float32}
    want = [loss for _, loss in log_rows(run20[0], "train_loss")]
    # 8 bits of mantissa: 0.4 % per product, less in the mean of a batch
    assert [loss for _, loss in log_rows(tmp_path / "out", "train_loss")] == pytest.approx(want, rel=5e-3)


@pytest.mark.parametrize("options, message", [
    (["--learning_rate", "1"], "--learning_rate is not an option"), (["--nrows", "4"], "did you mean --n_rows?"),
    (["--max_steps", "many"], "whole number"), (["--lr", "nan"], "number"), (["--max_steps", "0"], "--max_steps must be"),
    (["--k_rows", "99"], "k_rows must be"), (["--device", "gpu"], "not a device"),
    (["--context", "99999999"], "--context must be"),
    (["--data", "nowhere"], "not a prepared folder"), (["--resume"], "there is no"), (["--scan", "fast"], "scan must be"),
    (["--micro_batch", "3"], "--micro_batch"), (["--preset", "tpu"], "--preset must be"), (["--seed", "-1"], "--seed must be"),
    (["--dtype", "int8"], "--dtype must be")])
def test_train_command_says_what_is_wrong(options, message, corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        train_py.main(["--data", str(corpus), "--out", str(tmp_path / "out"), "--device", "cpu", *options])
    said = str(e.value) if isinstance(e.value.code, str) else capsys.readouterr().err.removesuffix("\n")
    assert e.value.code not in (0, None) and message in said and "\n" not in said
    assert not (tmp_path / "out/last.pt").exists()


ABSURD = "0", "-1", "nan", "inf", "1e12", "1000000000000", "x", "", "-0.0", "9" * 40, "none", "\0"


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(train_py.Settings)])
def test_absurd_values_get_a_line_each(name, corpus, tmp_path, capsys, monkeypatch):
    """Every option with every one of these: it runs, or says in one line what is wrong."""
    given = settings(corpus, tmp_path / "out", max_steps=1, eval_every=1, sample_tokens=1)
    tiny_run = [f"--{k}={v}" for k, v in given.items() if k != name]
    monkeypatch.chdir(tmp_path)
    for value in ABSURD:
        if name in ("max_steps", "sample_tokens") and len(value) > 9:
            continue                                    # that many were asked for
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            train_py.main([*tiny_run, f"--{name}={value}"])
        except SystemExit as e:
            said = e.code if isinstance(e.code, str) else capsys.readouterr().err.strip()
            assert said.startswith("train.py: error: ") and "\n" not in said and len(said) < 400, said
        capsys.readouterr()


def test_options_are_taken_in_either_spelling():
    assert train_py.parse(["--max-steps=7", "--d_model", "8", "--no-carry-state"]) == train_py.parse(
        ["--max_steps", "7", "--d-model", "8", "--no-carry_state"]) == {"max_steps": 7, "d_model": 8, "carry_state": False}


def test_compile_falls_back(corpus, tmp_path, monkeypatch, capsys):
    def broken(model):
        def fail(*a):
            raise RuntimeError("no compiler here")
        return fail
    monkeypatch.setattr(torch, "compile", broken)
    assert train_py.train(settings(corpus, tmp_path / "out", max_steps=2, compile=True))["step"] == 2
    assert "compile   no: RuntimeError: no compiler here" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ sample.py

def test_sample_command(run20, tmp_path):
    """As a user runs it: in a folder with the checkpoint and nothing else."""
    (tmp_path / "out").mkdir()
    shutil.copy(run20[0] / "best.pt", tmp_path / "out")
    done = subprocess.run([sys.executable, HERE / "sample.py", "--max_new_tokens", "8", "--prompt", "-"], cwd=tmp_path,
                          input="über 東京".encode(), capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0 and done.stdout.decode().startswith("über 東京"), done.stderr
    assert re.search(rb"\d tokens/s", done.stderr) and b"a test corpus" in done.stderr


def test_sample_ends_quietly_when_nobody_reads_on(run20):
    command = [sys.executable, str(HERE / "sample.py"), "--checkpoint", str(run20[0] / "best.pt"), "--num_samples", "50"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace") as process:
        process.stdout.read(5)
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1 and "rror" not in said, said


def test_sample_options(run20, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        sample_py.main(["--device", "cpu", "--max_new_tokens", "8", *arguments])
        return capsys.readouterr().out

    with pytest.raises(SystemExit, match="python train.py makes one"):
        run()
    shutil.copytree(run20[0], tmp_path / "out")
    (tmp_path / "prompt.txt").write_text("über 東京", encoding="utf-8")
    assert run("--prompt", "über 東京") == run("--prompt", "FILE:prompt.txt") != run()
    assert run("--prompt", "caf\udce9 \x1b[31m").startswith("caf? \ufffd[31m")    # bytes of another encoding; a colour code
    assert run("--seed", "2") != run("--seed", "3") == run("--seed", "3")
    two = run("--num_samples", "2", "--seed", "2").split("-" * 20)
    assert [t.strip() for t in two] == [run("--seed", s).strip() for s in ("2", "3")]
    assert run("--max_new_tokens", "0", "--prompt", "x") == "x\n\n"
    (tmp_path / "out/best.pt").unlink()
    assert run() == run("--checkpoint", "out/last.pt")
    with pytest.raises(SystemExit):
        run("--top_q", "1")
    assert re.fullmatch("sample.py: error: .*--top_q.*\n", capsys.readouterr().err)
    for arguments, message in [(["--temperature", "-1"], "temperature"), (["--top_p", "2"], "top_p"), (["--top_k", "0"], "top_k"),
                               (["--max_new_tokens", "-5"], "max_new_tokens"), (["--prompt", "FILE:none"], "none"),
                               (["--checkpoint", "none.pt"], "none.pt"), (["--num_samples", "0"], "num_samples"),
                               (["--seed", "-1"], "seed")]:
        with pytest.raises(SystemExit, match=f"sample.py: error: .*{message}") as e:
            run(*arguments)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("mixer", ["memory", "mamba2", "attention"])
def test_a_saved_state_goes_on_as_if_never_stopped(mixer, corpus, tmp_path, capsys):
    """In pieces of 1, 9 and 30 tokens, each of which may end inside a character, and with a prompt in between."""
    train_py.train(settings(corpus, tmp_path / "out", max_steps=1, mixer=mixer, d_state=8))
    best, state = str(tmp_path / "out/best.pt"), str(tmp_path / "state.pt")
    capsys.readouterr()

    def run(*arguments, seed=0):
        sample_py.main(["--device", "cpu", "--checkpoint", best, "--temperature", "2", "--seed", str(seed), *map(str, arguments)])
        return capsys.readouterr().out

    whole, text, load = run("--prompt", "über", "--max_new_tokens", 40), "", ["--prompt", "über"]
    for n in (1, 9, 30):
        text += run(*load, "--max_new_tokens", n, "--save-state", state)[:-2]            # but for the two line ends
        load = ["--load-state", state]
    cut = "\N{REPLACEMENT CHARACTER}"                  # where a piece ended inside a character there is one too many
    assert text.replace(cut, "") == whole[:-2].replace(cut, "") and len(whole) > 20
    saved = (tmp_path / "state.pt").read_bytes()
    assert run(*load, "--prompt", "東", "--max_new_tokens", 5).startswith("東")
    assert (tmp_path / "state.pt").read_bytes() == saved                        # reading it does not change it
    (tmp_path / "cut.pt").write_bytes(saved[:900])
    train_py.train(settings(corpus, tmp_path / "other", max_steps=1, mixer=mixer, d_state=8, seed=5))
    for arguments, message in [(["--load-state", tmp_path / "cut.pt"], "cannot be read"),
                               (["--load-state", best], "not written by"),
                               (["--load-state", tmp_path / "no.pt"], "sample.py --save-state makes one"),
                               (["--save-state", state, "--num_samples", 2], "one text"),
                               (["--load-state", state, "--checkpoint", tmp_path / "other/best.pt"], "another model")]:
        with pytest.raises(SystemExit, match=f"sample.py: error: .*{message}") as e:
            run(*arguments)
        assert "\n" not in str(e.value)


def test_stream_never_cuts_a_character(corpus, capsys):
    """A model that says given bytes one token at a time: characters appear whole, what is no UTF-8 as U+FFFD."""
    enc = prepare.load_tokenizer(prepare.load(corpus)[2])
    said = "é東🙂".encode() + b"\xff" + b"a\x1b[2J"

    class Parrot:
        def generate(self, tokens, **_):
            for b in said:
                yield torch.tensor([enc.encode_single_token(bytes([b]))])
                shown = capsys.readouterr().out
                assert "\ufffd" not in shown or b in (0xff, 0x1b, 0x61), shown
                self.shown = getattr(self, "shown", "") + shown

    parrot = Parrot()
    made, _, _ = sample_py.stream(parrot, enc, "", "cpu", 0)
    assert parrot.shown == "é東🙂\ufffda\ufffd[2J" and made == len(said) - 1


def raw_text(g, n):
    """n bytes of all sorts: any bytes, control sequences, halves of characters, text."""
    controls = b"\x1b[2J\x1b]0;x\x07", b"\x9b31m", b"\xc2\x9b", b"\r", b"\0", b"\x7f"
    kinds = (lambda: g.randbytes(g.randrange(1, 20)), lambda: g.choice(controls),
             lambda: g.choice(WORDS).encode() + b" ", lambda: chr(g.randrange(0x110000)).encode("utf-8", "surrogatepass"),
             lambda: g.choice([b" ", b"\n", b"a", b"<|endoftext|>"]) * g.randrange(1, 50))
    raw = b""
    while len(raw) < n:
        raw += g.choice(kinds)()
    return raw


def shown(capsys):
    """What was printed, which must be nothing that steers a terminal."""
    out, err = capsys.readouterr()
    assert all(c.isprintable() or c in "\n\t" for c in out + err)
    return out, err


@pytest.mark.slow
def test_any_prompt_is_answered(run20, tmp_path, capsys, monkeypatch):
    """Any bytes, by file and by pipe, and lone surrogates, as the shell hands on what is no UTF-8."""
    g, n, answered = random.Random(0), 1000 if SLOW else 60, 0
    start = ["--checkpoint", str(run20[0] / "best.pt"), "--max_new_tokens", "3", "--device", "cpu"]
    for i in range(n):
        raw = raw_text(g, g.choice([0, 1, 30, 1000]))
        (tmp_path / "prompt").write_bytes(raw)
        if i % 3 == 0:
            prompt = f"FILE:{tmp_path / 'prompt'}"
        elif i % 3 == 1:
            prompt = "-"
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        else:
            prompt = os.fsdecode(raw.replace(b"\0", b""))
            if prompt == "-" or prompt.startswith(("FILE:", "-")):
                continue
        sample_py.main([*start, f"--prompt={prompt}", "--seed", str(i)])
        out, err = shown(capsys)
        assert "trained on a test corpus" in err and len(out) >= 1     # if the text does not end at once, also how fast
        answered += 1
    assert answered > 0.9 * n
    survived("prompts", prompts=answered)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "spaces", "one letter", "any bytes", "no spaces"])
def test_long_prompts(kind, run20, tmp_path, capsys):
    """Ten megabytes; 200 KB where FMEM_SLOW is not set."""
    size = 10**7 if SLOW else 2 * 10**5
    text = {"text": some_text(2000), "spaces": " ", "one letter": "a", "no spaces": "東京1905x"}.get(kind, "")
    raw = random.Random(0).randbytes(size) if kind == "any bytes" else (text * (size // len(text.encode()) + 1)).encode()[:size]
    (tmp_path / "prompt").write_bytes(raw + b"!" * (kind == "spaces"))
    prompt = f"--prompt=FILE:{tmp_path / 'prompt'}"
    sample_py.main(["--checkpoint", str(run20[0] / "best.pt"), "--max_new_tokens", "3", prompt])
    out, err = shown(capsys)
    assert "tokens/s" in err and len(out) > size / 5
    survived(f"long_prompt_{kind.replace(' ', '_')}", bytes=size)


VALUES = ["0", "a\nb", "-1", "nan", "inf", "1000000000000", "x", "", "1e400", "\udcff", "\x1b[2J"]


@pytest.mark.parametrize("program, option", [
    *(("sample", o) for o in ("checkpoint", "prompt", "num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "seed",
                              "device", "save-state", "load-state")),
    *(("eval", o) for o in ("long", "tokens", "data", "json", "figure", "device")), ("eval", None),
    *(("prepare", o) for o in ("input", "val", "out", "field", "tokenizer", "vocab_size", "workers", "shard_tokens", "check")),
    *(("bench", o) for o in ("out",)), *(("experiments", o) for o in ("jobs",))])
def test_absurd_values_for_the_other_programs(program, option, run20, corpus, tmp_path, capsys, monkeypatch):
    """Every option that takes a value, with every one of these: it works, or one line says what is wrong."""
    best = str(run20[0] / "best.pt")
    (tmp_path / "a.txt").write_text(some_text(300), encoding="utf-8")
    base = {"sample": {"checkpoint": best, "max_new_tokens": "2"}, "eval": {"tokens": "500"},
            "prepare": {"input": str(tmp_path / "a.txt"), "out": str(tmp_path / "out"), "vocab_size": "260"},
            "bench": {}, "experiments": {}}[program]
    main = {"sample": sample_py, "eval": eval_py, "prepare": prepare, "bench": bench, "experiments": experiments}[program].main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "table_forms", lambda quick: [])
    for table in ("table_memory", "table_growth", "table_step"):
        monkeypatch.setattr(bench, table, bench.table_forms)
    bench.table_forms.__doc__ = "no table"
    monkeypatch.setattr(experiments, "run", lambda names, jobs: None)
    for value in VALUES:
        if option in ("num_samples", "max_new_tokens") and len(value) > 9:
            continue                                    # that many were asked for
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        arguments = [f"--{k}={v}" for k, v in base.items() if k != option]
        arguments += {"eval": [value if option is None else best], "experiments": ["run"], "bench": ["--quick"]}.get(program, [])
        if program == "eval" and option == "figure":
            arguments.append("--routing")
        try:
            main(arguments + ([f"--{option}={value}"] if option else []))
        except SystemExit as e:
            said = e.code if isinstance(e.code, str) else capsys.readouterr().err.strip()
            assert re.match(r"(data/)?\w+\.py: error: ", said) and said.isprintable() and len(said) < 500, said
        out, _ = capsys.readouterr()
        assert "\x1b" not in out


# ----------------------------------------------------------------------------------------------- a stranger's machine

def without_rights():
    """For the child process: root without the capabilities that make it root to the file system; for others nothing."""
    import ctypes
    for capability in (1, 2, 3):                        # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)            # PR_CAPBSET_DROP


@pytest.fixture
def stranger(tmp_path):
    """Runs a program of a checkout that cannot be written to, with no network, compiler, home folder, Triton, matplotlib or
    pyarrow, in a folder of its own."""
    if not sys.platform.startswith("linux"):
        pytest.skip("takes rights away as Linux does")
    checkout, here, site = tmp_path / "checkout", tmp_path / "here", tmp_path / "site"
    for folder in (checkout / "data", here, site, tmp_path / "bin"):
        folder.mkdir(parents=True)
    for path in [*HERE.glob("*.py"), *HERE.glob("data/*.py")]:
        shutil.copy(path, checkout / path.relative_to(HERE))
    (site / "sitecustomize.py").write_text("""
import socket, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "matplotlib", "pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
def connect(self, *address):
    raise OSError("Network is unreachable")
socket.socket.connect = connect
""")
    for path in [checkout, *checkout.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def run(program, *arguments):
        env = {"PATH": str(tmp_path / "bin"), "HOME": "/nonexistent", "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(checkout / program), *map(str, arguments)]
        return subprocess.run(command, cwd=here, env=env, capture_output=True, encoding="utf-8", errors="replace", timeout=300,
                              preexec_fn=without_rights)
    run.here, run.checkout = here, checkout
    yield run
    for path in [here, checkout, *(p for p in tmp_path.rglob("*") if p.is_dir())]:
        path.chmod(0o755)                               # so that pytest can remove them


def test_on_a_strangers_machine(stranger):
    here = stranger.here
    (here / "mine.txt").write_text(some_text(3000), encoding="utf-8")
    short = ["--data", "d", "--n_layer", 1, "--d_model", 16, "--context", 16, "--batch_size", 2, "--max_steps", 3,
             "--sample_tokens", 2]
    for program, *arguments in (["data/prepare.py", "--input", "mine.txt", "--out", "d", "--vocab_size", 280],
                                ["train.py", *short, "--compile"], ["sample.py", "--max_new_tokens", 3],
                                ["eval.py", "out/best.pt", "--loss", "--json", "e.json"]):
        done = stranger(program, *arguments)
        assert done.returncode == 0, done.stderr
        assert program != "train.py" or "compile   no: " in done.stdout
    (here / "closed").mkdir()
    (here / "closed").chmod(0o555)
    shutil.copy(here / "out/best.pt", here / "secret.pt")
    (here / "secret.pt").chmod(0)
    shutil.copytree(here / "out", here / "frozen")
    (here / "frozen").chmod(0o555)
    frozen = (here / "frozen/last.pt").read_bytes()
    for message, program, *arguments in (
            ["cannot be written to; python data/prepare.py --out DIR", "train.py", "--out", "new"],
            ["Permission denied", "train.py", *short, "--out", "closed/out"],
            ["Permission denied", "train.py", "--resume", "--out", "frozen", "--max_steps", 5],
            ["Permission denied", "sample.py", "--checkpoint", "secret.pt"],
            ["Permission denied", "sample.py", "--prompt", "FILE:secret.pt"],
            ["Permission denied", "sample.py", "--max_new_tokens", 2, "--save-state", "closed/s"],
            ["Permission denied", "eval.py", "out/best.pt", "--json", "closed/e.json"],
            ["needs matplotlib: pip install", "eval.py", "out/best.pt", "--routing", "--tokens", 100, "--figure", "f.png"],
            ["cannot be written to", "data/prepare.py", "--input", "mine.txt", "--out", "closed/d"],
            ["Permission denied", "data/prepare.py", "--input", "secret.pt", "--out", "e"]):
        done = stranger(program, *arguments)
        assert done.returncode == 1, (program, arguments, done.stdout, done.stderr)
        said = done.stderr.strip().splitlines()[-1]
        assert re.match(rf"{program}: error: .*{re.escape(message)}", said) and "Traceback" not in done.stderr, done.stderr
    assert (here / "frozen/last.pt").read_bytes() == frozen


def test_a_small_disk(run20, corpus, tmp_path):
    """A file system of one megabyte, really full: every program that writes ends with one line, and what was there stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "big.txt").write_text(some_text(400_000), encoding="utf-8")
    script = tmp_path / "script.sh"
    run, python, best = tmp_path / "run", sys.executable, run20[0] / "best.pt"
    shutil.copytree(run20[0], run)
    script.write_text(f"""
mount -t tmpfs -o size=1m none {disk} || exit 77
cp {run}/last.pt {run}/best.pt {run}/log.csv {disk}/
sha256sum {disk}/last.pt {disk}/best.pt
head -c 2000000 /dev/zero > {disk}/filler 2> /dev/null
{python} {HERE}/train.py --out {disk} --resume --max_steps 30; echo code $? >&2
{python} {HERE}/sample.py --checkpoint {best} --max_new_tokens 3 --save-state {disk}/s > /dev/null; echo code $? >&2
{python} {HERE}/eval.py {best} --json {disk}/e.json > /dev/null; echo code $? >&2
rm {disk}/filler
{python} {HERE}/data/prepare.py --input {tmp_path}/big.txt --out {disk}/d --vocab_size 260 > /dev/null; echo code $? >&2
sha256sum {disk}/last.pt {disk}/best.pt
ls -A {disk}
{python} {HERE}/train.py --out {disk} --resume --max_steps 22 > /dev/null; echo code $? >&2
""")
    if not shutil.which("unshare"):
        pytest.skip("needs unshare, to mount a file system of its own")
    done = subprocess.run(["unshare", "-rm", "sh", str(script)], capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine does not let one mount a file system")
    errors = done.stderr.splitlines()
    programs = [line for line in errors if ": error: " in line]
    assert [line.split(":")[0] for line in programs] == ["train.py", "sample.py", "eval.py", "data/prepare.py"], done.stderr
    assert all("No space left" in line for line in programs), done.stderr
    assert [line for line in errors if line.startswith("code")] == ["code 1"] * 4 + ["code 0"], done.stderr
    sums = re.findall(r"^([0-9a-f]{64})  (.*)", done.stdout, flags=re.M)
    assert sums[:2] == sums[2:] and len(sums) == 4
    assert not re.search(r"^\..*(tmp|part|lock)", done.stdout, flags=re.M), done.stdout


# ----------------------------------------------------------------------------- other mixers, extensions and ablations

MIXERS = {"attention": dict(mixer="attention", n_head=4, n_kv_head=2), "mamba2": dict(mixer="mamba2", n_head=2, d_state=5),
          "conv": dict(conv=3), "gate": dict(gate=True), "both": dict(conv=4, gate=True, k_rows=None)}
ABLATIONS = "eta=1", "mu=1", "eta=0.8", "mu=0.8", "untied", "norm_after", "no_renorm", "balance=0.01"


def mixer64(**changes):
    """A layer in float64 with all of its weights drawn, those that start at a constant included."""
    layer = fmem.make_mixer(tiny(d_mlp=32, **changes)).double()
    layer.init_weights(lambda weight, scale=1.0: torch.nn.init.normal_(weight, std=scale / weight.shape[1] ** 0.5), 1.0)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith(("w_", "D", "norm", "gate_norm")):
                p.add_(torch.randn_like(p))
    return layer


def attention_reference(layer, x):
    """LLaMA's attention for one text, query by query, rotations as complex numbers."""
    H, D, n_kv = layer.n_head, layer.D, layer.n_kv
    positions = torch.arange(len(x), dtype=torch.float64)
    turn = torch.polar(torch.ones(len(x), D // 2, dtype=torch.float64),
                       positions[:, None] * 10000.0 ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D))

    def rotated(v):
        z = torch.complex(v[:, :D // 2], v[:, D // 2:]) * turn
        return torch.cat([z.real, z.imag], -1)

    heads = []
    for i in range(H):
        j = i * n_kv // H                               # queries share keys and values with their neighbours
        q = rotated(x @ layer.W_q.weight[i * D:(i + 1) * D].T)
        k = rotated(x @ layer.W_k.weight[j * D:(j + 1) * D].T)
        v = x @ layer.W_v.weight[j * D:(j + 1) * D].T
        heads.append(torch.stack([torch.softmax(k[:t + 1] @ q[t] / D**0.5, 0) @ v[:t + 1] for t in range(len(x))]))
    return torch.cat(heads, -1) @ layer.W_o.weight.T


def conv_reference(conv, x):
    """Each channel by itself: bias + sum_j weight[j] x[t - width + 1 + j], then x sigmoid(x)."""
    w, padded = conv.weight.shape[1], torch.cat([torch.zeros_like(x[:1]).expand(conv.weight.shape[1] - 1, -1), x])
    u = torch.stack([conv.bias + sum(conv.weight[:, j] * padded[t + j] for j in range(w)) for t in range(len(x))])
    return u * torch.sigmoid(u)


def mamba2_reference(layer, x):
    """Mamba-2's equations for one text, token by token and head by head."""
    inner, N, H, P = layer.P * layer.H, layer.N, layer.H, layer.P
    projected = x @ layer.W_in.weight.T
    z, u, delta = projected[:, :inner], projected[:, inner:-H], projected[:, -H:]
    u = conv_reference(layer.conv, u)
    delta = torch.log1p(torch.exp(delta + layer.delta_bias))
    S, ys = [x.new_zeros(P, N) for _ in range(H)], []
    for t in range(len(x)):
        X, B, C = u[t, :inner], u[t, inner:inner + N], u[t, inner + N:]
        out = []
        for i in range(H):
            X_i, A = X[i * P:(i + 1) * P], -torch.exp(layer.A_log[i])
            S[i] = torch.exp(delta[t, i] * A) * S[i] + delta[t, i] * torch.outer(X_i, B)
            out.append(S[i] @ C + layer.D[i] * X_i)
        Y = torch.cat(out) * z[t] * torch.sigmoid(z[t])
        ys.append(layer.W_o.weight @ (Y / torch.sqrt((Y * Y).mean() + layer.config.norm_eps) * layer.norm.weight))
    return torch.stack(ys)


def extended_reference(layer, x):
    """ExtendedMemory's equation around the plain memory's read."""
    u = conv_reference(layer.conv, x) if layer.config.conv else x
    y = layer.read(u[None], None)[0][0]
    if layer.config.gate:
        g = x @ layer.W_g.weight.T
        y = y * g * torch.sigmoid(g)
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + layer.config.norm_eps) * layer.gate_norm.weight
    return y @ layer.W_o.weight.T


@pytest.mark.parametrize("T", [1, 3, 64, 65, 130])              # chunks of Mamba-2 are 64
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_are_their_equations(name, T):
    """Outputs and the gradients of all weights and of the input, in float64."""
    layer = mixer64(**MIXERS[name])
    reference_of = {"attention": attention_reference, "mamba2": mamba2_reference}.get(name, extended_reference)
    x = torch.randn(2, T, 16, dtype=torch.float64, requires_grad=True)
    leaves, weigh = [x, *layer.parameters()], torch.randn(2, T, 16, dtype=torch.float64)
    y = layer(x)[0]
    want = torch.stack([reference_of(layer, text) for text in x])
    got = [y, *torch.autograd.grad((y * weigh).sum(), leaves)]
    want = [want, *torch.autograd.grad((want * weigh).sum(), leaves)]
    errors = [error(a, b, 1e-3) for a, b in zip(got, want, strict=True)]     # at T = 1 some gradients are 0
    assert all(e < 1e-10 for e in errors)


@pytest.mark.parametrize("name", [*MIXERS, *ABLATIONS])
def test_mixers_split_anywhere_and_their_state_can_be_saved(name):
    """One pass = pieces = steps, the state through torch.save in between; and a state given to forward is not changed."""
    layer = mixer64(**MIXERS.get(name, dict(ablation=name))).eval()
    x = torch.randn(2, 150, 16, dtype=torch.float64)
    whole = layer(x)[0]
    with torch.no_grad():
        y, state = layer(x[:, :70])
        parts = [y]
        for t in range(70, 80):
            y, state = layer.step(x[:, t], state)
            parts.append(y[:, None])
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        again = torch.load(file, weights_only=True)
        rest, after = layer(x[:, 80:], state)
        assert torch.equal(rest, layer(x[:, 80:], again)[0]) and same(state, again)
        assert error(torch.cat([*parts, rest], 1), whole) < 1e-7        # TINY = 2e-9 where eta is 1
        assert error(layer.step(x[:, 80], again)[0], rest[:, 0]) < 1e-7
    x.requires_grad_()
    y, state = layer.step(x[:, 0])                                      # and gradients go through steps
    y, state = layer.step(x[:, 1], state)
    assert torch.autograd.grad(y.sum(), x)[0][:, 0].abs().sum() > 0


@pytest.mark.parametrize("name", MIXERS)
def test_generate_with_every_mixer(name):
    """The likeliest token, one at a time, is that of the whole text read anew."""
    model = FMem(tiny(**MIXERS[name])).double().eval()
    tokens = torch.randint(50, (2, 9))
    for token in model.generate(tokens, 12, temperature=0):
        assert torch.equal(token, model(tokens)[0][:, -1].argmax(-1))
        tokens = torch.cat([tokens, token[:, None]], 1)


def test_attention_is_that_of_transformers():
    """The whole model against LlamaForCausalLM with the same weights (which rotates and normalises in float32)."""
    transformers = pytest.importorskip("transformers", reason="the transformers package is not installed")
    ours = FMem(tiny(d_model=48, mixer="attention", n_head=6, n_kv_head=2, d_mlp=80)).double()
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=50, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=True)).double()
    names = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    parts = {"memory_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "memory.W_q": "self_attn.q_proj",
             "memory.W_k": "self_attn.k_proj", "memory.W_v": "self_attn.v_proj", "memory.W_o": "self_attn.o_proj",
             "mlp.W_gate": "mlp.gate_proj", "mlp.W_up": "mlp.up_proj", "mlp.W_down": "mlp.down_proj"}
    names |= {f"blocks.{i}.{a}": f"model.layers.{i}.{b}" for i in range(2) for a, b in parts.items()}
    llama.load_state_dict({names[k.removesuffix(".weight")] + ".weight": v for k, v in ours.state_dict().items()})
    tokens = torch.randint(50, (2, 37))
    assert error(ours(tokens)[0], llama(tokens).logits) < 2e-6


def test_mamba2_is_that_of_transformers():
    """The layer against Mamba2Mixer with the same weights (which computes in float32)."""
    pytest.importorskip("transformers", reason="the transformers package is not installed")
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    ours = mixer64(d_model=32, mixer="mamba2", n_head=4, d_state=16)
    config = Mamba2Config(hidden_size=32, num_heads=4, head_dim=16, state_size=16, n_groups=1, expand=2, conv_kernel=4,
                          layer_norm_epsilon=1e-5, chunk_size=16, use_bias=False)
    theirs = Mamba2Mixer(config, 0).double()
    names = {"W_in.weight": "in_proj.weight", "conv.weight": "conv1d.weight", "conv.bias": "conv1d.bias", "delta_bias": "dt_bias",
             "W_o.weight": "out_proj.weight"}
    weights = {names.get(k, k): v for k, v in ours.state_dict().items()}
    weights["conv1d.weight"] = weights["conv1d.weight"][:, None]
    theirs.load_state_dict(weights)
    x = torch.randn(2, 37, 32, dtype=torch.float64)
    assert error(ours(x)[0], theirs(x)) < 2e-6


@pytest.mark.parametrize("size", [dict(d_model=128, n_rows=32), dict(d_model=192, n_rows=32), dict(d_model=384, n_rows=64)])
def test_mixers_have_as_many_parameters(size):
    def parameters(**changes):
        config = FMemConfig(n_layer=5, **size, **changes)
        with torch.device("meta"):
            counted = sum(p.numel() for p in FMem(config).parameters())
        assert counted == config.n_parameters()
        return counted
    plain = parameters()
    for changes in (dict(mixer="attention"), dict(mixer="mamba2"), dict(conv=4, gate=True), dict(gate=True), dict(conv=4),
                    *(dict(ablation=a) for a in ABLATIONS)):
        assert parameters(**changes) == pytest.approx(plain, rel=0.02)
    assert parameters(mixer="mamba2", d_mlp=8) < 0.9 * plain           # a width that is asked for is taken


def test_mamba2_starts_as_its_authors_start_it():
    layer = fmem.make_mixer(FMemConfig(d_model=2048, mixer="mamba2", d_mlp=8))
    layer.init_weights(lambda weight, scale=1.0: None, 1.0)
    delta, A = F.softplus(layer.delta_bias), layer.A_log.exp()
    assert delta.min() >= 0.99e-3 and delta.max() <= 0.101 and 0.005 < delta.median() < 0.02    # log-uniform
    assert A.min() >= 1 and A.max() <= 16 and 6 < A.mean() < 11 and (layer.D == 1).all()


def test_ablations_do_what_they_say():
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    for name, rate in (("eta=1", "theta"), ("mu=1", "phi")):
        theta, phi, _ = mixer64(ablation=name).route(x)
        assert torch.allclose({"theta": theta, "phi": phi}[rate].sum(-1), torch.ones(2, 20, dtype=torch.float64))
    for name, which in (("eta=0.8", 0), ("mu=0.8", 1)):
        layer = FMem(tiny(ablation=name)).blocks[0].memory
        assert layer.route(x.float() * 0)[which].sum(-1).mean().item() == pytest.approx(0.8)
    layer = mixer64(ablation="untied")
    theta, phi, _ = layer.route(x)
    assert torch.equal((theta > 0).sum(-1), torch.full((2, 20), 3)) and not torch.equal(theta > 0, phi > 0)
    layer = mixer64(ablation="no_renorm")
    theta, phi, _ = layer.route(x)
    top = torch.softmax(layer.W_alpha(x) / 0.5, -1).topk(3, -1).values.sum(-1)
    assert torch.allclose(theta.sum(-1), torch.sigmoid(layer.w_eta(x))[..., 0] * top)
    layer = mixer64(ablation="norm_after")
    theta, alpha, _ = layer.route(x)
    h, mu = torch.zeros(2, 8, 24, dtype=torch.float64), torch.sigmoid(layer.w_mu(x))
    for t in range(20):
        h = (1 - theta[:, t, :, None]) * h + theta[:, t, :, None] * layer.W_i(x[:, t])[:, None]
        y = (alpha[:, t, None] @ h)[:, 0]
        y = mu[:, t] * y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-5)
        assert error(layer(x)[0][:, t], y @ layer.W_o.weight.T) < 1e-6          # eps = 1e16 drowns the lengths
    layer = mixer64(ablation="balance=0.5")
    layer.W_alpha.weight.data.zero_()
    layer(x)
    assert layer.aux_loss.item() == pytest.approx(0.5)                          # flat affinities: m sum_i share_i / m = 1
    model = FMem(tiny(ablation="balance=0.5"))
    model(torch.randint(50, (2, 9)))
    assert model.aux_loss() == sum(block.memory.aux_loss for block in model.blocks) and FMem(tiny()).aux_loss() == 0


@pytest.mark.parametrize("changes, message", [
    (dict(mixer="rnn"), "mixer"), (dict(conv=-1), "conv"), (dict(gate=1), "gate"), (dict(mixer="attention", n_head=3), "n_head"),
    (dict(mixer="attention", n_head=4, n_kv_head=3), "n_kv_head"), (dict(mixer="mamba2", n_head=3), "n_head"),
    (dict(mixer="attention", n_head=16), "even"), (dict(n_head=0), "n_head"), (dict(mixer="mamba2", gate=True), "do not go with"),
    (dict(ablation="eta"), "eta=NUMBER"), (dict(ablation="eta=2"), "eta=NUMBER"), (dict(ablation="mu=x"), "mu=NUMBER"),
    (dict(ablation="untied=1"), "untied"), (dict(ablation="tau=1"), "not one of"), (dict(d_state=0), "d_state"),
    (dict(mixer="mamba2", d_state=9999), "set d_mlp")])
def test_config_of_mixers_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        FMem(tiny(**changes))


@pytest.mark.parametrize("name", [*MIXERS, "balance=0.01"])
def test_training_with_every_mixer(name, corpus, tmp_path):
    """It learns; and a resumed run is the unbroken one, bit for bit."""
    given = settings(corpus, tmp_path / "whole", max_steps=6, eval_every=3, **MIXERS.get(name, dict(ablation=name)))
    given |= {"n_head": None, "n_kv_head": None, "d_state": 8, "k_rows": 2}
    whole = train_py.train(given)
    losses = [loss for _, loss in log_rows(given["out"], "train_loss")]
    assert losses[-1] < losses[0] - 0.1
    shutil.copytree(given["out"], tmp_path / "half")
    half = train_py.train({**given, "out": str(tmp_path / "half"), "overwrite": True, "keep_every": 3})
    shutil.copy(tmp_path / "half/step-3.pt", tmp_path / "half/last.pt")
    resumed = train_py.train({"out": str(tmp_path / "half"), "resume": True})
    assert same(half["model"], whole["model"]) and same(resumed["model"], whole["model"])
    model = train_py.model_from(resumed, "cpu")
    assert same(model.state_dict(), whole["model"])


@pytest.mark.parametrize("mixer", [dict(), dict(conv=3, gate=True), dict(mixer="mamba2", d_state=8)])
def test_carry_state_reads_one_long_text(mixer, corpus, tmp_path):
    """With a learning rate of next to nothing the losses are those of the whole streams, read in one go."""
    given = settings(corpus, tmp_path / "out", max_steps=10, eval_every=3, carry_state=True, lr=1e-12, dropout=0.0, micro_batch=2,
                     weight_decay=0.0, **mixer)
    checkpoint = train_py.train(given)
    model, tokens = train_py.model_from(checkpoint, "cpu"), prepare.load(corpus)[0]
    batches = train_py.Streams(tokens, 24, 4, 1337)
    assert batches.steps > 10 and batches.begins(0) and not batches.begins(10) and batches.begins(batches.steps)
    streams = torch.cat([batches(0)[:, :-1], *(batches(i)[:, :-1] for i in range(1, 10)), batches(9)[:, -1:]], 1)
    with torch.no_grad():
        losses = F.cross_entropy(model(streams[:, :-1])[0].transpose(1, 2), streams[:, 1:], reduction="none")
    want = losses.view(4, 10, 24).mean((0, 2)).tolist()
    got = [loss for _, loss in log_rows(given["out"], "train_loss")]
    assert got == pytest.approx(want, rel=2e-5)                         # log.csv keeps 6 digits
    fresh = F.cross_entropy(model(streams[:, 216:240])[0].transpose(1, 2), streams[:, 217:241]).item()
    assert abs(fresh - want[9]) > 1e-4                                  # and the state does matter
    resumed = train_py.load_checkpoint(tmp_path / "out/last.pt")
    given |= {"out": str(tmp_path / "two"), "max_steps": 6}
    train_py.train(given)
    resumed = train_py.train({"out": given["out"], "resume": True, "max_steps": 10})
    assert same(resumed["states"], checkpoint["states"])                # the states are in the checkpoint


def test_carry_state_says_where_it_cannot_be(corpus, tmp_path):
    for options, message in ((dict(mixer="attention"), "does not grow"), (dict(data="mqar"), "for text"),
                             (dict(batch_size=10**6, micro_batch=1), "--batch_size must be at most")):
        with pytest.raises(ValueError, match=message):
            train_py.train(settings(corpus, tmp_path / "out", carry_state=True, **options))


def test_the_balancing_loss_is_trained_on(corpus, tmp_path):
    routers = []
    for weight in ("1e-9", "10"):
        given = settings(corpus, tmp_path / weight, max_steps=3, ablation=f"balance={weight}", clip=1e9)
        routers.append(train_py.train(given)["model"]["blocks.0.memory.W_alpha.weight"])
    assert error(*routers) > 0.01


def test_keep_every(corpus, tmp_path):
    given = settings(corpus, tmp_path / "out", max_steps=5, keep_every=2)
    train_py.train(given)
    kept = sorted(tmp_path.glob("out/step-*.pt"))
    assert [p.name for p in kept] == ["step-0.pt", "step-2.pt", "step-4.pt"]
    assert [train_py.load_checkpoint(p)["step"] for p in kept] == [0, 2, 4]
    train_py.train({**given, "overwrite": True, "keep_every": None})
    assert not list(tmp_path.glob("out/step-*.pt"))                     # nothing is left of the run before


def test_router_lr(corpus, tmp_path):
    """W_alpha alone moves at its own rate, and a resumed run keeps it. AdamW's first step is the learning rate's size."""
    moved = {}
    for times in (1.0, 3.0):
        given = settings(corpus, tmp_path / str(times), max_steps=1, router_lr=times, weight_decay=0.0, keep_every=1)
        after = train_py.train(given)["model"]
        before = train_py.load_checkpoint(tmp_path / str(times) / "step-0.pt")["model"]
        moved[times] = {k: (after[k] - before[k]).abs().median().item() for k in after}
        train_py.train({"out": given["out"], "resume": True, "max_steps": 2})
    for k in moved[1.0]:
        assert moved[3.0][k] == pytest.approx(moved[1.0][k] * (3 if k.endswith("W_alpha.weight") else 1), rel=0.01)


def test_a_checkpoint_from_before_the_mixers_goes_on(run20, tmp_path):
    """Fields that are younger than a checkpoint have their defaults."""
    old = train_py.load_checkpoint(run20[0] / "last.pt")
    young = ("mixer", "conv", "gate", "n_head", "n_kv_head", "d_state", "ablation")
    for name in young:
        del old["config"][name], old["settings"][name]
    del old["settings"]["router_lr"], old["settings"]["keep_every"]
    (tmp_path / "out").mkdir()
    train_py.save_checkpoint(old, tmp_path / "out/last.pt")
    assert train_py.train({"out": str(tmp_path / "out"), "resume": True, "max_steps": 21})["step"] == 21
    assert train_py.model_from(old, "cpu").config.mixer == "memory"


# ------------------------------------------------------------------------------------------------------- recall and eval

def test_recall_windows():
    task = recall.Recall("mqar", 64, batch_size=40, seed=3)
    windows = task(5)
    assert torch.equal(windows, task(5)) and torch.equal(windows[10:20], task(5, slice(10, 20)))
    assert not torch.equal(windows, task(6))
    counts = Counter()
    for window, targets in zip(windows.tolist(), task.targets(windows).tolist(), strict=True):
        ask = window.index(recall.ASK)
        pairs = dict(zip(window[:ask:2], window[1:ask:2], strict=True))
        counts[len(pairs)] += 1
        asked = [(key, want) for key, want in zip(window, targets, strict=False) if want >= 0]
        asked = Counter(asked)
        assert ask == 2 * len(pairs) and set(asked) == set(pairs.items())       # every key, with its own value,
        assert max(asked.values()) - min(asked.values()) <= 1                   # over and over
    assert set(counts) == {4, 8, 16}
    window = task.make(np.random.default_rng(0), 1, 5)                          # in a test once
    assert window[0].tolist().count(recall.FILL) == 65 - 21 and (task.targets(window) >= 0).sum() == 5
    task = recall.Recall("passkey", 40, batch_size=40, seed=3)
    for window, targets in zip(task(0).tolist(), task.targets(task(0)).tolist(), strict=True):
        at = window.index(recall.HERE)
        assert window[at + 1:at + 5] == window[-4:] == [t for t in targets if t >= 0] == targets[-4:]
        assert window[-5] == recall.ASK
    assert task.make(np.random.default_rng(0), 1, 31)[0, 0] == recall.HERE
    for name, hard in (("mqar", 17), ("passkey", 32)):
        with pytest.raises(ValueError, match="room for"):
            recall.Recall(name, 64 if name == "mqar" else 40).make(np.random.default_rng(0), 1, hard)
        with pytest.raises(ValueError, match="--context of at least"):
            recall.Recall(name, 3)


def test_recall_is_scored_right():
    """A model that knows the answers has all of them right, one that guesses a value 1 in 128."""
    class Oracle(torch.nn.Module):
        def __init__(self, knows):
            super().__init__()
            self.knows, self.seen = knows, []

        def hidden(self, tokens, state):
            before = tokens if state is None else torch.cat([state, tokens], 1)     # in pieces: the past is the state
            return self.answer(before)[:, -tokens.shape[1]:], before

        def answer(self, tokens):
            logits = torch.zeros(*tokens.shape, recall.VOCAB)
            for b, text in enumerate(tokens.tolist()):
                known = dict(itertools.pairwise(text)) if self.knows else {}
                for t, token in enumerate(text):
                    if recall.ASK in text[:t]:
                        logits[b, t, dict(itertools.pairwise(text)).get(token, 128) if known else 128] = 99.0
            return logits

        def head(self, x):
            return x

    task = recall.Recall("mqar", 64)
    for knows, right in ((True, 1.0), (False, 1 / 128)):
        nats, got = task.evaluate(Oracle(knows), torch.device("cpu"), contextlib.nullcontext, windows=64, hard=16, piece=20)
        assert got == pytest.approx(right, abs=0 if knows else 0.012) and (nats < 1e-6) == knows    # 1,024 answers


@pytest.fixture(scope="session")
def recall_runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("recall")
    for task in recall.TASKS:
        train_py.train(settings(task, out / task, context=32, max_steps=4, eval_every=4, k_rows=2))
    return out


def test_training_on_recall(recall_runs, tmp_path, capsys):
    checkpoint = train_py.load_checkpoint(recall_runs / "mqar/best.pt")
    assert checkpoint["corpus"] == "mqar" and checkpoint["tokenizer"] is None
    assert len(log_rows(recall_runs / "mqar", "val_accuracy")) == 2
    assert 4.5 < log_rows(recall_runs / "mqar", "val_loss")[-1][1] < 6          # ln 128 = 4.85, ln 259 = 5.56
    for task, key in (("mqar", "pairs"), ("passkey", "distance")):
        eval_py.main([str(recall_runs / task / "best.pt"), "--recall", "--json", str(tmp_path / "a.json")])
        rows = json.loads((tmp_path / "a.json").read_text())["recall"]["rows"]
        assert [r[key] for r in rows] == ([4, 8] if task == "mqar" else [23, 119, 503, 4087])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="eval.py --recall|--recall tests it"):
        sample_py.main(["--checkpoint", str(recall_runs / "mqar/best.pt")])
    with pytest.raises(SystemExit, match="trained on mqar"):
        eval_py.main([str(recall_runs / "mqar/best.pt"), "--routing"])


def test_eval_losses_are_those_of_the_training(run20, corpus):
    checkpoint = train_py.load_checkpoint(run20[0] / "last.pt")
    model = train_py.model_from(checkpoint, "cpu")
    _, val, *_ = prepare.load(corpus)
    tokens = torch.from_numpy(val[:97].astype(np.int64))
    for length in (24, 96):
        losses = eval_py.token_losses(model, tokens, length, torch.device("cpu"), at_once=40)       # two windows, or half of one
        want = [F.cross_entropy(model(tokens[a:a + length][None])[0][0], tokens[a + 1:a + length + 1], reduction="none")
                for a in range(0, 96, length)]
        assert error(losses, torch.cat(want)) < 1e-6
    got = eval_py.measure_loss(model, checkpoint, None, torch.device("cpu"))
    assert got["nats"] == pytest.approx(log_rows(run20[0], "val_loss")[-1][1], rel=1e-5)       # log.csv keeps 6 digits
    count = [r["to"] - r["from"] + 1 for r in got["by_position"]]
    mean = sum(n * r["nats"] for n, r in zip(count, got["by_position"], strict=True)) / sum(count)
    assert sum(count) == 24 and mean == pytest.approx(got["nats"], rel=0.02)                   # but for the last, short window


def test_eval_long(run20, corpus, monkeypatch):
    """Without a memory the length of the window cannot matter; one that reads the wrong thing further on shows."""
    checkpoint = train_py.load_checkpoint(run20[0] / "last.pt")
    checkpoint["settings"]["context"] = 32
    model = train_py.model_from(checkpoint, "cpu")
    cpu = torch.device("cpu")
    for block in model.blocks:
        block.memory.W_o.weight.data.zero_()
    result = eval_py.measure_long(model, checkpoint, None, cpu, 8, 10**9)
    assert [r["length"] for r in result["rows"]] == [32, 64, 128, 256]
    assert all(abs(r["position"] - result["base"]) < 1e-5 for r in result["rows"])
    assert all(abs(r["mean"] - result["rows"][0]["mean"]) < 1e-5 for r in result["rows"])
    losses = eval_py.token_losses

    def worse(model, tokens, length, device):                           # a nat more from the 33rd token on
        return losses(model, tokens, length, device) + (torch.arange(len(tokens) - 1) % length >= 32)

    monkeypatch.setattr(eval_py, "token_losses", worse)
    result = eval_py.measure_long(model, checkpoint, None, cpu, 8, 10**9)
    for r, beyond in zip(result["rows"], (0, 1, 1, 1), strict=True):
        assert r["position"] - result["base"] == pytest.approx(beyond, abs=1e-5)
        assert r["mean"] - result["rows"][0]["mean"] == pytest.approx(1 - 32 / r["length"], abs=1e-5)
    with pytest.raises(ValueError, match="at most"):
        eval_py.measure_long(model, checkpoint, None, cpu, 10**6, 10**9)


def test_eval_repeat_sees_a_copy(run20, monkeypatch):
    """A model that copies foresees a passage the second time, at the distances that it can look back."""
    checkpoint = train_py.load_checkpoint(run20[0] / "last.pt")
    vocab = checkpoint["config"]["vocab_size"]

    def copier(tokens, state=None):
        logits = torch.zeros(*tokens.shape, vocab)
        for b, text in enumerate(tokens.tolist()):
            for t in range(1, len(text)):
                back = [s for s in range(max(1, t - 200), t) if text[s - 1:s + 1] == text[t - 1:t + 1]]
                if back:
                    logits[b, t, text[back[0] + 1]] = 9.0
        return logits, state

    rows = eval_py.measure_recall(copier, checkpoint, None, torch.device("cpu"))["rows"]
    gains = {r["distance"]: r["first"] - r["second"] for r in rows}
    assert gains[0] > 2 and gains[64] > 2 and abs(gains[256]) < 1.5 and gains[0] > gains[256] + 1


def test_eval_routing(run20, corpus):
    """On a memory whose affinities are known."""
    checkpoint = train_py.load_checkpoint(run20[0] / "last.pt")
    n, m, context = 960, 8, 24
    tokens = torch.randint(100, (n,))
    words = list(map(str, range(200)))
    eta, flat = torch.full((n,), 0.5, dtype=torch.float64), torch.full((n, m), 1 / m, dtype=torch.float64)
    hard = F.one_hot(tokens % 4, m).double()                            # the token alone decides, half of the rows are dead
    got = eval_py.describe(flat, hard, eta, eta, tokens, context, words)
    assert got["entropy"] == pytest.approx(math.log(m)) and got["rows_per_token"] == pytest.approx(1)
    assert got["rows_used"] == pytest.approx(4, rel=0.02) and got["dead"] == 0.5 and got["told_by_token"] > 0.98
    assert got["moves"] == pytest.approx(0.75, abs=0.06) and got["moves_if_random"] == pytest.approx(0.75, abs=0.01)
    assert got["told_by_most_common"] < 0.35 and got["eta"] == [0.5, pytest.approx(0)]
    assert all(int(word) % 4 == row for row, kept in enumerate(got["collected"]) for word in kept)
    # a write of 1/2 to a quarter of the tokens: ln 2 / (ln 2 / 4) = 4 tokens
    assert got["half_life"][0] == pytest.approx(4, rel=0.2) and got["half_life"][-1] > 1e9
    same_row = F.one_hot(torch.zeros(n, dtype=torch.long), m).double()
    got = eval_py.describe(flat, same_row, eta, eta, tokens, context, words)
    assert got["moves"] == 0 and got["rows_used"] == pytest.approx(1) and got["told_by_most_common"] == 1
    # tokens that the first half of the text does not have tell nothing
    assert eval_py.describe(flat, hard, eta, eta, torch.arange(n), context, list(map(str, range(n))))["told_by_token"] < 0.3
    # and what is recorded is what the layer does
    model = train_py.model_from(checkpoint, "cpu")
    seen = eval_py.record_routing(model, tokens[:48] % 50, context, torch.device("cpu"))
    soft, alpha, eta, mu = seen[0]
    assert soft.shape == alpha.shape == (48, 8) and torch.allclose(soft.sum(-1), torch.ones(48).double())
    assert ((alpha > 0).sum(-1) == 2).all() and torch.allclose(alpha.sum(-1), torch.ones(48).double(), atol=1e-6)
    x = model.blocks[0].memory_norm(model.embed(tokens[:24] % 50))
    theta, _, rows = model.blocks[0].memory.route(x)
    assert torch.allclose((alpha * eta[:, None])[:24].gather(-1, rows), theta.double(), atol=1e-6)
    assert "route" not in vars(model.blocks[0].memory)                  # nobody watches any more


def test_eval_command(run20, corpus, recall_runs, tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, HERE / "eval.py", *map(str, arguments)], capture_output=True, encoding="utf-8",
                              errors="replace")
    best = run20[0] / "best.pt"
    everything = [best, "--loss", "--long", 2, "--recall", "--routing"]
    figure = importlib.util.find_spec("matplotlib") is not None
    if figure:
        everything += ["--figure", tmp_path / "f.png"]
    else:
        assert "pip install matplotlib" in run(best, "--routing", "--figure", tmp_path / "f.png").stderr
    twice = [run(*everything, "--json", tmp_path / f"{i}.json") for i in range(2)]
    assert twice[0].returncode == 0, twice[0].stderr
    assert twice[0].stdout == twice[1].stdout and (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()
    assert set(json.loads((tmp_path / "0.json").read_text())) == {"loss", "long", "recall", "routing"}
    assert len(list(tmp_path.glob("f-*.png"))) == (3 if figure else 0)
    for arguments, message in [([tmp_path / "no.pt"], "does not exist"), ([best, "--long", 0], "--long"),
                               ([best, "--tokens", 0], "--tokens"), ([best, "--long", 10**7], "at most"),
                               ([best, "--data", tmp_path], "prepare"), ([best, "--x"], "--x"),
                               ([recall_runs / "mqar/best.pt", "--loss"], "mqar"),
                               ([best, "--json", tmp_path / "no/f.json"], "No such file")]:
        done = run(*arguments)
        assert done.returncode != 0 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_experiments_are_run_once_and_taken_up_again(corpus, tmp_path, monkeypatch, capsys):
    size = "--n_layer 1 --d_model 16 --n_rows 8 --k_rows 2 --context 24 --batch_size 4 --eval_every 2 --log_every 1"
    train_one = f"python train.py --data {corpus} {size} --max_steps 6 --device cpu --sample_tokens 0"
    commands = {"a/one": train_one, "b/wrong": "python train.py --nonsense 1",
                "c/one": f"python eval.py {tmp_path}/a/one/last.pt --loss"}
    monkeypatch.setattr(experiments, "experiments", lambda: commands)
    monkeypatch.setattr(experiments, "OUT", tmp_path)
    monkeypatch.setattr(experiments, "LINES", tmp_path / "lines.jsonl")
    # a run that was stopped after two steps
    half = [*train_one.split()[2:], "--out", str(tmp_path / "a/one"), "--max_steps", "2"]
    train_py.train(train_py.parse(half))
    done = train_py.load_checkpoint(tmp_path / "a/one/last.pt")
    done["settings"]["max_steps"] = 6
    train_py.save_checkpoint(done, tmp_path / "a/one/last.pt")
    (tmp_path / "a/one.command").write_text(train_one)
    log = tmp_path / "a/one/log.csv"
    log.write_text(re.sub("^1,96,[^,]*", "1,96,1234.5", log.read_text(), flags=re.M))    # a mark on the first step
    with pytest.raises(SystemExit, match="1 failed: b/wrong"):
        experiments.main(["run", "--jobs", "1"])
    said = capsys.readouterr().out
    assert "3 to run" in said and "--nonsense" in said
    lines = experiments.results()
    assert list(lines) == ["a/one", "c/one"] and lines["a/one"]["command"] == train_one
    curve = dict(lines["a/one"]["result"]["curve"])
    assert list(curve) == [2, 4, 6] and curve[6] < curve[2]
    assert lines["c/one"]["result"]["loss"]["nats"] == pytest.approx(lines["a/one"]["result"]["nats"], rel=1e-5)
    assert "1234.5" in log.read_text()
    del commands["b/wrong"]
    experiments.main(["run"])
    assert capsys.readouterr().out.startswith("0 to run")
    commands["a/one"] += " --lr 0.001"                                  # another command is another experiment
    experiments.main(["run", "a"])
    assert capsys.readouterr().out.startswith("1 to run")
    assert "1234.5" not in log.read_text() and len(log_rows(tmp_path / "a/one", "train_loss")) == 6     # anew


def test_the_results_pages_are_what_report_writes():
    """RESULTS.md and the README's results section, from the files under results/."""
    for path, text in report.pages(draw=False).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is not what python report.py writes"
    page = (HERE / "RESULTS.md").read_text(encoding="utf-8")
    assert all((HERE / picture).is_file() for picture in re.findall(r"\]\((results/.*?)\)", page))
    known = experiments.experiments()
    assert all(known.get(name) == line["command"] for name, line in experiments.results().items())


# ---------------------------------------------------------------------------------------------------------------- bench

def test_bench(tmp_path, capsys):
    """Every table, on tiny shapes; the figures are in the file that it names."""
    command = re.search(r"^python bench\.py(.*)$", (HERE / "README.md").read_text(encoding="utf-8"), flags=re.M)[1].split()
    bench.main([*command, "--quick", "--out", str(tmp_path / "b.json")])
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert {row["table"] for row in rows} >= {"forms", "growth", "step", "context"}
    assert all(low <= median <= high for row in rows for median, low, high in row.get("seconds", {}).values())
    assert all(row["share_of_roofline"] > 0 for row in rows if row["table"] == "forms")
    assert "b.json" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- README

def test_readme_code_runs(run20, corpus, tmp_path, monkeypatch):
    """Every python block runs as written; every command of ours runs with its options, made short by more of them."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    shutil.copytree(run20[0], tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    blocks = re.findall(r"```sh\n(.*?)```", readme, flags=re.S)
    commands = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    ours = [c.split("&&")[-1].split() for c in commands if re.search(r"python (train|sample|data/prepare)\.py|torchrun", c)]
    assert len(ours) >= 5
    for name in ("mine.txt", "prompt.txt"):
        (tmp_path / name).write_text(some_text(200), encoding="utf-8")
    short = {"train.py": ["--data", str(corpus), "--max_steps", "2", "--n_layer", "1", "--d_model", "16", "--context", "16",
                          "--batch_size", "2", "--sample_tokens", "2", "--device", "cpu", "--no-compile"],
             "sample.py": ["--checkpoint", "out/best.pt", "--max_new_tokens", "3"],
             "prepare.py": ["--out", "prepared", "--overwrite", "--vocab_size", "260", "--input", "mine.txt"]}
    for i, words in enumerate(ours):
        words = [w for w in words if w != "--fsdp"]     # needs its processes: test_processes_train_like_one
        at = next(j for j, w in enumerate(words) if w.endswith(".py"))
        script = Path(words[at]).name
        module = {"train.py": train_py, "sample.py": sample_py, "prepare.py": prepare}[script]
        extra = short[script]
        if script == "train.py":
            extra = extra + ["--out", f"run{i}"]
            if "--resume" in words:
                shutil.copytree("out", f"run{i}")
                extra = ["--out", f"run{i}", "--max_steps", "21"]
        with pytest.raises(SystemExit, match="^0$") if "--help" in words else contextlib.nullcontext():
            module.main(words[at + 1:] + extra)
