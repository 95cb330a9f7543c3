"""lab/: each layer against its own equations, the recall tasks, training with them, evaluation."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fmem
from fmem import FactorizationMemory, FMem, FMemConfig, copy_state, scan_loop
from lab import evaluate, tasks
from lab import train as lab_train
from lab.layers import Attention, ExtendedMemory, Mamba2, matched_d_mlp
from lab.tasks import TASKS, score

# Relative errors in float64. Rounding is 1e-16 per operation, of which some thousands follow each
# other. The chunks of the memory are exact to TINY = 1e-8 of fmem.py where theta is near 1; and a
# gradient that is a small difference of large numbers is some times worse.
TOLERANCE = {Attention: 1e-10, Mamba2: 1e-10, ExtendedMemory: 1e-6}

LAYERS = {
    "attention": (Attention, {"n_head": 4, "n_kv_head": 2}),
    "attention, conv": (Attention, {"n_head": 2, "conv": 4}),
    "mamba2": (Mamba2, {"n_head": 2, "d_state": 5}),
    "conv": (ExtendedMemory, {"conv": 3}),
    "gate": (ExtendedMemory, {"gate": True}),
    "shared row": (ExtendedMemory, {"shared_row": True}),
    "shift": (ExtendedMemory, {"shift": True}),
    "all": (ExtendedMemory, {"conv": 3, "gate": True, "shared_row": True, "shift": True}),
}


def tiny(**changes):
    fields = {"vocab_size": 50, "n_layer": 2, "d_model": 16, "d_memory": 24, "n_rows": 8}
    return FMemConfig(**{**fields, "k_rows": 3, "tau": 0.5, **changes})


def layer64(name, **changes):
    """A layer in float64 with all of its weights drawn, those that start at a constant included."""
    layer_class, arguments = LAYERS[name]
    layer = layer_class(tiny(**changes), **arguments).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5 if weight.dim() > 1 else 1.0)
    return layer


def same(a, b):
    """Whether two states are equal, tensor by tensor."""
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def error(got, want, floor=1e-30):
    """Relative error; floor: what `want` counts for at least, where it may be zero."""
    return ((got - want).norm() / want.norm().clamp_min(floor)).item()


# The equations, for one sequence [T, d_model], token by token.


def conv_reference(conv, x):
    """u_t = silu(bias + sum_j weight[:, j] x_{t-j})."""
    tokens = []
    for t in range(len(x)):
        u = conv.bias
        for j in range(min(t + 1, conv.weight.shape[1])):
            u = u + conv.weight[:, j] * x[t - j]
        tokens.append(u / (1 + torch.exp(-u)))
    return torch.stack(tokens)


def attention_reference(layer, x):
    """Query by query, with the rotations as complex numbers."""
    H, D, n_kv_head = layer.n_head, layer.D, layer.n_kv_head
    x = x if layer.conv is None else conv_reference(layer.conv, x)
    positions = torch.arange(len(x), dtype=torch.float64)[:, None]
    angles = positions * 10000.0 ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotated(v):
        z = torch.complex(v[:, : D // 2], v[:, D // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    heads = []
    for i in range(H):
        j = i * n_kv_head // H  # neighbours share their keys and values
        q = rotated(x @ layer.W_q.weight[i * D : (i + 1) * D].T)
        k = rotated(x @ layer.W_k.weight[j * D : (j + 1) * D].T)
        v = x @ layer.W_v.weight[j * D : (j + 1) * D].T
        reads = []
        for t in range(len(x)):
            weights = torch.softmax(k[: t + 1] @ q[t] / D**0.5, 0)
            reads.append(weights @ v[: t + 1])
        heads.append(torch.stack(reads))
    return torch.cat(heads, -1) @ layer.W_o.weight.T


def mamba2_reference(layer, x):
    """Token by token and head by head."""
    H, P, N = layer.H, layer.P, layer.N
    inner = H * P
    projected = x @ layer.W_in.weight.T
    z = projected[:, :inner]
    u = conv_reference(layer.conv, projected[:, inner:-H])
    delta = torch.log1p(torch.exp(projected[:, -H:] + layer.delta_bias))
    S = [x.new_zeros(P, N)] * H
    outputs = []
    for t in range(len(x)):
        B = u[t, inner : inner + N]
        C = u[t, inner + N :]
        heads = []
        for i in range(H):
            X = u[t, i * P : (i + 1) * P]
            A = -torch.exp(layer.A_log[i])
            S[i] = torch.exp(delta[t, i] * A) * S[i] + delta[t, i] * torch.outer(X, B)
            heads.append(S[i] @ C + layer.D[i] * X)
        Y = torch.cat(heads) * z[t] * torch.sigmoid(z[t])
        normed = Y / torch.sqrt((Y * Y).mean() + layer.norm.eps) * layer.norm.weight
        outputs.append(layer.W_o.weight @ normed)
    return torch.stack(outputs)


def affinity_reference(logits, tau, k):
    alpha = torch.exp(logits / tau) / torch.exp(logits / tau).sum()
    gamma = alpha >= alpha.sort(descending=True).values[k - 1]
    return gamma * alpha / (gamma * alpha).sum()


def extended_reference(layer, x):
    """theta and phi token by token, then the definition of the memory's recurrence."""
    config = layer.config
    k = min(config.k_rows, len(layer.W_alpha.weight))
    u = x
    before = torch.zeros_like(x[0])  # what u is before the first token
    if layer.conv is not None:
        u = conv_reference(layer.conv, x)
        before = layer.conv.bias / (1 + torch.exp(-layer.conv.bias))
    theta = []
    phi = []
    for t in range(len(u)):
        logits = layer.W_alpha.weight @ u[t]
        to_write = logits
        if layer.shift is not None:
            share = 1 / (1 + torch.exp(-layer.shift))
            previous = layer.W_alpha.weight @ (u[t - 1] if t else before)
            to_write = (1 - share) * logits + share * previous
        eta = 1 / (1 + torch.exp(-layer.w_eta.weight[0] @ u[t]))
        mu = 1 / (1 + torch.exp(-layer.w_mu.weight[0] @ u[t]))
        theta_t = eta * affinity_reference(to_write, config.tau, k)
        phi_t = mu * affinity_reference(logits, config.tau, k)
        if layer.W_shared is not None:
            rates = 1 / (1 + torch.exp(-layer.W_shared.weight @ u[t]))
            theta_t = torch.cat([theta_t, rates[:1]])
            phi_t = torch.cat([phi_t, rates[1:]])
        theta.append(theta_t)
        phi.append(phi_t)
    xbar = u @ layer.W_i.weight.T
    y, _ = scan_loop(torch.stack(theta)[None], torch.stack(phi)[None], xbar[None], None, 1e-5)
    y = y[0]
    if layer.W_g is not None:
        g = x @ layer.W_g.weight.T
        y = y * g / (1 + torch.exp(-g))
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-5) * layer.gate_norm.weight
    return y @ layer.W_o.weight.T


