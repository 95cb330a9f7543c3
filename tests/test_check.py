"""fast/check.py: kernels that are wrong on purpose, in Triton's interpreter, are not trusted."""

import importlib.util
import itertools
import types

import pytest
import torch

import fast
from fast import check, graph
from fmem import scan, scan_loop
from tests.helpers import DEVICE, GPU, KERNEL_ERROR, ROOT, error, kernel, needs_triton, scan_inputs, with_gradients

# Mistakes after which every kernel still runs: (what, the line as it stands, with the mistake).
MISTAKES = [
    (
        "the write counts the token itself as decayed",
        "put(write, row0, t, i, left, m, th * D)",
        "put(write, row0, t, i, left, m, th * D * (1 - th))",
    ),
    ("keep without the first token", "put(keep, bc, t, i, 1, m, (1 - th) * D)", "put(keep, bc, t, i, 1, m, D)"),
    (
        "the states of a chunk before",
        "        S *= tl.load(keep + (b * N + c) * m + i,",
        "        S *= tl.load(keep + b * N * m + i,",
    ),
    (
        "the norm's cross term halved",
        "th * (2 * a * hx + th * K_tt), 0.0)\n            w =",
        "th * (a * hx + th * K_tt), 0.0)\n            w =",
    ),
    (
        "the length of a row one token late",
        "w = tl.load(phi + at, mask=rows, other=0.0) * tl.rsqrt(n / d + eps)",
        "w = tl.load(phi + at, mask=rows, other=0.0) * tl.rsqrt(tl.load(n0 + bc * m + i, mask=rows, other=0.0) / d + eps)",
    ),
    (
        "the diagonal left out of A",
        "E, F = tl.where(s[:, None] == t, th[None, :], E * a[None, :]), F * a\n        tl.store(A + t * C + s, tl.sum(E * w",
        "E, F = tl.where(s[:, None] == t, 0.0, E * a[None, :]), F * a\n        tl.store(A + t * C + s, tl.sum(E * w",
    ),
    (
        "one group of rows only",
        "            a1 += tile(A1, slab, t, t, left, C)",
        "            a1 = tile(A1, slab, t, t, left, C)",
    ),
    ("the diagonal of A2 twice", "tl.where(t[:, None] > t[None, :], tile(A2", "tl.where(t[:, None] >= t[None, :], tile(A2"),
    ("dphi without the norm", "tl.store(dphi + at, r * g, mask=rows)", "tl.store(dphi + at, g, mask=rows)"),
    ("kappa decays once", "        k *= a * a", "        k *= a"),
    ("nothing from the chunks behind", "+ D * D * k\n    tl.store(first", "+ 0 * D * D * k\n    tl.store(first"),
    (
        "the gradient of the first state without its norm",
        "    tl.store(first + b * m + i, k, mask=i < m)",
        "    tl.store(first + b * m + i, 0 * k, mask=i < m)",
    ),
    ("dtheta without the norms", "        grad -= (1 - th_j) * k_j *", "        grad -= 0 * k_j *"),
    ("lambda from the token after", "tl.where(u[:, None] >= j, D * to_W, 0.0)", "tl.where(u[:, None] > j, D * to_W, 0.0)"),
    (
        "a row of the past the wrong way round",
        "X, v = X + th_j[None, :] * to_W, v + th_j * to_Z",
        "X, v = X + th_j[None, :] * to_W, v - th_j * to_Z",
    ),
    (
        "a step reads before it writes",
        "        s += th[:, None] * (xb[None, :] - s)\n        tl.store(p, s, mask=mask)",
        "        tl.store(p, s + th[:, None] * (xb[None, :] - s), mask=mask)",
    ),
    (
        "a step writes the rows 0 to k - 1",
        "if DENSE else tl.load(rows + b * k + i, mask=chosen, other=0).to(tl.int64)",
        "if DENSE else i.to(tl.int64)",
    ),
    ("a step of the first text for all", "    xb, acc = tl.load(x + b * d + e,", "    xb, acc = tl.load(x + e,"),
    (
        "NaN where theta is 1",
        "        a = 1 - th\n        if BACKWARD:",
        "        a = (1 - th) * (1 - th) / (1 - th)\n        if BACKWARD:",
    ),
    ("an exception", "    run = Launcher(theta, x)\n", "    raise RuntimeError('no more\\nregisters')\n"),
]
numbers = itertools.count()


