"""The definition of correctness, in the order of fmem.py: python -m pytest test_fmem.py

The layer is compared with the paper's equations in float64 (`reference`), the chunked scan and the
kernel with the loop, and a step with the whole sequence. A comment explains any tolerance that is
not obvious. Without a GPU, the kernel runs in Triton's interpreter (conftest.py).
"""

import csv
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fmem
from fmem import FactorizationMemory, FMem, FMemConfig, scan_chunked, scan_loop

try:
    import kernel
except ImportError:
    kernel = None

HERE = Path(__file__).resolve().parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(kernel is None, reason="Triton is not installed")

LOOP_ERROR = 1e-12  # float64, a few dozen roundings
# In float64, scan_chunked lets a row keep 1e-8 of itself where theta is 1. The worst error that we
# have seen is 2e-8. The tolerance is five times that.
CHUNKED_ERROR = 1e-7
FLOAT32_ERROR = 2e-6  # some twenty roundings of 2^-24; 3e-7 is usual


def tiny(**changes):
    fields = dict(vocab_size=50, n_layer=2, d_model=16, d_memory=24, n_rows=8, k_rows=3)
    fields |= dict(tau=0.5, norm_eps=1e-2)  # large, so that a forgotten one is noticed
    return FMemConfig(**{**fields, **changes})


def error(got, want, floor=1e-30):
    """Relative root mean square error. floor: the minimum for the norm of `want`."""
    want = want.double()
    return ((got.double() - want).norm() / want.norm().clamp_min(floor)).item()


def assert_close(bound, got, want):
    """All tensors agree. A zero gradient, such as that of an erased h0, counts as norm 1."""
    errors = [error(g, w, floor=1.0) for g, w in zip(got, want, strict=True)]
    assert all(e < bound for e in errors), errors


