"""lab/: each layer against its equations, the recall tasks, training with them, evaluation."""

import contextlib
import json
import math
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

import fmem
from fmem import FMem, FMemConfig, copy_state, scan_loop
from lab import evaluate, tasks
from lab import train as lab_train
from lab.layers import Attention, ExtendedMemory, Mamba2
from lab.tasks import TASKS, score

CPU = torch.device("cpu")

EXTENSIONS = {
    "conv, gate": (ExtendedMemory, {"conv": 3, "gate": True}),
    "shared row": (ExtendedMemory, {"shared_row": True}),
    "all": (ExtendedMemory, {"conv": 3, "gate": True, "shared_row": True, "shift": True}),
}
LAYERS = {
    "attention": (Attention, {"n_head": 2, "conv": 4}),
    "attention, gate": (Attention, {"positions": 100, "gate": True}),
    "mamba2": (Mamba2, {"n_head": 2, "d_state": 5}),
    **EXTENSIONS,
}

# Relative errors in float64. Rounding is 1e-16 per operation, and some thousands of operations are
# chained. Where theta is near 1, the chunks of the memory are exact to TINY = 1e-8 of fmem.py. A
# gradient that is a small difference of large numbers is a few times worse.
TOLERANCE = {Attention: 1e-10, Mamba2: 1e-10, ExtendedMemory: 1e-6}


def tiny(**changes):
    fields = {"vocab_size": 50, "n_layer": 2, "d_model": 16, "d_memory": 24, "n_rows": 8}
    return FMemConfig(**{**fields, "k_rows": 3, "tau": 0.5, **changes})


def layer64(name):
    """A layer in float64 with random weights, including those that start as constants."""
    layer_class, arguments = LAYERS[name]
    layer = layer_class(tiny(), **arguments).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5 if weight.dim() > 1 else 1.0)
    return layer


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


def conv_reference(conv, x):
    """u_t = silu(bias + sum_j weight[:, j] x_{t-j}) for one sequence [T, c]."""
    T, channels = x.shape
    u = conv.bias.expand(T, channels)
    for j in range(conv.weight.shape[1]):
        u = u + conv.weight[:, j] * torch.cat([x.new_zeros(j, channels), x])[:T]
    return u * torch.sigmoid(u)


def affinity_reference(logits, tau, k):
    alpha = torch.softmax(logits / tau, -1)
    gamma = alpha >= alpha.sort(descending=True).values[:, k - 1 : k]
    return gamma * alpha / (gamma * alpha).sum(-1, keepdim=True)


def gate_reference(layer, x, y):
    if layer.W_g is None:
        return y
    g = x @ layer.W_g.weight.T
    y = y * g * torch.sigmoid(g)
    return y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-5) * layer.gate_norm.weight


def extended_reference(layer, x):
    """The equations for one sequence [T, d_model], then the recurrence as a loop."""
    config = layer.config
    k = min(config.k_rows, len(layer.W_alpha.weight))
    u = x
    before = torch.zeros_like(x[:1])  # u before the first token
    if layer.conv is not None:
        u = conv_reference(layer.conv, x)
        before = layer.conv.bias[None] * torch.sigmoid(layer.conv.bias)
    logits = u @ layer.W_alpha.weight.T
    to_write = logits
    if layer.shift is not None:
        previous = torch.cat([before, u[:-1]]) @ layer.W_alpha.weight.T
        share = torch.sigmoid(layer.shift)
        to_write = (1 - share) * logits + share * previous
    eta = torch.sigmoid(u @ layer.w_eta.weight.T)
    mu = torch.sigmoid(u @ layer.w_mu.weight.T)
    theta = eta * affinity_reference(to_write, config.tau, k)
    phi = mu * affinity_reference(logits, config.tau, k)
    if layer.W_shared is not None:
        rates = torch.sigmoid(u @ layer.W_shared.weight.T)
        theta = torch.cat([theta, rates[:, :1]], -1)
        phi = torch.cat([phi, rates[:, 1:]], -1)
    xbar = u @ layer.W_i.weight.T
    y = scan_loop(theta[None], phi[None], xbar[None])[0][0]
    return gate_reference(layer, x, y) @ layer.W_o.weight.T


