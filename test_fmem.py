"""What correctness means, in the order of fmem.py: python -m pytest test_fmem.py. All other tests are in tests/.

The recurrence is held against the paper's equations written out in float64 (`reference`), everything faster against the loop, the
programs against their own promises. Where a tolerance is not obvious its reason stands beside it.
"""
import contextlib
import io
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fast
import fmem
import sample as sample_py
import train as train_py
from data import prepare
from fmem import FactorizationMemory, FMem, FMemConfig, scan, scan_loop
from tests.helpers import (
    EXACT,
    ROOT,
    error,
    log_rows,
    same,
    scan_inputs,
    settings,
    some_text,
    tiny,
    with_gradients,
)
from training.checkpoint import load_checkpoint

FORMS = "loop", "chunked", "fast"
# The form "fast" replaces 1 - theta = 0 by a number that float64 cannot always tell from 0; see fast/chunked.py.
BAR = {"loop": EXACT, "chunked": EXACT, "fast": 1e-9}


def same_to(bar, got, want):
    """Whether all tensors agree; a gradient that is zero, as that of an h0 which is erased at once, counts as 0.1 in size."""
    errors = [error(g, w, floor=0.1) for g, w in zip(got, want, strict=True)]
    assert all(e < bar for e in errors), errors
    return True


# -------------------------------------------------------------------------------------------------------- the recurrence

def reference(layer, x, h):
    """Equations 4 to 13 as the paper writes them, in float64, one text, token and row at a time."""
    c, W, ys = layer.config, dict(layer.named_parameters()), []
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
        norm = torch.stack([row / ((row * row).sum() / len(row) + c.norm_eps) ** 0.5 for row in h])
        ys.append(W["W_o.weight"] @ (norm.T @ phi))                                             # 11
    return torch.stack(ys), h


@pytest.mark.parametrize("scan", FORMS)
@pytest.mark.parametrize("k_rows", [None, 1, 3])
def test_layer_is_the_papers_equations(scan, k_rows):
    """Outputs, the last state, and the gradients of the input, the first state and every weight."""
    layer = FactorizationMemory(tiny(k_rows=k_rows, scan=scan)).double()
    x, h = torch.randn(2, 21, 16, dtype=torch.float64), torch.randn(2, 8, 24, dtype=torch.float64)
    leaves = [x.requires_grad_(), h.requires_grad_(), *layer.parameters()]
    weigh = torch.randn(2, 21, 16, dtype=torch.float64), torch.randn(2, 8, 24, dtype=torch.float64)
    results = []
    for y, hT in (layer(x, h), map(torch.stack, zip(*(reference(layer, *text) for text in zip(x, h, strict=True)), strict=True))):
        loss = sum((v * w).sum() for v, w in zip((y, hT), weigh, strict=True))
        results.append([y, hT, *torch.autograd.grad(loss, leaves)])
    assert same_to(1e-10, *results)                     # 21 tokens, each with the roundings of a dozen operations


@pytest.mark.parametrize("form", ["chunked", "fast"])
@pytest.mark.parametrize("h0", [True, False])
@pytest.mark.parametrize("sharp, sparse", [(0.0, None), (3.0, None), (30.0, None), (3.0, 2), (3.0, 1)])
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 53])
def test_chunked_is_the_loop(T, sharp, sparse, h0, form):
    """Outputs, last state and all gradients, theta of exactly 0 and 1 included."""
    inputs = scan_inputs(T=T, sharp=sharp, sparse=sparse, h0=h0)
    want = with_gradients(scan_loop, inputs)
    assert same_to(BAR[form], with_gradients(scan, inputs, form=form), want)
    # in float32: the project's bar, about 20 roundings of 2^-24
    got = with_gradients(scan, inputs, torch.float32, form=form)
    assert [g.dtype for g in got] == [torch.float32] * len(got) and same_to(2e-6, got, want)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("form", ["chunked", "fast"])
def test_chunked_where_every_theta_is_an_end(form, value):
    """theta = 1 everywhere: each row is the last xbar. theta = 0: nothing moves."""
    theta, phi, x, h0 = scan_inputs(T=40, ends=False)
    inputs = [torch.full_like(theta, value), phi, x, h0]
    want = with_gradients(scan_loop, inputs)
    for dtype in (torch.float64, torch.float32):
        got = with_gradients(scan, inputs, dtype, form=form)
        assert all(torch.isfinite(g).all() for g in got)
        # Where all 32 tokens of a chunk erase a row, 9e-10 stands for 0 in the form "fast"; h0's gradient, which should be 0,
        # is that share of gradients of size 2, and its size counts as 0.1.
        assert same_to(2e-6 if dtype == torch.float32 else EXACT if form == "chunked" else 2e-8, got, want)


