"""fast/check.py: kernels that are wrong on purpose, in Triton's interpreter, are not trusted."""

import importlib.util
import itertools
import types

import pytest
import torch

import fast
from fast import check, graph
from fmem import scan, scan_loop
from tests.helpers import (
    DEVICE,
    GPU,
    KERNEL_ERROR,
    ROOT,
    error,
    kernel,
    needs_triton,
    scan_inputs,
    step_triton,
    with_gradients,
)

# Mistakes after which every kernel still runs: (what, the line as it stands, with the mistake).
MISTAKES = [
    ("the write counts the token itself as decayed", "m, th * D_e * D[None, :])", "m, th * (1 - th) * D_e * D[None, :])"),
    ("keep without the first token", "tl.sum(tl.where(u[:, None] == 0, (1 - th) * D_e", "tl.sum(tl.where(u[:, None] == 0, D_e"),
    (
        "a sub-chunk that decays with the next",
        "        tl.store(sub + (bc * (C // SUB) + n // SUB)",
        "        tl.store(sub + (bc * (C // SUB))",
    ),
    (
        "the states of a chunk before",
        "        decay = tl.load(keep + (b * N + c) * m + i,",
        "        decay = tl.load(keep + b * N * m + i,",
    ),
    (
        "the norm's cross term halved",
        "th * (2 * a * hx + th * tl.load(K + row + t))",
        "th * (a * hx + th * tl.load(K + row + t))",
    ),
    (
        "the length of a row one token late",
        "            r = tl.rsqrt(length / d + eps)",
        "            r = tl.rsqrt(tl.load(n0 + bc * m + i, mask=rows, other=0.0) / d + eps)",
    ),
    (
        "the diagonal left out of A",
        "E, P = tl.where(u[:, None] == t, th[None, :], E * a[None, :]), P * a\n            tl.store(A",
        "E, P = tl.where(u[:, None] == t, 0.0, E * a[None, :]), P * a\n            tl.store(A",
    ),
    (
        "nothing of the sub-chunks before",
        "        acc = tl.dot(tile(K, bc * C + n, u, s + u, SUB, C), E, acc,",
        "        acc = 0 * tl.dot(tile(K, bc * C + n, u, s + u, SUB, C), E, acc,",
    ),
    (
        "sub-chunks before that do not decay",
        "        E_T = tile_T(near, row0 + s, u, i, left - s, m) * D[:, None]",
        "        E_T = tile_T(near, row0 + s, u, i, left - s, m)",
    ),
    ("one sub-chunk's decay only", "        F *= P\n    if GRADIENT", "        F = P\n    if GRADIENT"),
    ("one group of rows only", "            a1 += tl.where(below, tile(A1,", "            a1 = tl.where(below, tile(A1,"),
    (
        "what was not stored",
        "            a1 += tl.where(below, tile(A1, slab, t, t, left, C), 0.0)",
        "            a1 += tile(A1, slab, t, t, left, C)",
    ),
    (
        "A2 not symmetric",
        "tl.where(below, tile(A2, slab, t, t, left, C), tile_T(A2, slab, t, t, left, C))",
        "tl.where(below, tile(A2, slab, t, t, left, C), 0.0)",
    ),
    ("dphi without the norm", "tl.store(dphi + at, r * g, mask=rows)", "tl.store(dphi + at, g, mask=rows)"),
    ("kappa decays once", "        k *= a * a", "        k *= a"),
    ("kappa of a chunk without its decay", "k += F_t * F_t * c_t", "k += F_t * c_t"),
    ("nothing from the chunks behind", "        k += tl.sum(E * tile(kappa_out,", "        k += 0 * tl.sum(E * tile(kappa_out,"),
    ("chunks behind that do not decay", "tl.cumprod(a * a, 0)", "tl.cumprod(0 * a + 1, 0)"),
    (
        "the gradient of the first state without its norm",
        "    tl.store(kappa_0 + bc // N * m + i, k,",
        "    tl.store(kappa_0 + bc // N * m + i, 0 * k,",
    ),
    ("dtheta without the norms", "            grad -= (1 - th_j) *", "            grad -= 0 * (1 - th_j) *"),
    ("lambda from the token after", "tl.where(u[:, None] >= j, D_u * to_W, 0.0)", "tl.where(u[:, None] > j, D_u * to_W, 0.0)"),
    (
        "Z of a later sub-chunk as it came in",
        "            put(Z, row0 + s, u, i, left - s, m, Z_s)",
        "            put(Z, row0 + s, u, i, 0, m, Z_s)",
    ),
    ("L reaches the state of a later sub-chunk undecayed", "        v += D * hl", "        v += hl"),
    ("L without the sub-chunks behind", "        hl = P * hl + tl.sum(", "        hl = P * hl + 0 * tl.sum("),
    (
        "a row of the past the wrong way round",
        "X, v = X + th_j[None, :] * to_W, v + th_j * to_Z",
        "X, v = X + th_j[None, :] * to_W, v - th_j * to_Z",
    ),
    (
        "NaN where theta is 1",
        "            a = 1 - th\n            hx",
        "            a = (1 - th) * (1 - th) / (1 - th)\n            hx",
    ),
    ("few long texts without half of their rows", "states = self.B, -(-self.m // o[\"BM\"]),", "states = self.B, self.MB,"),
    ("an exception", "    run = Launcher(theta, x)\n", "    raise RuntimeError('no more\\nregisters')\n"),
]
STEP_MISTAKES = [
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
]
numbers = itertools.count()


