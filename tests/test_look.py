"""inside/ and look.py: the exact maps of what is read, and the page that shows them."""
import pytest
import torch
import torch.nn.functional as F

from fmem import scan_loop
from inside.record import record, weights_of
from tests.helpers import TINY, error, tiny_config, tiny_model
from tests.test_variants import ABLATIONS, MIXERS, mixer64

# The sums of A are those of the layer in another order: float64 rounding, a few hundred operations.
EXACT = 1e-12
LAYERS = {"paper": {}, "dense": dict(k_rows=None), **MIXERS, **{name: dict(ablation=name) for name in ABLATIONS},
          "all": dict(conv=4, gate=True, ablation="untied")}


def what_is_read(layer, x, state):
    """The read as the layer computes it, before gate, norm and W_o, as [H, T, d]; for Mamba-2 times the gate."""
    kept, kind = [], type(layer).__name__
    if kind == "Mamba2":                                # its norm comes after the gate
        hook = layer.norm.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        layer(x, state)
    elif kind == "Attention":
        hook = layer.W_o.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        layer(x, state)
    else:
        class_read = layer.read
        layer.read = lambda *given: kept.append(class_read(*given)[0]) or (kept[0], None)
        layer(x, state)
        del layer.read
        return kept[0]
    hook.remove()
    return kept[0].unflatten(-1, (layer.D.numel() if kind == "Mamba2" else layer.n_head, -1))[0].transpose(0, 1)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("before", [0, 9])
@torch.no_grad()
def test_the_map_is_what_the_layer_reads(name, before):
    """A times the inputs, and the part of the state before them, is the layer's read: every kind of layer, with a past or not."""
    layer = mixer64(**LAYERS[name]).eval()
    x = torch.randn(1, before + 23, 16, dtype=torch.float64)
    state = layer(x[:, :before])[1] if before else None
    x = x[:, before:]
    seen = weights_of(layer, x, state)
    want, got = what_is_read(layer, x, state), seen.read()
    if seen.kind == "mamba2":
        got = got * F.silu(layer.W_in(x)[0, :, :layer.split[0]]).unflatten(-1, (layer.H, -1)).transpose(0, 1)
    assert error(got, want) < EXACT
    assert not seen.A.triu(1).any()
    assert error(seen.read()[..., -1:], (seen.A @ seen.values)[..., -1:]) > 1e-4 or not before     # the past counts
    if seen.kind != "mamba2":
        assert (seen.A >= 0).all() and (seen.start >= 0).all()
    shares, start = seen.shares()
    assert error(shares.abs().sum(1) + start, torch.ones_like(start)) < EXACT


@torch.no_grad()
def test_what_the_rows_hold():
    """E and F give each row, their weights add up to 1, and a row that is not chosen keeps what it held."""
    layer = mixer64(k_rows=3).eval()
    x = torch.randn(1, 31, 16, dtype=torch.float64)
    h0 = torch.randn(1, 8, 24, dtype=torch.float64)
    seen = weights_of(layer, x, h0)
    for t in (0, 1, 17, 30):
        _, h = scan_loop(seen.theta[None, :t + 1], seen.phi[None, :t + 1], seen.values[:, :t + 1], h0)
        E, kept = seen.contents(t)
        assert error(E.T @ seen.values[0, :t + 1] + kept[:, None] * h0[0], h[0]) < EXACT
        assert error(E.sum(0) + kept, torch.ones(8)) < EXACT
        assert error(seen.rms[t + 1], h[0].square().mean(-1).sqrt()) < EXACT
        assert error(E @ seen.q[t], seen.A[0, t, :t + 1]) < EXACT
    assert ((seen.theta > 0).sum(1) == 3).all()
    assert torch.equal(seen.rms[1:][seen.theta == 0], seen.rms[:-1][seen.theta == 0])
    # a row that takes 1/4 at every token holds half of what it held after ln 2 / -ln(3/4) = 2.41 tokens
    seen.theta = torch.tensor([[0.25, 0.0, 1.0]], dtype=torch.float64).expand(9, 3)
    assert seen.half_life()[0].item() == pytest.approx(2.409, abs=1e-3)
    assert seen.half_life()[1].isinf() and seen.half_life()[2] < 0.05


@pytest.mark.parametrize("name", ["paper", "both", "attention", "mamba2"])
def test_recording_changes_nothing(name):
    model = tiny_model(**LAYERS[name]).eval()
    tokens = torch.randint(50, (1, 40))
    with torch.no_grad():
        want, _ = model(tokens)
        _, state = model(tokens[:, :15])
    layers, logits = record(model, tokens[0, 15:], state)
    assert error(logits, want[0, 15:]) < 1e-5 and len(layers) == TINY["n_layer"]
    assert not any(block.memory._forward_hooks for block in model.blocks)
    whole, _ = record(model, tokens[0])
    # with the whole text the weight of its first 15 tokens is what the state has when the text is split there
    for a, b in zip(whole, layers, strict=True):
        assert error(b.A, a.A[:, 15:, 15:]) < 1e-5
        if a.kind != "mamba2":                          # whose `start` is a decay, not a weight
            assert error(b.start, a.A[:, 15:, :15].sum(-1).mean(0) + a.start[15:]) < 1e-5


def test_a_layer_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="Linear"):
        weights_of(torch.nn.Linear(2, 2), torch.zeros(1, 3, 2))
    assert tiny_config().mixer == "memory"