@pytest.mark.parametrize("arguments", [{}, {"conv": 4}, {"positions": 37, "gate": True}])
def test_attention_matches_transformers(arguments):
    """LLaMA's, with the same weights. transformers rotates in float32."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    ours = Attention(tiny(d_model=48), n_head=6, **arguments).double()
    ours.init_weights(lambda w, scale=1.0: torch.nn.init.normal_(w, std=0.3), 1.0)
    config = llama.LlamaConfig(hidden_size=48, num_attention_heads=6)
    config._attn_implementation = "sdpa"
    theirs = llama.LlamaAttention(config, 0).double()
    for name in "qkv":
        getattr(theirs, f"{name}_proj").weight = getattr(ours, f"W_{name}").weight
    theirs.o_proj = torch.nn.Identity()
    x = torch.randn(2, 37, 48, dtype=torch.float64)
    u = x
    positions = torch.arange(37)[None]
    if ours.conv:
        u = torch.stack([conv_reference(ours.conv, sequence) for sequence in x])
    if ours.positions is not None:
        u = x + ours.positions
        positions = 0 * positions  # nothing is rotated
    rotations = llama.LlamaRotaryEmbedding(config)(u, positions)
    heads, _ = theirs(u, position_embeddings=rotations, attention_mask=None)
    want = gate_reference(ours, x, heads) @ ours.W_o.weight.T
    assert error(ours(x)[0], want) < 2e-6


def test_mamba2_matches_transformers():
    """With the same weights. transformers computes in float32."""
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    ours = Mamba2(tiny(d_model=32), n_head=4, d_state=16).double()
    ours.init_weights(lambda w, scale=1.0: torch.nn.init.normal_(w, std=w.shape[1] ** -0.5), 1.0)
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 1}
    config = mamba2.Mamba2Config(**sizes)
    theirs = mamba2.Mamba2Mixer(config, 0).double()
    weights = ours.state_dict()
    weights["dt_bias"] = weights.pop("delta_bias")
    weights["in_proj.weight"] = weights.pop("W_in.weight")
    weights["out_proj.weight"] = weights.pop("W_o.weight")
    weights["conv1d.bias"] = weights.pop("conv.bias")
    # PyTorch's convolution multiplies the oldest token by its first weight, ours by its last.
    weights["conv1d.weight"] = weights.pop("conv.weight").flip(1)[:, None]
    theirs.load_state_dict(weights)
    x = torch.randn(2, 37, 32, dtype=torch.float64)
    assert error(ours(x)[0], theirs(x)) < 2e-6


@pytest.mark.parametrize("name", LAYERS)
def test_layer_matches_its_equations_and_can_be_split_anywhere(name):
    """One pass over several chunks = our equations = pieces = steps, gradients included."""
    layer = layer64(name)
    tolerance = TOLERANCE[type(layer)]
    x = torch.randn(2, 100, 16, dtype=torch.float64, requires_grad=True)
    whole, last = layer(x)
    parts = []
    state = None
    for start, stop in [(0, 1), (1, 70), (70, 90)]:
        y, state = layer(x[:, start:stop], state)
        parts.append(y)
    for t in range(90, 100):
        y, state = layer.step(x[:, t], state)
        parts.append(y[:, None])
    torch.testing.assert_close(state, last, rtol=tolerance, atol=tolerance)
    forms = [whole, torch.cat(parts, 1)]
    if name in EXTENSIONS:
        forms.append(torch.stack([extended_reference(layer, sequence) for sequence in x]))
    leaves = [x, *layer.parameters()]
    want, *others = ([y, *torch.autograd.grad(y.square().sum(), leaves)] for y in forms)
    for got in others:
        for a, b in zip(got, want, strict=True):
            assert error(a, b) < tolerance


@torch.no_grad()
def test_only_steps_without_gradients_modify_the_state():
    """Steps reserve space in attention's cache. A step fills it; a forward pass does not."""
    layer = layer64("attention")
    x = torch.randn(2, 25, 16, dtype=torch.float64)
    state = None
    for t in range(20):
        _, state = layer.step(x[:, t], state)
    before = copy_state(state)
    y, _ = layer.step(x[:, 20], copy_state(state))
    assert error(y, layer(x)[0][:, 20]) < TOLERANCE[Attention]
    layer(x[:, 20:], state)
    torch.testing.assert_close(state, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_bf16_autocast_stays_near_float32(name):
    """bf16 has 8 bits: an error of 1/100 after a layer's roundings. The state continues too."""
    layer = layer64(name).float()
    x = torch.randn(2, 40, 16)
    want, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x[:, :30])
        z, _ = layer(x[:, 30:], state)
    assert error(torch.cat([y, z], 1).float(), want) < 0.05