def scan_inputs(T, sharp=3.0, k=None):
    """theta, phi, xbar and h0 in float64. theta is also exactly 0 or 1, for several tokens too."""
    alpha = torch.softmax(sharp * torch.randn(2, T, 6), -1)
    if k is not None:
        top, rows = alpha.topk(k, -1)
        alpha = torch.zeros_like(alpha).scatter(-1, rows, top / top.sum(-1, keepdim=True))
    theta = torch.sigmoid(sharp * torch.randn(2, T, 1)) * alpha
    theta[0, ::7, 0] = 1.0
    theta[1, T // 2 : T // 2 + 20, 1] = 1.0
    theta[1, ::5] = 0.0
    theta[0, -1, -1] = 1 - 2**-24  # the largest float32 below 1
    phi = torch.sigmoid(torch.randn(2, T, 1)) * alpha
    xbar = torch.randn(2, 10, T).mT  # not contiguous: any strides must work
    h0 = torch.randn(2, 10, 6).mT
    return [v.double() for v in (theta, phi, xbar, h0)]


def with_gradients(scan, inputs, dtype=torch.float64):
    """[y, hT, the gradients of a random linear function of y and hT for all inputs]."""
    leaves = [v.to(DEVICE, dtype).detach().requires_grad_() for v in inputs]
    y, hT = scan(*leaves)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    dh = torch.randn(hT.shape, generator=generator, dtype=torch.float64).to(hT)
    return [y, hT, *torch.autograd.grad((y * dy).sum() + (hT * dh).sum(), leaves)]


def assert_same(scan, definition, inputs, bound):
    """Outputs, last state and all gradients agree: in float64 to `bound`, and in float32."""
    want = with_gradients(definition, inputs)
    assert_close(bound, with_gradients(scan, inputs), want)
    got = with_gradients(scan, inputs, torch.float32)
    assert all(g.dtype == torch.float32 for g in got)
    assert_close(FLOAT32_ERROR, got, want)


def by_steps(step, tokens, state=None):
    """The result of a call for the whole sequence, computed with one step per token."""
    outputs = []
    for token in tokens.unbind(1):
        output, state = step(token, state)
        outputs.append(output)
    return torch.stack(outputs, 1), state


# ---- The recurrence


def reference(layer, x, h):
    """Eqs. 4 to 13 as in the paper: for one sequence, token by token and row by row."""
    config = layer.config
    W = dict(layer.named_parameters())
    ys = []
    for x_t in x:
        logits = torch.exp(W["W_alpha.weight"] @ x_t / config.tau)
        alpha = logits / logits.sum()  # 4
        eta = 1 / (1 + torch.exp(-(W["w_eta.weight"] @ x_t)))  # 5
        mu = 1 / (1 + torch.exp(-(W["w_mu.weight"] @ x_t)))  # 6
        largest = sorted(range(config.n_rows), key=lambda i: -alpha[i].item())
        gamma = torch.zeros(config.n_rows, dtype=torch.float64)
        gamma[largest[: config.k_rows]] = 1  # 12
        alpha = gamma * alpha / (gamma * alpha).sum()  # 13
        theta = eta * alpha  # 7
        phi = mu * alpha  # 8
        xbar = W["W_i.weight"] @ x_t  # 9
        h = torch.diag(1 - theta) @ h + torch.outer(theta, xbar)  # 10
        rms = [((row @ row) / len(row) + config.norm_eps) ** 0.5 for row in h]
        normalised = torch.stack([row / r for row, r in zip(h, rms, strict=True)])
        ys.append(W["W_o.weight"] @ (normalised.T @ phi))  # 11
    return torch.stack(ys), h


@pytest.mark.parametrize("backend", ["loop", "chunked", "recompute", "steps"])
@pytest.mark.parametrize("k_rows", [None, 1, 3])
def test_layer_matches_the_papers_equations(backend, k_rows):
    """Outputs, the last memory, and the gradients of x, the first memory and every weight."""
    config = tiny(k_rows=k_rows, scan="loop" if backend == "loop" else "chunked")
    config.recompute = backend == "recompute"
    assert config.k_rows == (k_rows or 8)
    bound = CHUNKED_ERROR if backend in ("chunked", "recompute") else 1e-10
    layer = FactorizationMemory(config).double()
    x = torch.randn(2, 41, 16, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 8, 24, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 41, 16, dtype=torch.float64)
    dh = torch.randn(2, 8, 24, dtype=torch.float64)
    sequences = [reference(layer, *sequence) for sequence in zip(x, h, strict=True)]
    by_hand = [torch.stack(part) for part in zip(*sequences, strict=True)]
    by_layer = by_steps(layer.step, x, h) if backend == "steps" else layer(x, h)
    results = []
    for y, hT in (by_layer, by_hand):
        loss = (y * dy).sum() + (hT * dh).sum()
        results.append([y, hT, *torch.autograd.grad(loss, [x, h, *layer.parameters()])])
    assert_close(bound, *results)


@pytest.mark.parametrize("k", [None, 1, 2])
@pytest.mark.parametrize("sharp", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 53, 130])
def test_chunked_matches_the_loop(T, sharp, k):
    """Including theta of exactly 0 and 1."""
    assert_same(scan_chunked, scan_loop, scan_inputs(T, sharp, k), CHUNKED_ERROR)


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("theta", [0.0, 0.5, 1 - 1e-4, 1 - 1e-7, 1.0])
def test_chunked_with_constant_theta(theta, cancel):
    """1: every row is the last xbar, for whole chunks. 0: nothing changes.

    If writes cancel, a row's norm is a small difference of large numbers. It stays exact.
    """
    inputs = scan_inputs(70)
    inputs[0] = torch.full_like(inputs[0], theta)
    if cancel:
        xbar = inputs[2]
        xbar[:, 1::2] = -xbar[:, ::2]
    assert_same(scan_chunked, scan_loop, inputs, CHUNKED_ERROR)


# ---- The kernel