@pytest.mark.parametrize("form", ["chunked", "fast"])
def test_chunked_when_rows_cancel(form):
    """A write that cancels a row makes its length the small difference of large numbers; the norm must not lose it."""
    theta, phi, x, h0 = scan_inputs(T=32, ends=False)
    x[:, 1::2] = -x[:, ::2]
    theta[:] = 0.5
    want = with_gradients(scan_loop, [theta, phi, x, h0])
    assert same_to(2e-6, with_gradients(scan, [theta, phi, x, h0], torch.float32, form=form), want)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    """Against finite differences. theta keeps away from the ends by more than their step of 1e-6."""
    theta, phi, x, h0 = scan_inputs(B=1, T=19, m=3, d=4, ends=False)
    inputs = [v.requires_grad_() for v in (theta.clamp(1e-3, 1 - 1e-3), phi, x, h0)]
    assert torch.autograd.gradcheck(lambda *a: scan(*a, form=form), inputs)


@pytest.mark.parametrize("form", FORMS)
def test_scan_works_on_strided_inputs_and_leaves_them_alone(form):
    theta, phi, x, h0 = scan_inputs(T=20)
    strided = [theta.mT.contiguous().mT, phi.mT.contiguous().mT, x.mT.contiguous().mT, h0.mT.contiguous().mT]
    before = [v.clone() for v in strided]
    want, got = scan(theta, phi, x, h0, form=form), scan(*strided, form=form)
    assert all(error(g, w) < EXACT for g, w in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(strided, before, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_scan_says_what_does_not_fit(form):
    theta, phi, x, h0 = scan_inputs(T=5)
    for wrong in ((theta[:, :0], phi[:, :0], x[:, :0], h0), (theta[:, :3], phi[:, :3], x, h0), (theta, phi, x, h0[:, 1:]),
                  (theta, phi[:, :3], x, h0)):
        with pytest.raises(ValueError, match="a scan takes theta, phi .B, T, m.* T at least 1"):
            scan(*wrong, form=form)
    with pytest.raises(ValueError, match="form must be one of auto, loop"):
        scan(theta, phi, x, h0, form="slow")


def test_fmem_alone(tmp_path):
    """fmem.py copied into an empty folder needs torch alone: it trains, generates and steps."""
    shutil.copy(ROOT / "fmem.py", tmp_path)
    code = """
import sys, torch
sys.modules.update(dict.fromkeys(("triton", "tiktoken", "regex", "kernel"), None))       # importing them is an error
import fmem
assert fmem.fast is None
model, tokens = fmem.FMem(fmem.FMemConfig(vocab_size=50, n_layer=1, d_model=32, n_rows=8, k_rows=2)), torch.arange(40)[None]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(60):
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0][0], tokens[0, 1:])
    optimizer.zero_grad(); loss.backward(); optimizer.step()
written = [token.item() for token in model.generate(tokens[:, :5], 20, temperature=0)]
assert written == list(range(5, 25)), (loss, written)
logits, state = model(tokens[:, :9]); assert model(tokens[:, 9], state)[0].shape == (1, 50)
try:
    fmem.FMem(fmem.FMemConfig(scan="fast"))(tokens)
except ValueError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "needs the folder fast/" in done.stdout, done.stderr


# --------------------------------------------------------------------------------------------------------- layer and model


def test_k_equal_m_is_dense():
    dense, sparse = FMem(tiny(k_rows=None)).double(), FMem(tiny(k_rows=8)).double()
    sparse.load_state_dict(dense.state_dict())
    tokens = torch.randint(50, (2, 30))
    for got, want in zip(sparse(tokens)[1] + [sparse(tokens)[0]], dense(tokens)[1] + [dense(tokens)[0]], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("scan", ["auto", "loop"])
def test_step_touches_only_k_rows(scan, grad):
    layer = FactorizationMemory(tiny(k_rows=3, scan=scan))
    h = torch.randn(5, 8, 24)
    h[:, :, 0] = 7.0
    before = h.clone()
    with torch.set_grad_enabled(grad):
        _, after = layer.step(torch.randn(5, 16), h)
    assert ((after != before).any(-1).sum(-1) == 3).all()
    in_place = scan == "auto" and not grad                      # the plain forms and the gradient work on a copy
    assert (after.data_ptr() == h.data_ptr()) is in_place and torch.equal(h, before) is not in_place


def test_a_row_outside_the_top_k_keeps_its_value_exactly():
    layer = FactorizationMemory(tiny(k_rows=1))
    x, h = torch.randn(1, 1, 16), torch.randn(1, 8, 24)
    rows = layer.route(x)[2].flatten().tolist()
    after = layer(x, h)[1]
    assert [i for i in range(8) if not torch.equal(after[0, i], h[0, i])] == rows


@pytest.mark.parametrize("scan", FORMS)
def test_causality(scan):
    """Change token t: nothing before it moves, and it itself does."""
    model = FMem(tiny(scan=scan)).double()
    tokens = torch.randint(50, (1, 40))
    before = model(tokens)[0]
    for t in (0, 15, 16, 39):
        changed = tokens.clone()
        changed[0, t] = (tokens[0, t] + 1) % 50
        moved = (model(changed)[0] - before).abs().amax(-1)[0]
        assert moved[:t].max().item() < EXACT if t else True    # the whole chunk is computed again: rounding may differ
        assert moved[t] > 1e-9                                  # a later token may read other rows


@pytest.mark.parametrize("k_rows, scan", [(None, "auto"), (3, "auto"), (None, "chunked"), (3, "loop")])
def test_full_pass_is_split_anywhere_is_step_by_step(k_rows, scan):
    model = FMem(tiny(k_rows=k_rows, scan=scan)).double()
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
        for prompt in (tokens, tokens[:, :1]):                  # a single token is a step, which works in place
            list(model.generate(prompt, 5, state=state))
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
    scan_fast = fast.scan_fast
    monkeypatch.setattr(fast, "scan_fast", lambda *a: seen.append(a) or scan_fast(*a))
    tokens = torch.randint(50, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(tokens)
        step_logits, step_state = model(tokens[:, 0], state)
    assert logits.dtype == step_logits.dtype == torch.bfloat16
    assert len(seen) == 2
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
    for form in FORMS:
        want = scan(theta, phi, xs, h0, form=form)
        with torch.autocast("cpu", torch.bfloat16):             # bf16 x is widened, y rounded once
            y, hT = scan(theta, phi, xs.bfloat16(), h0, form=form)
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
    ("tau", math.nan), ("tau", math.inf), ("tau", True), ("dropout", 1.0), ("norm_eps", 0), ("alpha_std", -1), ("scan", "slow"),
    ("d_mlp", "wide"), ("d_memory", True), ("tau", "1")])
def test_config_says_what_is_wrong(field, value):
    with pytest.raises(ValueError, match=field):
        tiny(**{field: value})


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
    for _ in range(12):                                         # the slow way: the whole text again for every token
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


@pytest.mark.parametrize("wrong", [dict(tokens=torch.tensor([[]], dtype=torch.long)), dict(tokens=torch.tensor([1, 2])),
                                   dict(max_new_tokens=-1), dict(temperature=-1), dict(temperature=math.nan), dict(top_k=0),
                                   dict(top_p=0.0), dict(top_p=1.1)])
def test_generate_says_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):    # at the call, not at the first token
        FMem(tiny()).generate(**{**dict(tokens=torch.tensor([[1]]), max_new_tokens=1), **wrong})


# Ten training losses. They change only if the model, its initialisation, the data order or the optimiser does; a new PyTorch
# may round otherwise, hence 1e-4. Without dropout, whose random numbers differ between versions of PyTorch.
FIRST_LOSSES = [5.73879, 5.68521, 5.58876, 5.5535, 5.53525, 5.41731, 5.40571, 5.32003, 5.37472, 5.36832]


def test_first_losses(corpus, tmp_path):
    train_py.train(settings(corpus, tmp_path / "out", max_steps=10, dropout=0.0))
    losses = [loss for _, loss in log_rows(tmp_path / "out", "train_loss")]
    assert losses == pytest.approx(FIRST_LOSSES, abs=1e-4)


def test_train_resume_sample(corpus, tmp_path, capsys):
    """The three commands in a row, on two threads; the resumed run is the unbroken one, bit for bit."""
    threads = torch.get_num_threads()
    runs = {name: settings(corpus, tmp_path / name, max_steps=8, eval_every=4, threads="2") for name in ("whole", "broken")}
    for name, steps in (("whole", 8), ("broken", 4)):
        train_py.main([f"--{k}={v}" for k, v in {**runs[name], "max_steps": steps, "lr": 1e-3, "min_lr": 1.0}.items()])
    train_py.main(["--out", runs["broken"]["out"], "--resume", "--max_steps", "8"])
    torch.set_num_threads(threads)
    whole, resumed = (load_checkpoint(Path(run["out"]) / "last.pt") for run in runs.values())
    assert same(whole["model"], resumed["model"]) and same(whole["optimizer"], resumed["optimizer"])
    capsys.readouterr()
    sample_py.main(["--checkpoint", str(tmp_path / "broken/best.pt"), "--prompt", "the river", "--max_new_tokens", "5"])
    assert capsys.readouterr().out.startswith("the river")


def test_readme_code_runs(run20, corpus, tmp_path, monkeypatch):
    """Every python block runs as written; every command of ours runs with its options, made short by more of them."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shutil.copytree(run20[0], tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("ROMEO:\n"))      # for --interactive
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
                          "--batch_size", "2", "--sample_tokens", "2", "--device", "cpu", "--no-compile", "--log", "csv"],
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