REFERENCES = {
    Attention: attention_reference,
    Mamba2: mamba2_reference,
    ExtendedMemory: extended_reference,
}


@pytest.mark.parametrize("T", [1, 3, 65])  # a chunk of Mamba-2 has 64 tokens, of the memory 32
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_its_equations(name, T):
    """Outputs and the gradients of all weights and of the input, in float64."""
    layer = layer64(name)
    x = torch.randn(2, T, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    weights = torch.randn(2, T, 16, dtype=torch.float64)
    y, _ = layer(x)
    want = torch.stack([REFERENCES[type(layer)](layer, sequence) for sequence in x])
    assert error(y, want) < TOLERANCE[type(layer)]
    got = torch.autograd.grad((y * weights).sum(), leaves)
    want = torch.autograd.grad((want * weights).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        assert (
            error(a, b, floor=1e-3) < TOLERANCE[type(layer)]
        )  # for a single token some gradients are 0


@pytest.mark.parametrize("name", LAYERS)
def test_sequence_may_be_split_anywhere(name):
    """One pass = pieces = steps, with the state through torch.save in between."""
    layer = layer64(name)
    x = torch.randn(2, 100, 16, dtype=torch.float64)
    whole, last = layer(x)
    with torch.no_grad():
        y, state = layer(x[:, :1])
        parts = [y]
        y, state = layer(x[:, 1:70], state)
        parts.append(y)
        for t in range(70, 80):
            y, state = layer.step(x[:, t], state)
            parts.append(y[:, None])
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        y, after = layer(x[:, 80:], torch.load(file, weights_only=True))
        parts.append(y)
    assert error(torch.cat(parts, 1), whole) < TOLERANCE[type(layer)]
    for a, b in zip(after, last, strict=True):
        assert a == b if isinstance(a, int) else error(a, b, floor=1e-3) < TOLERANCE[type(layer)]


@pytest.mark.parametrize("name", LAYERS)
def test_forward_does_not_change_the_state(name):
    """Nor does a copy share anything with the state that steps may change."""
    layer = layer64(name)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    with torch.no_grad():
        _, state = layer(x[:, :20])
        for t in range(20, 25):  # attention's cache has room after steps
            _, state = layer.step(x[:, t], state)
        before = copy_state(state)
        for T in (1, 5):
            first, _ = layer(x[:, 25 : 25 + T], state)
            again, _ = layer(x[:, 25 : 25 + T], state)
            assert torch.equal(first, again)
        branch = copy_state(state)
        _, branch = layer.step(x[:, 0], branch)
        layer.step(x[:, 1], branch)
        assert same(state, before)


@pytest.mark.parametrize("name", LAYERS)
def test_generate_and_checkpoint(name, tmp_path):
    """Every layer generates what reading the whole text again would, and loads by its name."""
    layer, arguments = LAYERS[name]
    config = tiny()
    model = FMem(config, layer, arguments).eval()
    tokens = torch.randint(50, (2, 9))
    for token in model.generate(tokens, 8, temperature=0):
        assert torch.equal(token, model(tokens)[0][:, -1].argmax(-1))
        tokens = torch.cat([tokens, token[:, None]], 1)
    saved = {
        "format": fmem.FORMAT,
        "config": dataclasses.asdict(config),
        "layer": model.layer_name,
        "layer_arguments": model.layer_arguments,
        "model": model.state_dict(),
        "step": 7,
    }
    torch.save(saved, tmp_path / "a.pt")
    loaded, rest = fmem.load(tmp_path / "a.pt")
    assert type(loaded.blocks[0].memory) is layer and rest["step"] == 7
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_bf16_autocast_stays_near_float32(name):
    """bf16 has 8 bits: a hundredth after a layer of some roundings. The state goes on as well."""
    layer = layer64(name).float()
    x = torch.randn(2, 40, 16)
    want, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x[:, :30])
        z, _ = layer(x[:, 30:], state)
    assert error(torch.cat([y, z], 1).float(), want) < 0.05


@pytest.mark.parametrize("k_rows", [3, None])
def test_shared_row_is_written_and_read_by_every_token(k_rows):
    """At the start at rates of 1/2; the others are routed to as before, all of them if dense."""
    layer = ExtendedMemory(tiny(k_rows=k_rows), shared_row=True)
    layer.init_weights(lambda weight, scale=1.0: torch.nn.init.normal_(weight), 1.0)
    theta, phi, _ = layer.scan_inputs(torch.randn(2, 20, 16))
    for weights in (theta, phi):
        assert (weights[..., -1] == 0.5).all()
        assert ((weights[..., :-1] > 0).sum(-1) == (k_rows or 7)).all()
        # eta and mu start at 1/2
        assert torch.allclose(weights[..., :-1].sum(-1), torch.full((2, 20), 0.5), atol=1e-6)


def test_mamba2_starts_as_its_authors_start_it():
    layer = Mamba2(tiny(d_model=2048))
    layer.init_weights(lambda weight, scale=1.0: None, 1.0)
    delta = F.softplus(layer.delta_bias)
    A = layer.A_log.exp()
    assert delta.min() >= 0.99e-3 and delta.max() <= 0.101
    assert 0.005 < delta.median() < 0.02  # log-uniform
    assert A.min() >= 1 and A.max() <= 16 and 6 < A.mean() < 11
    assert (layer.D == 1).all()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("d_model, n_rows", [(128, 32), (192, 48), (384, 64)])
def test_models_of_matched_width_have_as_many_parameters(name, d_model, n_rows):
    layer, arguments = LAYERS[name]

    def parameters(config, **more):
        with torch.device("meta"):
            return sum(p.numel() for p in FMem(config, **more).parameters())

    config = FMemConfig(d_model=d_model, n_rows=n_rows, n_layer=5)
    d_mlp = matched_d_mlp(config, layer, arguments)
    matched = dataclasses.replace(config, d_mlp=d_mlp)
    got = parameters(matched, layer=layer, layer_arguments=arguments)
    step = 5 * 3 * d_model * 8  # d_mlp is a multiple of 8
    assert abs(got - parameters(config)) <= step / 2


@pytest.mark.parametrize(
    "layer, arguments, message",
    [
        (Attention, {"n_head": 3}, "n_head 3 must divide d_model 16"),
        (Attention, {"n_head": 16}, "even"),
        (Attention, {"n_head": 4, "n_kv_head": 3}, "n_kv_head 3 must divide n_head 4"),
        (Attention, {"conv": -1}, "at least 1"),
        (Mamba2, {"n_head": 3}, "n_head 3 must divide 2 d_model, 32"),
        (Mamba2, {"conv": 0}, "at least 1"),
        (ExtendedMemory, {"conv": -4}, "at least 1"),
    ],
)
def test_layer_says_what_is_wrong(layer, arguments, message):
    with pytest.raises(ValueError, match=message):
        layer(tiny(), **arguments)
    with pytest.raises(ValueError, match="at least 2"):
        ExtendedMemory(tiny(n_rows=1, k_rows=1), shared_row=True)
    with pytest.raises(ValueError, match="set d_mlp"):
        matched_d_mlp(tiny(), Mamba2, {"d_state": 999})


LLAMA_NAMES = (
    ("memory_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
    ("memory.W_", "self_attn."),
    ("mlp.W_", "mlp."),
    *((f".{name}.", f".{name}_proj.") for name in ("q", "k", "v", "o", "gate", "up", "down")),
    ("blocks.", "model.layers."),
    ("embed.", "model.embed_tokens."),
    ("head.", "lm_head."),
)


def test_attention_is_that_of_transformers():
    """The whole model against LlamaForCausalLM, which rotates and normalises in float32."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = tiny(d_model=48, d_mlp=80)
    ours = FMem(config, Attention, {"n_head": 6, "n_kv_head": 2}).double()
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    ).double()
    weights = {}
    for name, weight in ours.state_dict().items():
        for mine, other in LLAMA_NAMES:
            name = name.replace(mine, other)
        weights[f"model.{name}" if name == "norm.weight" else name] = weight
    theirs.load_state_dict(weights)
    tokens = torch.randint(50, (2, 37))
    assert error(ours(tokens)[0], theirs(tokens).logits) < 2e-6


def test_mamba2_is_that_of_transformers():
    """The layer against Mamba2Mixer with the same weights, which computes in float32."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    ours = Mamba2(tiny(d_model=32), n_head=4, d_state=16).double()
    ours.init_weights(lambda w, scale=1.0: torch.nn.init.normal_(w, std=w.shape[1] ** -0.5), 1.0)
    config = Mamba2Config(
        hidden_size=32,
        num_heads=4,
        head_dim=16,
        state_size=16,
        n_groups=1,
        expand=2,
        conv_kernel=4,
        layer_norm_epsilon=1e-5,
        chunk_size=16,
        use_bias=False,
    )
    theirs = Mamba2Mixer(config, 0).double()
    names = {
        "W_in.weight": "in_proj.weight",
        "conv.weight": "conv1d.weight",
        "conv.bias": "conv1d.bias",
        "delta_bias": "dt_bias",
        "W_o.weight": "out_proj.weight",
    }
    weights = {names.get(name, name): weight for name, weight in ours.state_dict().items()}
    # PyTorch's convolution multiplies the oldest token by its first weight, ours by its last.
    weights["conv1d.weight"] = weights["conv1d.weight"].flip(1)[:, None]
    theirs.load_state_dict(weights)
    x = torch.randn(2, 37, 32, dtype=torch.float64)
    assert error(ours(x)[0], theirs(x)) < 2e-6


# Recall tasks.


def task(name, context, seed=3):
    return TASKS[name](SimpleNamespace(context=context, seed=seed))


@pytest.mark.parametrize("name", TASKS)
def test_window_is_a_function_of_seed_and_number(name):
    windows = task(name, 40).windows(5, 6)
    assert windows.shape == (6, 41)
    assert torch.equal(windows[2:4], task(name, 40).windows(7, 2))
    assert len(windows.unique(dim=0)) == 6
    assert not torch.equal(windows, task(name, 40, seed=4).windows(5, 6))
    for seed in (0, 3):
        own = task(name, 40, seed)
        assert not torch.equal(own.windows(5, 6), own.windows(5, 6, held_out=True))
    with pytest.raises(ValueError, match="at least"):
        task(name, 7)
    with pytest.raises(ValueError, match="room for"):
        task(name, 40).windows(0, 1, hard=33)


def test_associative_recall_asks_for_any_key_at_any_time():
    recall = task("mqar", 64)
    windows = recall.windows(0, 200)
    numbers = Counter()
    followed = 0
    repeated = 0
    for window, targets in zip(windows.tolist(), recall.targets(windows).tolist(), strict=True):
        ask = window.index(tasks.ASK)
        pairs = dict(zip(window[:ask:2], window[1:ask:2], strict=True))
        numbers[len(pairs)] += 1
        assert ask == 2 * len(pairs)  # no key has two values
        asked = window[ask + 1 : -1 : 2]
        answers = [target for target in targets if target >= 0]
        assert answers == [pairs[key] for key in asked] == targets[ask + 1 :: 2]
        if len(pairs) == 4:
            followed += len(asked) - 1
            repeated += sum(a == b for a, b in itertools.pairwise(asked))
    assert set(numbers) == {4, 8, 16} and min(numbers.values()) > 40  # 67 each, +- 7
    # A key follows itself as often as any of the four; five standard errors.
    assert repeated / followed == pytest.approx(1 / 4, abs=5 * (3 / 16 / followed) ** 0.5)


def test_passkey_is_somewhere_before_the_question():
    recall = task("passkey", 40)
    windows = recall.windows(0, 300)
    places = set()
    for window, targets in zip(windows.tolist(), recall.targets(windows).tolist(), strict=True):
        here = window.index(tasks.HERE)
        places.add(here)
        assert window[-5] == tasks.ASK
        answers = [target for target in targets if target >= 0]
        assert window[here + 1 : here + 5] == window[-4:] == answers == targets[-4:]
        assert all(64 <= token < 74 for token in answers)
    assert places == set(range(32))
    assert (recall.windows(0, 5, hard=31)[:, 0] == tasks.HERE).all()


class Copier:
    """A model that expects after a token what followed it last, if it was at most `reach` ago."""

    def __init__(self, reach):
        self.reach = reach

    def __call__(self, tokens, state=None):
        seen = tokens if state is None else torch.cat([state, tokens], 1)
        logits = torch.zeros(*seen.shape, tasks.VOCAB_SIZE)
        for b, window in enumerate(seen.tolist()):
            for t, token in enumerate(window):
                for s in range(max(t - self.reach, 0), t):
                    if window[s] == token:
                        logits[b, t] = 0
                        logits[b, t, window[s + 1]] = 99.0
        return logits[:, -tokens.shape[1] :], seen


def test_score_is_right_in_pieces_too(monkeypatch):
    recall = task("mqar", 32)
    windows = recall.windows(0, 7)
    targets = recall.targets(windows)
    whole = score(Copier(10), windows, targets, torch.device("cpu"))
    monkeypatch.setattr(tasks, "TOKENS_AT_ONCE", 12)
    pieces = score(Copier(10), windows, targets, torch.device("cpu"))
    assert torch.equal(whole[0], pieces[0]) and torch.equal(whole[1], pieces[1])
    nats, right = whole
    assert 0 < right.sum() < (targets >= 0).sum() and not right[targets < 0].any()
    assert nats[right].max() < 1e-6 and nats[targets < 0].max() == 0
    unknown = nats[(targets >= 0) & ~right]  # no key is ever followed by another value
    assert torch.allclose(unknown, torch.full_like(unknown, math.log(130)))


def test_validation_counts_every_window_once():
    """Two processes with three windows at a time validate ten: the sums are those of the ten."""
    recall = task("mqar", 16)
    windows = recall.windows(0, 10, held_out=True)
    targets = recall.targets(windows)
    nats, right = score(Copier(9), windows, targets, torch.device("cpu"))
    sums = []

    def keep(*numbers):
        sums.append(numbers)
        return numbers

    for rank in (0, 1):
        processes = SimpleNamespace(rank=rank, world=2, device=torch.device("cpu"), sum=keep)
        recall.validate(Copier(9), 160, 3, processes, contextlib.nullcontext)
    want = [nats.sum().item(), right.sum().item(), (targets >= 0).sum().item()]
    assert [sum(both) for both in zip(*sums, strict=True)] == pytest.approx(want)


def test_recall_by_pairs_and_by_distance():
    results = list(evaluate.recall_by_pairs(Copier(16), 64, torch.device("cpu"), count=20))
    by_pairs = [r for r in results if r["result"] == "recall"]
    assert [r["pairs"] for r in by_pairs] == [4, 8, 16]
    for r in by_pairs:
        rows = [d for d in results if d["pairs"] == r["pairs"] and d != r]
        assert all(d["right"] == (d["to"] <= 16) for d in rows)
        assert sum(d["answers"] for d in rows) == r["answers"]
        right = sum(d["right"] * d["answers"] for d in rows)
        assert right / r["answers"] == pytest.approx(r["right"])
        assert r["nats"] == pytest.approx((1 - r["right"]) * math.log(130))
    results = list(evaluate.recall_by_distance(Copier(0), 16, 8, torch.device("cpu")))
    assert [(r["length"], r["distance"]) for r in results] == [(16, 7), (64, 55)]
    assert all(r["right"] == 0 and r["answers"] == 1024 for r in results)


# Evaluation of text.


class Counting:
    """A model whose loss on the t-th token of a window, counted from 1, is ln(1 + e^-level(t))."""

    def __init__(self, level):
        self.level = level

    def __call__(self, tokens, state=None):
        start = state or 0
        logits = torch.zeros(*tokens.shape, 2)
        for t in range(tokens.shape[1]):
            logits[:, t, 0] = self.level(start + t + 1)
        return logits, start + tokens.shape[1]


def test_losses_of_a_text(monkeypatch):
    """Windows from an empty state each, the last one shorter."""
    model = FMem(tiny()).eval()
    tokens = torch.randint(50, (100,))
    want = []
    with torch.no_grad():
        for start in range(0, 99, 24):
            window = tokens[start : min(start + 25, 100)]
            logits, _ = model(window[None, :-1])
            want.append(F.cross_entropy(logits[0], window[1:], reduction="none"))
    monkeypatch.setattr(tasks, "TOKENS_AT_ONCE", 30)
    got = evaluate.text_losses(model, tokens, 24, torch.device("cpu"))
    assert error(got, torch.cat(want).double()) < 1e-6
    results = list(evaluate.loss_by_position(model, tokens, 24, 200, torch.device("cpu")))
    assert results[0]["nats"] == pytest.approx(got.mean().item())
    assert results[0]["bits_per_byte"] == pytest.approx(got.sum().item() / math.log(2) / 200)
    by_position = got[:96].view(4, 24).mean(0)
    assert [(r["from"], r["to"]) for r in results[1:]] == [(1, 8), (9, 16), (17, 24)]
    assert results[2]["nats"] == pytest.approx(by_position[8:16].mean().item())


def test_loss_beyond_the_training_length():
    """A loss that falls after 32 tokens shows from windows of 64 on, and nowhere else."""
    tokens = torch.zeros(8 * 32 + 5, dtype=torch.long)
    near = math.log(2)
    far = math.log(1 + math.exp(-2))
    model = Counting(lambda t: 2.0 if t > 32 else 0.0)
    results = list(evaluate.loss_beyond(model, tokens, 32, 8, torch.device("cpu")))
    assert [r["length"] for r in results] == [32, 64, 128, 256]
    for r in results:
        share = 32 / r["length"]
        assert r["mean"] == pytest.approx(share * near + (1 - share) * far, abs=1e-6)
        assert r["at_end"] == pytest.approx(near if r["length"] == 32 else far, abs=1e-6)
        assert r["stderr"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="at most 8"):
        list(evaluate.loss_beyond(model, tokens, 32, 16, torch.device("cpu")))


def test_description_of_rows():
    """Of weights that are known: four rows, each for every fourth token, at a rate of 1/2."""
    alpha = F.one_hot(torch.arange(960) % 4, 8).double()
    got = evaluate.describe_rows(0.5 * alpha, 0.25 * alpha)
    assert got["entropy"] == pytest.approx(0) and got["rows_per_token"] == pytest.approx(1)
    assert got["rows_used"] == pytest.approx(4) and got["largest_share"] == pytest.approx(1 / 4)
    assert got["eta"] == pytest.approx(0.5) and got["mu"] == pytest.approx(0.25)
    assert got["largest_half_life"] == pytest.approx(4) and got["half_life"][0] == pytest.approx(4)
    assert got["half_life"][-1] > 1e9  # of a row that is never written


def test_routing_of_a_model():
    """As it starts: rates of 1/2, a shift of 0.12; and it follows the blocks as the model does."""
    model = FMem(tiny(), ExtendedMemory, {"shared_row": True, "shift": True, "conv": 2}).eval()
    tokens = torch.randint(50, (100,))
    results = list(evaluate.routing(model, tokens, 24, torch.device("cpu")))
    assert [r["layer"] for r in results] == [0, 1]
    for r in results:
        assert r["rows"] == 7 and 1 < r["rows_per_token"] < 3 < r["rows_used"] < 7
        assert r["eta"] == pytest.approx(0.5) and r["shared_mu"] == pytest.approx(0.5)
        assert r["shared_half_life"] == pytest.approx(1)  # half of it is replaced by every token
        assert r["lambda"] == pytest.approx(1 / (1 + math.exp(2)))
    inputs = []
    hook = model.blocks[1].memory.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(tokens[:96].view(4, 24))
        hook.remove()
        theta, phi, _ = model.blocks[1].memory.scan_inputs(inputs[0])
    want = evaluate.describe_rows(theta.flatten(0, 1)[:, :7], phi.flatten(0, 1)[:, :7])
    assert results[1]["entropy"] == pytest.approx(want["entropy"], rel=1e-5)
    with pytest.raises(ValueError, match="Attention has none"):
        list(evaluate.routing(FMem(tiny(), Attention), tokens, 24, torch.device("cpu")))
    with pytest.raises(ValueError, match="fewer than the context"):
        list(evaluate.routing(model, tokens, 101, torch.device("cpu")))


# The commands.


@pytest.fixture(scope="module", params=["", "--layer attention --conv 2 --n_head 2"])
def recall_run(request, tmp_path_factory):
    """Options of a layer, and the folder of a run with it on associative recall."""
    folder = tmp_path_factory.mktemp("recall") / "out"
    size = "--n_layer 1 --d_model 16 --n_rows 8 --k_rows 2 --batch_size 4 --context 16"
    steps = "--max_steps 6 --eval_every 3 --keep_every 3 --log_every 1 --device cpu"
    command = f"--data mqar {size} {steps} {request.param} --out"
    lab_train.main([*command.split(), str(folder)])
    return request.param, folder


def last_column(folder, name):
    with open(folder / "log.csv", encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_run_on_recall(recall_run, capsys):
    options, folder = recall_run
    model, saved = fmem.load(folder / "best.pt")
    assert saved["layer"] == ("Attention" if options else "FactorizationMemory")
    assert saved["corpus"] == "mqar" and saved["tokenizer"] is None
    assert len(last_column(folder, "val_accuracy")) >= 2
    assert 4.3 < last_column(folder, "val_loss")[-1] < 5.5  # ln 130 = 4.87 before it learns
    evaluate.main([str(folder / "last.pt"), "--recall"])
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["pairs"] for r in results if r["result"] == "recall"] == [4]
    size = FMemConfig(130, 1, 16, n_rows=8, k_rows=2)
    layer = type(model.blocks[0].memory)
    assert model.config.d_mlp == matched_d_mlp(size, layer, model.layer_arguments)


@pytest.mark.parametrize("again", [False, True])
def test_run_is_resumed_exactly(recall_run, again, tmp_path):
    """With the layer's options given again or not, the rest of the run is that of the unbroken."""
    options, folder = recall_run
    shutil.copy(folder / "step-3.pt", tmp_path / "last.pt")
    options = [*options.split(), "--data", "mqar"] if again else []
    lab_train.main([*options, "--resume", "--device", "cpu", "--out", str(tmp_path)])
    whole = fmem.load(folder / "last.pt")[0].state_dict()
    resumed = fmem.load(tmp_path / "last.pt")[0].state_dict()
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize(
    "options, layer, arguments",
    [
        ("", FactorizationMemory, {}),
        ("--conv 0", FactorizationMemory, {}),
        ("--shared_row --conv 3", ExtendedMemory, {"shared_row": True, "conv": 3}),
        ("--layer attention --n_kv_head 1", Attention, {"n_kv_head": 1}),
        ("--layer mamba2 --conv 2 --d_state 4", Mamba2, {"conv": 2, "d_state": 4}),
    ],
)
def test_options_of_layers(options, layer, arguments, monkeypatch):
    calls = []
    monkeypatch.setattr(lab_train.train, "train", lambda *given: calls.append(given))
    lab_train.main([*options.split(), "--d_mlp", "40", "--data", "passkey", "--device", "cpu"])
    given, *rest = calls[0]
    assert given == {"d_mlp": 40, "data": "passkey", "device": "cpu"}
    assert rest[:3] == [layer, arguments, TASKS["passkey"]]


def test_evaluation_of_a_text(run, capsys):
    """The loss is that of the training; the same command prints the same lines."""
    command = [str(run / "last.pt"), "--loss", "--long", "--routing", "--times", "4"]
    outputs = []
    for _ in range(2):
        evaluate.main([*command, "--tokens", "300", "--device", "cpu"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    results = [json.loads(line) for line in outputs[0].splitlines()]
    assert {r["result"] for r in results} == {"loss", "position", "long", "routing"}
    # log.csv has six digits
    assert results[0]["nats"] == pytest.approx(last_column(run, "val_loss")[-1], rel=2e-6)
    assert results[0]["bits_per_byte"] == pytest.approx(last_column(run, "val_bpb")[-1], rel=2e-6)
    long = [r for r in results if r["result"] == "long"]
    assert [r["length"] for r in long] == [24, 48, 96] and long[0]["tokens"] == 288  # 3 windows


def test_commands_say_what_is_wrong(run, recall_run, tmp_path, capsys):
    text = str(run / "last.pt")
    recall = str(recall_run[1] / "last.pt")
    cases = [
        (evaluate.main, [text], 2, "nothing to measure"),
        (evaluate.main, [text, "--long", "--times", "0"], 2, "--times"),
        (evaluate.main, [str(tmp_path / "no.pt"), "--loss"], 1, "does not exist"),
        (evaluate.main, [text, "--recall"], 1, "--recall is for models of mqar"),
        (evaluate.main, [recall, "--loss"], 1, "reads no text"),
        (evaluate.main, [text, "--loss", "--data", str(tmp_path)], 1, "prepare"),
        (evaluate.main, [text, "--long", "--times", "99999"], 1, "at most"),
        (lab_train.main, ["--layer", "mamba2", "--gate"], 2, "--gate is not an option"),
        (lab_train.main, ["--layer", "rnn"], 2, "rnn"),
        (lab_train.main, ["--data", "mqar", "--context", "15"], 2, "at least 16"),
    ]
    for main, arguments, code, message in cases:
        if main is lab_train.main:
            arguments = [*arguments, "--device", "cpu", "--out", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as error:
            main(arguments)
        printed = capsys.readouterr().err
        assert error.value.code == code and message in printed, printed
        assert len(printed.strip().splitlines()) == 1