def loop_recurrence(keep, write, first):
    """fmem.recurrence without the kernel, on a GPU too."""
    before, last = fmem.recurrence(keep.cpu(), write.cpu(), first.cpu())
    return before.to(write.device), last.to(write.device)


def recurrence_inputs(B, T, m, d):
    keep = torch.rand(B, T, m, dtype=torch.float64)
    keep[:, ::3] = 0.0
    write = torch.randn(B, T, m, d, dtype=torch.float64)
    first = torch.randn(B, m, d, dtype=torch.float64)
    return [keep, write, first]


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 3, 5), (3, 33, 4, 1), (2, 5, 33, 40)])
def test_kernel_matches_the_recurrence(shape):
    """The last shape needs two blocks."""
    assert_same(kernel.recurrence, loop_recurrence, recurrence_inputs(*shape), LOOP_ERROR)


@needs_triton
@pytest.mark.parametrize("T", [1, 32, 53])
def test_chunked_with_the_kernel_matches_the_loop(T, monkeypatch):
    monkeypatch.setattr(fmem, "recurrence", kernel.recurrence)
    assert_same(scan_chunked, scan_loop, scan_inputs(T, k=2), CHUNKED_ERROR)


# ---- The layer and the model


def test_only_the_k_rows_of_a_token_change():
    """All other rows keep their value exactly."""
    layer = FactorizationMemory(tiny())
    x = torch.randn(5, 16)
    h = torch.randn(5, 8, 24)
    before = h.clone()
    _, _, rows = fmem.route(x, layer)
    chosen = torch.zeros(5, 8, dtype=torch.bool).scatter(1, rows, True)
    _, whole = layer(x[:, None], h)
    _, stepped = layer.step(x, h)
    assert torch.equal(h, before)  # with gradients h is not changed
    with torch.no_grad():
        _, in_place = layer.step(x, h)
    assert in_place.data_ptr() == h.data_ptr()
    for after in (whole, stepped, in_place):
        assert torch.equal((after != before).any(-1), chosen)


@pytest.mark.parametrize("k_rows", [None, 3])
@pytest.mark.parametrize("backend", ["loop", "chunked"])
def test_whole_split_and_stepwise_calls_agree(k_rows, backend):
    """So no output depends on a later token either."""
    model = FMem(tiny(k_rows=k_rows, scan=backend)).double()
    tokens = torch.randint(50, (2, 70))
    bound = LOOP_ERROR if backend == "loop" else CHUNKED_ERROR
    logits, state = model(tokens)
    for cut in (1, 31, 32, 33, 69):
        first, middle = model(tokens[:, :cut])
        second, last = model(tokens[:, cut:], middle)
        assert_close(bound, [torch.cat([first, second], 1), *last], [logits, *state])
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            stepped, last = by_steps(model, tokens)
        assert_close(bound, [stepped, *last], [logits, *state])


def test_initialisation():
    config = FMemConfig(vocab_size=4000, d_model=256, n_layer=8, tau=0.125, alpha_std=3.0)
    model = FMem(config)
    memory = model.blocks[3].memory
    mlp = model.blocks[3].mlp
    for weight, std in (
        (model.embed.weight, fmem.EMBED_STD),
        (memory.W_i.weight, 1 / 16),  # 256 inputs
        (memory.W_o.weight, 1 / 16 / 4),  # 8 layers, two branches each
        (memory.W_alpha.weight, 3.0 * 0.125 / 16),
        (mlp.W_gate.weight, 1 / 16),
        (mlp.W_up.weight, 1 / 16),
        (mlp.W_down.weight, 1 / 4 / math.sqrt(config.d_mlp)),
    ):
        # The standard deviation of 16,384 or more numbers is known to 0.6 %; five times that.
        assert weight.std().item() == pytest.approx(std, rel=0.03)
        assert abs(weight.mean().item()) < 0.05 * std
    theta, phi, _ = fmem.route(torch.randn(512, 256), memory)
    assert torch.allclose(theta.sum(-1), torch.tensor(0.5))  # eta and mu start at 1/2
    assert torch.allclose(phi.sum(-1), torch.tensor(0.5))


