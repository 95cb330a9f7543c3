"""variants/: every layer against its own equations, and under training."""
import io
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

import fast
import train as train_py
from fmem import FMem, scan_loop
from tests.helpers import GPU, by_steps, error, kernel, log_rows, same, settings, tiny, tiny_config, tiny_model
from training.checkpoint import model_from
from variants.ablations import aux_loss
from variants.build import ModelConfig, build, layer_of, n_parameters

MIXERS = {"attention": dict(mixer="attention", n_head=4, n_kv_head=2), "mamba2": dict(mixer="mamba2", n_head=2, d_state=5),
          "conv": dict(conv=3), "gate": dict(gate=True), "both": dict(conv=4, gate=True, k_rows=None),
          "shared": dict(shared_row=True), "shared, dense": dict(shared_row=True, k_rows=None), "shift": dict(shift=True),
          "read_rank": dict(read_rank=2), "shared, shift": dict(shared_row=True, shift=True),
          "all": dict(conv=3, gate=True, shared_row=True, shift=True, read_rank=2),
          "shift, then conv": dict(conv=3, ablation="shift=before"), "linear conv": dict(conv=3, ablation="conv=linear"),
          "shared, shift, linear conv": dict(conv=3, shared_row=True, shift=True, ablation="conv=linear")}


ABLATIONS = ("eta=1", "mu=1", "eta=0.8", "mu=0.8", "untied", "norm_after", "no_renorm", "balance=0.01", "gumbel", "learned_rows",
             "average", "shared=write", "shared=read", "shared=bias", "shared=2")


def layer_from(config):
    return layer_of(config)(config)


def mixer64(**changes):
    """A layer in float64 with all of its weights drawn, those that start at a constant included."""
    layer = layer_from(tiny_config(d_mlp=32, **changes)).double()
    layer.init_weights(lambda weight, scale=1.0: torch.nn.init.normal_(weight, std=scale / weight.shape[1] ** 0.5), 1.0)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith(("w_", "D", "norm", "gate_norm", "shift", "W_read_out")):
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


def conv_reference(conv, x, linear=False):
    """Each channel by itself: bias + sum_j weight[j] x[t - width + 1 + j], then x sigmoid(x) if not linear."""
    w, padded = conv.weight.shape[1], torch.cat([torch.zeros_like(x[:1]).expand(conv.weight.shape[1] - 1, -1), x])
    u = torch.stack([conv.bias + sum(conv.weight[:, j] * padded[t + j] for j in range(w)) for t in range(len(x))])
    return u if linear else u * torch.sigmoid(u)


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


def routed_reference(layer, x, u):
    """theta, phi of one text with a shared row, a shifted write, a read of its own: token by token, from the equations."""
    config, theta, phi = layer.config, [], []

    def affinity(logits):
        alpha = torch.exp(logits / config.tau) / torch.exp(logits / config.tau).sum()
        chosen = alpha >= alpha.sort(descending=True).values[config.k_rows - 1] if config.k_rows else alpha >= 0
        return alpha * chosen / (alpha * chosen).sum()

    if hasattr(layer, "shift"):
        lam = 1 / (1 + torch.exp(-layer.shift))
        moved = (1 - lam) * x + lam * torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        moved = conv_reference(layer.conv, moved) if config.conv else None
    for t in range(len(u)):
        logits = layer.W_alpha.weight @ u[t]
        write = read = logits
        if config.ablation == "shift=before":
            write = layer.W_alpha.weight @ moved[t]
        elif config.shift:
            write = (1 - lam) * logits + lam * (layer.W_alpha.weight @ u[t - 1] if t else 0)
        if config.read_rank:
            read = logits + layer.W_read_out.weight @ (layer.W_read_in.weight @ u[t])
        theta.append(torch.sigmoid(layer.w_eta.weight[0] @ u[t]) * affinity(write))
        phi.append(torch.sigmoid(layer.w_mu.weight[0] @ u[t]) * affinity(read))
        if config.shared_row:
            rates = torch.sigmoid(layer.w_shared.weight @ u[t])
            theta[-1], phi[-1] = torch.cat([theta[-1], rates[:1]]), torch.cat([phi[-1], rates[1:]])
    return torch.stack(theta), torch.stack(phi)


def extended_reference(layer, x):
    """ExtendedMemory's equation around the plain memory's read."""
    u = conv_reference(layer.conv, x, layer.config.ablation == "conv=linear") if layer.config.conv else x
    if layer.config.shared_row or layer.config.read_rank or hasattr(layer, "shift"):
        theta, phi = routed_reference(layer, x, u)
        y = scan_loop(theta[None], phi[None], u[None] @ layer.W_i.weight.T, None, layer.config.norm_eps)[0][0]
    else:
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
    """The likeliest token, one at a time, is that of the whole text read again."""
    model = tiny_model(**MIXERS[name]).double().eval()
    tokens = torch.randint(50, (2, 9))
    for token in model.generate(tokens, 12, temperature=0):
        assert torch.equal(token, model(tokens)[0][:, -1].argmax(-1))
        tokens = torch.cat([tokens, token[:, None]], 1)