def make_task(name, context, seed=3):
    return TASKS[name](SimpleNamespace(context=context, seed=seed))


@pytest.mark.parametrize("name", TASKS)
def test_window_depends_only_on_seed_and_number(name):
    """No two windows are the same, including those for validation."""
    windows = [make_task(name, 40, seed).windows(5, 6) for seed in (3, 4, 0)]
    windows.append(make_task(name, 40).windows(5, 6, held_out=True))
    assert torch.cat(windows).unique(dim=0).shape == (24, 41)
    assert torch.equal(windows[0][2:4], make_task(name, 40).windows(7, 2))


def test_associative_recall_queries_any_key_at_any_time():
    task = make_task("mqar", 64)
    windows = task.windows(0, 200)
    sizes = set()
    for window, targets in zip(windows.tolist(), task.targets(windows).tolist(), strict=True):
        ask = window.index(tasks.QUERY)
        pairs = dict(zip(window[:ask:2], window[1:ask:2], strict=True))
        sizes.add(len(pairs))
        assert ask == 2 * len(pairs)  # no key has two values
        queried = window[ask + 1 : -1 : 2]
        answers = [target for target in targets if target >= 0]
        assert answers == [pairs[key] for key in queried] == targets[ask + 1 :: 2]
    assert sizes == {4, 8, 16}


def test_passkey_is_anywhere_before_the_question():
    task = make_task("passkey", 40)
    windows = task.windows(0, 300)
    positions = set()
    for window, targets in zip(windows.tolist(), task.targets(windows).tolist(), strict=True):
        marker = window.index(tasks.MARKER)
        positions.add(marker)
        answers = [target for target in targets if target >= 0]
        assert window[marker + 1 : marker + 5] == window[-4:] == answers == targets[-4:]
        assert window[-5] == tasks.QUERY and all(64 <= token < 74 for token in answers)
    assert positions == set(range(32))
    assert (task.windows(0, 5, hard=31)[:, 0] == tasks.MARKER).all()


def oracle(tokens, state=None):
    """A model that sees the next token; there is none after the last."""
    return F.one_hot(tokens.roll(-1, 1), tasks.VOCAB_SIZE).float(), None


def test_validation_counts_every_answer_once():
    """Two processes validate ten windows, three at a time: the sums are those of the ten."""
    task = make_task("mqar", 16)
    windows = task.windows(0, 10, held_out=True)
    targets = task.targets(windows)
    nats, right = score(oracle, windows[:, :-1], targets, CPU)
    keep = Mock(side_effect=lambda *numbers: numbers)
    for rank in (0, 1):
        processes = SimpleNamespace(rank=rank, world=2, device=CPU, sum=keep)
        task.validate(oracle, 160, 3, processes, contextlib.nullcontext)
    want = [nats.sum().item(), right.sum().item(), (targets >= 0).sum().item()]
    sums = [call.args for call in keep.call_args_list]
    assert [sum(both) for both in zip(*sums, strict=True)] == pytest.approx(want)


def test_recall_by_pairs_and_by_distance():
    results = list(evaluate.recall_by_pairs(oracle, 64, CPU, count=5))
    assert [r["pairs"] for r in results] == [4, 8, 16]
    results += evaluate.recall_by_distance(oracle, 16, 8, CPU)
    assert [(r["length"], r["distance"]) for r in results[3:]] == [(16, 7), (64, 55)]
    assert results[3]["answers"] == 4 * 256
    # The last answer of a window is its last token.
    right = [27 / 28, 23 / 24, 15 / 16, 3 / 4, 3 / 4]
    assert [r["right"] for r in results] == pytest.approx(right)


def test_loss_beyond_the_training_length(monkeypatch):
    """For a model whose loss falls after 32 tokens of a window. It reads windows in pieces."""
    monkeypatch.setattr(tasks, "TOKENS_AT_ONCE", 7)

    def model(tokens, state=None):
        position = (state or 0) + torch.arange(1, tokens.shape[1] + 1)
        first = torch.where(position > 32, 2.0, 0.0).expand(tokens.shape)
        return torch.stack([first, torch.zeros_like(first)], -1), position[-1].item()

    tokens = torch.zeros(8 * 32 + 5, dtype=torch.long)
    near = math.log(2)
    far = math.log(1 + math.exp(-2))
    for i, got in enumerate(evaluate.loss_beyond(model, tokens, 32, 8, CPU)):
        want = {"result": "long", "length": 32 * 2**i, "tokens": 256}
        want |= {"mean": far + (near - far) / 2**i, "at_end": far if i else near}
        assert got == pytest.approx(want, abs=1e-6)
    assert i == 3