def test_autocast_rounds_only_products():
    """Routing, memory and norms stay in float32. A scan of bf16 xbar is near the exact one."""
    model = FMem(tiny())
    tokens = torch.randint(50, (2, 40))
    layer = model.blocks[0].memory
    x = torch.randn(2, 40, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(tokens)
        step_logits, step_state = model(tokens[:, 0], state)
        theta, phi, xbar = layer.scan_inputs(x)
    assert logits.dtype == step_logits.dtype == xbar.dtype == torch.bfloat16
    assert all(h.dtype == torch.float32 for h in state + step_state)
    want_theta, want_phi, _ = layer.scan_inputs(x)
    assert torch.equal(theta, want_theta)
    assert torch.equal(phi, want_phi)
    with torch.autocast("cpu", torch.bfloat16):
        y, hT = scan_chunked(theta, phi, xbar)
        under_autocast = scan_loop(theta, phi, x)
    assert torch.equal(under_autocast[0], scan_loop(theta, phi, x)[0])
    want_y, want_h = scan_loop(theta, phi, xbar.float())
    assert y.dtype == torch.bfloat16
    assert error(y, want_y) < 1e-2  # q, A, H and y are rounded to 8 bits
    assert error(hT, want_h) < 1e-2


# ---- Generation


@pytest.mark.parametrize(
    "choice, want",
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
        ({"temperature": 1e-30}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.9}, [16 / 25, 9 / 25, 0, 0, 0]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 99}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_p": 1e-9}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.75}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
    ],
)
def test_sample_on_known_logits(choice, want):
    logits = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log().expand(4000, -1)
    drawn = fmem.sample(logits, generator=torch.Generator().manual_seed(0), **choice)
    again = fmem.sample(logits, generator=torch.Generator().manual_seed(0), **choice)
    assert torch.equal(drawn, again)
    shares = (torch.bincount(drawn, minlength=5) / 4000).tolist()
    assert shares == pytest.approx(want, abs=0.03)  # standard deviation under 0.008
    assert [s > 0 for s in shares] == [w > 0 for w in want]


@pytest.mark.parametrize("prefill", [4096, 7])
def test_generate_matches_repeated_calls_and_continues_from_its_state(prefill, monkeypatch):
    model = FMem(tiny())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that the logits differ clearly
    prompt = torch.randint(50, (2, 40))
    tokens = prompt
    for _ in range(20):
        logits, _ = model(tokens)
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    monkeypatch.setattr(fmem, "PREFILL", prefill)
    written = list(model.generate(prompt, 8, temperature=0))
    first = [token for token, _ in written]
    _, state = written[-1]
    before = [h.clone() for h in state]
    # A prompt of one token is a step, which works in place on a copy of the state.
    continued = model.generate(first[-1][:, None], 12, state, temperature=0)
    rest = [token for token, _ in continued]
    assert torch.equal(torch.stack(first + rest, 1), tokens[:, 40:])
    with torch.no_grad():
        model(prompt, state)  # a full call does not change it either
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


ONES = torch.ones(2, 5, 6)