def test_attention_is_that_of_transformers():
    """The whole model against LlamaForCausalLM with the same weights (which rotates and normalises in float32)."""
    transformers = pytest.importorskip("transformers", reason="the transformers package is not installed")
    ours = tiny_model(d_model=48, mixer="attention", n_head=6, n_kv_head=2, d_mlp=80).double()
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
        config = ModelConfig(n_layer=5, **size, **changes)
        with torch.device("meta"):
            counted = sum(p.numel() for p in build(config).parameters())
        assert counted == n_parameters(config)
        return counted
    plain = parameters()
    for changes in (dict(mixer="attention"), dict(mixer="mamba2"), dict(conv=4, gate=True), dict(gate=True), dict(conv=4),
                    dict(shared_row=True, shift=True), dict(read_rank=8), *(dict(ablation=a) for a in ABLATIONS)):
        assert parameters(**changes) == pytest.approx(plain, rel=0.02)
    assert parameters(mixer="mamba2", d_mlp=8) < 0.9 * plain           # a width that is asked for is taken


def test_mamba2_starts_as_its_authors_start_it():
    layer = layer_from(ModelConfig(d_model=2048, mixer="mamba2", d_mlp=8))
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
        layer = tiny_model(ablation=name).blocks[0].memory
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
    model = tiny_model(ablation="balance=0.5")
    model(torch.randint(50, (2, 9)))
    assert aux_loss(model) == sum(block.memory.aux_loss for block in model.blocks) and aux_loss(FMem(tiny())) == 0


def test_ablations_of_the_shared_row():
    """Which rows are outside the softmax, for the write and for the read; at first their rates are 1/2."""
    x, half = torch.randn(2, 20, 16, dtype=torch.float64), torch.full((2, 20), 0.5, dtype=torch.float64)

    def tokens(weights):                                # a row outside the softmax has a part in every token's
        return (weights > 0).sum(-1).unique().tolist()

    for name, writes, reads in (("shared=write", 4, 3), ("shared=read", 3, 4), ("shared=2", 5, 5), ("average", 4, 4),
                                ("shared=bias", 3, 3)):
        layer = mixer64(ablation=name)                  # k = 3 of m = 8
        theta, phi, _ = layer.route(x)
        assert tokens(theta) == [writes] and tokens(phi) == [reads]
        layer.init_weights(lambda weight, scale=1.0: torch.nn.init.zeros_(weight), 1.0)
        theta, phi, _ = layer.route(x)                  # all logits 0: the others share what the rates of 1/2 give
        outside = {"shared=2": [6, 7]}.get(name, [7])
        for weights, is_outside in ((theta, name != "shared=read"), (phi, name != "shared=write")):
            if name == "shared=bias":                   # half of the affinity before the top k, with two of seven of the rest
                assert torch.allclose(weights[..., 7], half / (1 + 2 / 7)) and tokens(weights) == [3]
            elif is_outside:
                assert torch.allclose(weights[..., outside], half[..., None])
                assert torch.allclose(weights.sum(-1), half * (1 + len(outside)))
            else:
                assert torch.allclose(weights.sum(-1), half)

    layer = mixer64(ablation="average")                 # the last row is read as it is, the others by their direction
    theta, phi, _ = layer.route(x)
    xbar, h = layer.W_i(x), torch.zeros(2, 8, 24, dtype=torch.float64)
    for t in range(20):
        h = (1 - theta[:, t, :, None]) * h + theta[:, t, :, None] * xbar[:, t, None]
        scale = torch.rsqrt(h.square().mean(-1) + 1e-5)
        scale[:, -1] = 1
        assert error(layer(x)[0][:, t], ((phi[:, t] * scale)[:, None] @ h)[:, 0] @ layer.W_o.weight.T) < 1e-6    # as norm_after