def test_describe_rows():
    """For known weights: four rows, each used by every fourth token, at a rate of 1/2."""
    alpha = F.one_hot(torch.arange(960) % 4, 8).double()
    got = evaluate.describe_rows(0.5 * alpha)
    shortest, *_, longest = got.pop("half_life")
    assert shortest == pytest.approx(4) and longest > 1e9  # for a row that is never written
    assert got == pytest.approx({"rows": 8, "rows_per_token": 1, "rows_used": 4})


def test_routing_excludes_the_shared_row():
    model = FMem(tiny(), ExtendedMemory, {"shared_row": True, "shift": True}).eval()
    results = list(evaluate.routing(model, torch.randint(50, (100,)), 24, CPU))
    assert [(r["layer"], r["rows"]) for r in results] == [(0, 7), (1, 7)]


@pytest.fixture(scope="module")
def recall_run(tmp_path_factory):
    """The folder of a run of attention on associative recall."""
    folder = tmp_path_factory.mktemp("recall") / "out"
    size = "--n_layer 1 --d_model 16 --n_rows 8 --k_rows 2 --batch_size 4 --context 16"
    steps = "--max_steps 6 --eval_every 3 --keep_every 3 --log_every 1 --device cpu"
    command = f"--layer attention --conv 2 --n_head 2 --data mqar {size} {steps} --out"
    lab_train.main([*command.split(), str(folder)])
    return folder


def test_run_on_recall(recall_run):
    model, saved = fmem.load(recall_run / "best.pt")
    assert (saved["layer"], saved["corpus"], saved["tokenizer"]) == ("Attention", "mqar", None)
    assert 4.3 < saved["val_loss"] < 5.5  # ln 130 = 4.87 before it learns
    paper = FMem(FMemConfig(130, 1, 16, n_rows=8, k_rows=2))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (model, paper)]
    assert abs(sizes[0] - sizes[1]) <= 3 * 16 * 8 / 2  # d_mlp is a multiple of 8


@pytest.mark.parametrize("options", ["", "--data mqar --layer attention --conv 2 --n_head 2"])
def test_resume_is_exact(recall_run, options, tmp_path):
    """The rest matches the uninterrupted run, whether or not the layer's options are repeated."""
    shutil.copy(recall_run / "step-3.pt", tmp_path / "last.pt")
    lab_train.main([*options.split(), "--resume", "--device", "cpu", "--out", str(tmp_path)])
    whole = fmem.load(recall_run / "last.pt")[0].state_dict()
    resumed = fmem.load(tmp_path / "last.pt")[0].state_dict()
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_evaluation_of_a_text(run, capsys):
    """The loss matches that of training; both are sums of float32 losses."""
    model, saved = fmem.load(run / "last.pt")
    tokens = torch.from_numpy(evaluate.prepare.load(saved["settings"]["data"])[1].astype("int64"))
    loss = evaluate.text_losses(model, tokens, saved["settings"]["context"], CPU).mean().item()
    assert loss == pytest.approx(float((run / "log.csv").read_text().split(",")[-4]), rel=2e-6)
    options = "--long --routing --times 4 --tokens 300 --device cpu"
    evaluate.main([str(run / "last.pt"), *options.split()])
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {r["result"] for r in results} == {"long", "routing"}
    lengths = [(r["length"], r["tokens"]) for r in results if r["result"] == "long"]
    assert lengths == [(24, 288), (48, 288), (96, 288)]  # three windows of 96


def test_commands_report_invalid_options(run, recall_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for main, arguments, message in [
        (evaluate.main, [str(run / "last.pt"), "--recall"], "--recall is for models of mqar"),
        (evaluate.main, [str(recall_run / "last.pt"), "--long"], "use --recall"),
        (lab_train.main, ["--layer", "mamba2", "--gate"], "--gate is not an option"),
    ]:
        with pytest.raises(SystemExit, match=message):
            main([*arguments, "--device", "cpu"])