@pytest.mark.parametrize(
    "name, call",
    [
        ("vocab_size", lambda: tiny(vocab_size=0)),
        ("d_model", lambda: tiny(d_model=2.5)),
        ("k_rows", lambda: tiny(k_rows=9)),
        ("tau", lambda: tiny(tau=0)),
        ("tau", lambda: tiny(tau=math.nan)),
        ("alpha_std", lambda: tiny(alpha_std=math.inf)),
        ("dropout", lambda: tiny(dropout=1.0)),
        ("scan", lambda: tiny(scan="fast")),
        ("a scan takes", lambda: scan_loop(ONES, ONES[:, 1:], ONES)),
        ("a scan takes", lambda: scan_chunked(ONES, ONES, ONES[:, 1:])),
        ("a scan takes", lambda: scan_chunked(ONES, ONES, ONES, h0=ONES)),
        ("a scan takes", lambda: scan_chunked(ONES[:, :0], ONES[:, :0], ONES[:, :0])),
        ("temperature", lambda: fmem.sample(ONES[0], temperature=-1)),
        ("temperature", lambda: fmem.sample(ONES[0], temperature=math.nan)),
        ("top_k", lambda: fmem.sample(ONES[0], top_k=0)),
        ("top_p", lambda: fmem.sample(ONES[0], top_p=0.0)),
        ("top_p", lambda: fmem.sample(ONES[0], top_p=1.1)),
        ("tokens", lambda: next(FMem(tiny()).generate(torch.zeros(1, 0), 1))),
    ],
)
def test_errors_name_the_invalid_argument(name, call):
    with pytest.raises(ValueError, match=name):
        call()


# ---- The file and its checkpoints


def save(path, a_model, **changes):
    fields = {
        "format": fmem.FORMAT,
        "config": vars(a_model.config),
        "layer": a_model.layer_name,
        "layer_arguments": a_model.layer_arguments,
        "model": a_model.state_dict(),
        "corpus": "a test",
    }
    torch.save({**fields, **changes}, path)


@pytest.mark.parametrize("tied", [True, False])
def test_load_restores_the_model_and_the_rest(tied, tmp_path):
    model = FMem(tiny(tie_embeddings=tied, d_memory=None, k_rows=None))
    save(tmp_path / "model.pt", model)
    loaded, rest = fmem.load(tmp_path / "model.pt")
    tokens = torch.randint(50, (1, 9))
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    assert (loaded.head.weight is loaded.embed.weight) == tied
    assert not loaded.training
    assert rest["corpus"] == "a test"


class Code:
    """Code that runs when it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


def test_load_reports_errors_in_one_line(tmp_path):
    path = tmp_path / "model.pt"
    model = FMem(tiny())

    def message():
        with pytest.raises(ValueError, match=r"model\.pt") as caught:
            fmem.load(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "train.py" in message()  # no file yet
    path.write_text("not a checkpoint")
    message()
    for invalid in (
        {"format": "other"},
        {"layer": "os"},
        {"config": {"n_layer": 0}},
        {"model": {}},
        {"corpus": Code()},
    ):
        save(path, model, **invalid)
        message()
    save(path, model)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # one bit of a weight
    path.write_bytes(data)
    assert "damaged" in message()


def test_fmem_needs_only_torch(tmp_path):
    """A copy in an empty folder needs only torch. On a GPU it ignores another kernel.py."""
    shutil.copy(HERE / "fmem.py", tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/kernel.py").touch()
    code = """
import sys, torch, unittest.mock
sys.path.append("other")
sys.modules.update(dict.fromkeys(("triton", "tiktoken", "numpy")))  # cannot be imported
with unittest.mock.patch("torch.cuda.is_available", lambda: True):
    import fmem
assert "kernel" in sys.modules and fmem.kernel is None
model = fmem.FMem(fmem.FMemConfig(vocab_size=50, n_layer=1, d_model=32, n_rows=8, k_rows=2))
tokens = torch.arange(40)[None]
model(tokens)[0].sum().backward()
assert len(list(model.generate(tokens, 5))) == 5
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_losses_of_a_small_run(small, tmp_path):
    """They change only with the model, its initialisation, the data or the optimiser."""
    train = pytest.importorskip("train")
    train.train({**small, "out": str(tmp_path), "max_steps": 10, "dropout": 0.0})
    with open(tmp_path / "log.csv", newline="") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    first_and_last = [losses[0], losses[-1]]
    # Another PyTorch may round differently, hence 1e-4.
    assert first_and_last == pytest.approx([5.72104, 5.21817], abs=1e-4)