def test_ablations_of_what_a_text_starts_with_and_of_noise():
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    layer = mixer64(ablation="learned_rows")
    theta, phi, _ = layer.route(x)
    want, _ = scan_loop(theta, phi, layer.W_i(x), layer.rows.expand(2, -1, -1))
    assert error(layer(x)[0], want @ layer.W_o.weight.T) < 1e-12
    assert error(layer.step(x[:, 0])[0], layer(x)[0][:, 0]) < 1e-12
    assert torch.autograd.grad(layer(x)[0].sum(), layer.rows)[0].abs().sum() > 0
    layer = mixer64(ablation="gumbel", k_rows=1)
    layer.W_alpha.weight.data.zero_()
    assert layer.eval().route(x)[0].argmax(-1).unique().numel() == 1        # no noise outside training
    layer.train()
    layer.W_alpha.weight.data[0] = 0.5 * math.log(3) * torch.eye(16, dtype=torch.float64)[0]    # tau is 1/2
    x = torch.zeros(1, 20000, 16, dtype=torch.float64)
    x[..., 0] = 1
    chosen = layer.route(x)[0].argmax(-1)[0]
    # the row of the largest noisy logit is drawn from the softmax: 3/10 for the first; the tolerance is five standard errors
    assert (chosen == 0).double().mean().item() == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 20000) ** 0.5)


@pytest.mark.parametrize("changes, message", [
    (dict(mixer="rnn"), "mixer"), (dict(conv=-1), "conv"), (dict(gate=1), "gate"), (dict(mixer="attention", n_head=3), "n_head"),
    (dict(mixer="attention", n_head=4, n_kv_head=3), "n_kv_head"), (dict(mixer="mamba2", n_head=3), "n_head"),
    (dict(mixer="attention", n_head=16), "even"), (dict(n_head=0), "n_head"), (dict(mixer="mamba2", gate=True), "do not go with"),
    (dict(ablation="eta"), "eta=NUMBER"), (dict(ablation="eta=2"), "eta=NUMBER"), (dict(ablation="mu=x"), "mu=NUMBER"),
    (dict(ablation="untied=1"), "untied"), (dict(ablation="shift=after"), "shift=before"),
    (dict(ablation="shift=before"), "set conv"), (dict(ablation="conv=linear"), "set conv"),
    (dict(ablation="shared"), "shared=write"), (dict(ablation="shared=3"), "shared=write"), (dict(ablation="gumbel="), "gumbel"),
    (dict(ablation="average", k_rows=8), "at most n_rows - 1"), (dict(ablation="shared=2", k_rows=7), "at most n_rows - 2"),
    (dict(ablation="shared=bias", n_rows=1, k_rows=None), "at least 2 rows"),
    (dict(ablation="tau=1"), "not one of"), (dict(d_state=0), "d_state"),
    (dict(mixer="mamba2", d_state=9999), "set d_mlp"), (dict(shared_row=True, k_rows=8), "k_rows must be below"),
    (dict(shared_row=1), "shared_row"), (dict(shift="yes"), "shift"), (dict(read_rank=-1), "read_rank"),
    (dict(shift=True, mixer="attention"), "do not go with"), (dict(shared_row=True, ablation="untied"), "does not go with")])
def test_config_of_mixers_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**changes)


@pytest.mark.parametrize("name", [*MIXERS, "balance=0.01", "gumbel", "learned_rows", "average"])
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
    model = model_from(resumed, "cpu")
    assert same(model.state_dict(), whole["model"])


@pytest.mark.parametrize("scan", ["loop", "chunked", "fast", "kernel"])
def test_changed_routing_in_every_form(scan):
    """A shared row, a shifted write and a read of its own go through every form of the scan, and of the step."""
    changes = dict(shared_row=True, shift=True, read_rank=2, n_rows=16, k_rows=3)
    torch.manual_seed(0)
    model = tiny_model(scan=scan, **changes)
    torch.manual_seed(0)
    plain = tiny_model(scan="loop", **changes)
    for layer in [*model.blocks, *plain.blocks]:        # what starts at 0 is moved, alike in both
        torch.manual_seed(1)
        for weight in (layer.memory.w_shared.weight, layer.memory.W_read_out.weight):
            torch.nn.init.normal_(weight, std=0.3)
    tokens = torch.randint(50, (2, 37))
    want, _ = plain(tokens)
    with torch.no_grad():
        got, state = model(tokens[:, :30])
        logits, _ = by_steps(model.eval(), tokens[:, :30])
    # float32: some hundreds of roundings, in another order
    assert error(got, want[:, :30]) < 1e-5 and error(torch.stack(logits, 1), want[:, :30]) < 1e-5
    with torch.no_grad():
        assert error(model(tokens[:, 30:], state)[0], want[:, 30:]) < 1e-5
    gradients = [torch.autograd.grad(m(tokens)[0].square().mean(), list(m.parameters())) for m in (model, plain)]
    assert all(error(a, b, 1e-6) < 1e-4 for a, b in zip(*gradients, strict=True))
    if scan == "kernel" and kernel and not GPU:
        assert fast.choose("kernel", "cpu", 16, 24)[0] == "kernel"      # in the interpreter: it was the kernels that ran