def changed(tmp_path, before, after, name="kernel.py"):
    """A file with a change, as a module with operators of its own."""
    source = (ROOT / name).read_text(encoding="utf-8")
    assert before in source, before
    path = tmp_path / "changed.py"
    path.write_text(source.replace(before, after, 1).replace('"fmem::', f'"fmem_changed_{next(numbers)}::'), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed_kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_triton
@pytest.mark.parametrize("what, before, after", MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_a_wrong_kernel_is_noticed(what, before, after, tmp_path):
    broken = changed(tmp_path, before, after)
    if "sub-chunk" in what and not GPU:                 # four in a chunk, as the other dtypes have
        tiles = broken.tiles
        broken.tiles = lambda *shape: {**tiles(*shape), "C": 64}
    m = 34 if "group of rows" in what else 20
    said = check.wrong(broken, step_triton, torch.device(DEVICE), m, 20, torch.float16 if GPU else torch.float32)
    assert said and "\n" not in said and ("is wrong here by" in said or "they fail here (RuntimeError: no more)" in said), said


@needs_triton
@pytest.mark.parametrize("what, before, after", STEP_MISTAKES, ids=[mistake[0] for mistake in STEP_MISTAKES])
def test_a_wrong_step_is_noticed(what, before, after, tmp_path):
    step = changed(tmp_path, before, after, "fast/step_gpu.py").step_triton
    said = check.wrong(kernel, step, torch.device(DEVICE), 20, 20, torch.float32)
    assert said and "a step of" in said and "is wrong here by" in said, said


@needs_triton
@pytest.mark.parametrize("dtype", KERNEL_ERROR, ids=str)
def test_right_kernels_are_trusted(dtype, monkeypatch):
    """With room: their errors are a fifth of what would be refused, or less."""
    monkeypatch.setitem(check.TOLERANCE, dtype, check.TOLERANCE[dtype] / 5)
    assert check.wrong(kernel, step_triton, torch.device(DEVICE), 33, 20, dtype) is None


@needs_triton
def test_a_tenth_too_much_is_noticed(tmp_path):
    """In one output alone, in the narrowest dtype."""
    wrong = changed(tmp_path, "tl.store(dphi + at, r * g, mask=rows)", "tl.store(dphi + at, r * g * 1.1, mask=rows)")
    said = check.wrong(wrong, step_triton, torch.device(DEVICE), 8, 16, torch.bfloat16)
    assert "the gradient of phi is wrong here by 1.0e-01" in said


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
    form = types.SimpleNamespace(tiles=lambda *_: {"C": 16}, scan_triton=scan_loop)
    with torch.no_grad():
        said = check.wrong(form, None, torch.device("cpu"), 4, 6, torch.float32)
        assert not torch.is_grad_enabled()
    assert "they fail here (TypeError" in said  # there is no step: the scan was right
    with torch.inference_mode():
        assert check.wrong(form, None, torch.device("cpu"), 4, 6, torch.float32) == said
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