def changed(tmp_path, before, after):
    """kernel.py with a change, as a module with operators of its own."""
    source = (ROOT / "kernel.py").read_text(encoding="utf-8")
    assert before in source, before
    path = tmp_path / "kernel.py"
    path.write_text(source.replace(before, after, 1).replace('"fmem::', f'"fmem_changed_{next(numbers)}::'), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed_kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_triton
@pytest.mark.parametrize("what, before, after", MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_a_wrong_kernel_is_noticed(what, before, after, tmp_path):
    said = check.wrong(changed(tmp_path, before, after), torch.device(DEVICE), 34, 20, torch.float32)
    assert said and "\n" not in said and ("is wrong here by" in said or "they fail here (RuntimeError: no more)" in said), said


@needs_triton
@pytest.mark.parametrize("dtype", KERNEL_ERROR, ids=str)
def test_right_kernels_are_trusted(dtype, monkeypatch):
    """With room: their errors are a fifth of what would be refused, or less."""
    monkeypatch.setitem(check.TOLERANCE, dtype, check.TOLERANCE[dtype] / 5)
    assert check.wrong(kernel, torch.device(DEVICE), 33, 20, dtype) is None


@needs_triton
def test_a_tenth_too_much_is_noticed(tmp_path):
    """In one output alone, in the narrowest dtype."""
    wrong = changed(tmp_path, "tl.store(dphi + at, r * g, mask=rows)", "tl.store(dphi + at, r * g * 1.1, mask=rows)")
    assert "the gradient of phi is wrong here by 1.0e-01" in check.wrong(wrong, torch.device(DEVICE), 8, 16, torch.bfloat16)


@needs_triton
def test_a_process_does_without_wrong_kernels(monkeypatch, capsys, fresh_choice):
    """One line, once, and the results are those of the other form; with FMEM_CHECK=0 nothing is looked at."""

    def broken(*arguments):
        y, hT = right(*arguments)
        return y * 1.5, hT

    right = kernel.scan_triton
    monkeypatch.setattr(check, "WANTED", True)
    monkeypatch.setattr(kernel, "scan_triton", broken)
    inputs = [v.float().to(DEVICE) for v in scan_inputs(T=20, m=6, d=10)]
    for _ in range(2):
        y, _ = scan(*inputs, form="kernel")
    assert torch.allclose(y.cpu(), scan_loop(*(v.cpu() for v in inputs))[0], atol=1e-5)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and 'form "fast" instead of the Triton kernels: y is wrong here by 5.0e-01' in said
    monkeypatch.setattr(check, "WANTED", False)
    fast.no_kernel.cache_clear()
    assert torch.allclose(scan(*inputs, form="kernel")[0], 1.5 * y, atol=1e-5) and not capsys.readouterr().err


def test_the_check_leaves_everything_as_it_was():
    """Called in the middle of a step without gradients: the run's random numbers stay the same."""
    before = torch.get_rng_state()
    form = types.SimpleNamespace(tiles=lambda *_: {"C": 16}, scan_triton=scan_loop, step_triton=None)
    with torch.no_grad():
        said = check.wrong(form, torch.device("cpu"), 4, 6, torch.float32)
        assert not torch.is_grad_enabled()
    assert "they fail here (TypeError" in said  # there is no step: the scan was right
    with torch.inference_mode():
        assert check.wrong(form, torch.device("cpu"), 4, 6, torch.float32) == said
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("fault", [None, "another token", "a state left as it was"])
def test_a_recorded_step_is_compared_with_single_ones(fault):
    """On the CPU, with a function in the place of the recording: the same tokens from the same beginning, or not."""
    token, state = torch.tensor([3]), torch.tensor([1])

    def step(wrong=None):
        token.copy_((token * 5 + state) % 97 + (wrong == "another token"))
        if wrong != "a state left as it was":
            state.add_(1)

    def restore():
        token.fill_(3)
        state.fill_(1)

    assert graph.same_tokens(step, lambda: step(fault), token, restore) == (fault is None)


@pytest.mark.parametrize("fault", [None, "another token", "other logits", "nan", "a state left as it was"])
def test_a_step_computed_in_another_way_is_compared_by_its_logits(fault):
    """It may choose other tokens, but has to have the same logits for the same tokens."""
    token, state = torch.tensor([3]), torch.tensor([1])

    def step(wrong=None):
        logits = torch.arange(7.0) * (token + state)
        token.copy_((token * 5 + state) % 97 + (wrong == "another token"))
        if wrong != "a state left as it was":
            state.add_(1)
        return logits * {"other logits": 1.01, "nan": torch.nan}.get(wrong, 1.0005)

    def restore():
        token.fill_(3)
        state.fill_(1)

    right = graph.same_logits(step, lambda: step(fault), token, restore, 1e-3)
    assert right == (fault in (None, "another token"))


ROUNDED = {torch.bfloat16: "{0}.to(tl.bfloat16).to(tl.float32)",
           # TF32 has 10 of the 23 bits; cut off rather than rounded, which is the worst that a GPU may do
           torch.float16: "({0}.to(tl.float32).to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)"}


@needs_triton
@pytest.mark.skipif(GPU, reason="a GPU rounds by itself")
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_operands_rounded_as_tensor_cores_do(dtype, tmp_path):
    """The interpreter multiplies float32 in the place of bf16 and TF32: here with operands that have only their bits. The errors
    stay within those of the tests on a GPU."""
    product = "tl.dot(a.to(OPERAND), b.to(OPERAND), acc,"
    rounded = f"tl.dot({ROUNDED[dtype].format('a')}, {ROUNDED[dtype].format('b')}, acc,"
    narrow = changed(tmp_path, product, rounded)
    for T, m, d in ((67, 20, 24), (40, 70, 20)):
        theta, phi, x, h0 = scan_inputs(T=T, m=m, d=d)
        x = x.to(dtype).double()
        want = with_gradients(scan_loop, [theta, phi, x, h0])
        errors = {}
        for name, module in (("float32", kernel), ("rounded", narrow)):
            got = with_gradients(lambda theta, phi, x, h0, m=module: m.scan_triton(theta, phi, x.to(dtype), h0),
                                 [theta, phi, x, h0], torch.float32)
            errors[name] = [error(g, w) for g, w in zip(got, want, strict=True)]
        assert all(e < KERNEL_ERROR[dtype] for e in errors["rounded"]), errors
        # in bf16 nearly every operand was stored in bf16 before
        assert max(errors["rounded"]) >= (1 if dtype == torch.bfloat16 else 1.1) * max(errors["float32"])
