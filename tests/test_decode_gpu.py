"""fast/decode_gpu.py in Triton's interpreter: a step of the whole model in few launches, and when it is taken."""
import contextlib
import gc
import weakref

import pytest
import torch

from experiments.estimate import Launches
from fast import graph
from fmem import FMem, FMemConfig
from tests.helpers import DEVICE, error, needs_triton, tiny_model


def model_of(**changes):
    """A model all of whose weights are drawn, and three texts."""
    torch.manual_seed(0)
    model = FMem(FMemConfig(**{**dict(vocab_size=50, n_layer=2, d_model=24, n_rows=8, k_rows=3), **changes})).to(DEVICE).eval()
    for name, weight in model.named_parameters():
        if "norm" in name or "w_" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return model, torch.randint(50, (3, 20), device=DEVICE)


def steps_of(model, tokens, state, low=None, n=4):
    """Logits of n steps from token 5 on by the fused step, which changes the state."""
    from fast.decode_gpu import fused_step
    made, token = [], tokens[:, 5].clone()

    def forced(logits):                                 # what is chosen stands there already
        made.append(logits.clone())
        return tokens[:, 5 + len(made)]

    narrow = torch.autocast(DEVICE, low) if low else contextlib.nullcontext()
    with torch.no_grad(), narrow:
        step = fused_step(model, token, state, forced, ())
        for _ in range(n):
            step()
    return torch.stack(made)


@needs_triton
@pytest.mark.parametrize("changes", [{}, dict(k_rows=None), dict(n_rows=20, k_rows=7, d_memory=40, tau=0.7), dict(k_rows=1),
                                     dict(n_rows=70, k_rows=None, d_memory=1030, n_layer=1), dict(tie_embeddings=False)])
def test_a_fused_step_is_the_models(changes):
    """Logits and state; the last but one is so large that several programs do the rows of a text."""
    model, tokens = model_of(**changes)
    n = 2 if "d_memory" in changes and changes["d_memory"] > 1000 else 4        # the interpreter is slow
    with torch.no_grad():
        _, state = model(tokens[:, :5])
        got_state = [h.clone() for h in state]
        got, want = steps_of(model, tokens, got_state, n=n), []
        for t in range(5, 5 + n):
            logits, state = model(tokens[:, t], state)
            want.append(logits)
    assert error(got, torch.stack(want)) < 1e-5         # float32, sums in another order, through four steps
    assert all(error(a, b) < 1e-5 for a, b in zip(got_state, state, strict=True))


@needs_triton
def test_a_fused_step_in_bf16():
    """As far from float32 as the model under autocast is, and the same choice of rows: that is made in float32."""
    model, tokens = model_of()
    with torch.no_grad():
        _, start = model(tokens[:, :5])
        exact = steps_of(model, tokens, [h.clone() for h in start])
        got = steps_of(model, tokens, [h.clone() for h in start], torch.bfloat16)
        state, want = [h.clone() for h in start], []
        with torch.autocast(DEVICE, torch.bfloat16):
            for t in range(5, 9):
                logits, state = model(tokens[:, t], state)
                want.append(logits)
    assert got.dtype == torch.bfloat16
    # bf16 has 8 bits; what counts is that the two lose about the same
    assert error(got, exact) < 0.05 and error(got, exact) < 2 * error(torch.stack(want), exact) + 0.01


@needs_triton
def test_of_equal_affinities_the_first_are_taken():
    model, tokens = model_of(n_layer=1)
    model.blocks[0].memory.W_alpha.weight.data.zero_()
    with torch.no_grad():
        state = [torch.randn(3, 8, 24, device=DEVICE)]
        before = state[0].clone()
        steps_of(model, tokens, state)
    changed = (state[0] != before).any(-1)
    assert torch.equal(changed, torch.tensor([True] * 3 + [False] * 5, device=DEVICE).expand(3, -1))


@needs_triton
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_a_layer_is_nine_launches(low, monkeypatch):
    """Counted without running the kernels: what a second layer adds."""
    from fast import decode_gpu
    launched = []

    class Stub:
        def __getitem__(self, grid):
            return lambda *a, **k: launched.append(grid)

    for name in ("add_norm_kernel", "silu_mul_kernel", "route_step_kernel"):
        monkeypatch.setattr(decode_gpu, name, Stub())
    counts = []
    for n_layer in (1, 2):
        model, tokens = model_of(n_layer=n_layer, n_rows=64, k_rows=16, d_model=96)
        launched.clear()
        with torch.no_grad(), torch.autocast(DEVICE, low, enabled=low is not None), Launches() as count:
            state = [torch.zeros(3, 64, 96, device=DEVICE) for _ in range(n_layer)]
            step = decode_gpu.fused_step(model, tokens[:, 0].clone(), state, lambda logits, chosen=tokens[:, 0]: chosen, ())
            count.n = 0
            step()
        counts.append(count.n + len(launched))
    assert counts[1] - counts[0] == 9


def test_other_models_have_no_fused_step():
    tokens = torch.zeros(2, dtype=torch.long)
    for changes in (dict(gate=True), dict(mixer="attention"), dict(scan="loop"), dict(scan="fast"), dict(n_rows=520, k_rows=2)):
        model = tiny_model(**changes).eval()
        assert graph.fused(model, tokens, [], None, ()) is None
    assert graph.fused(tiny_model().double().eval(), tokens, [], None, ()) is None
    assert graph.fused(tiny_model().train(), tokens, [], None, ()) is None


@needs_triton
@pytest.mark.parametrize("fault", ["none", "fused is wrong", "fused fails", "both are wrong"])
def test_which_step_is_recorded(fault, monkeypatch, capfd):
    """With graphs that are the step itself: the fused one if its logits are right, else the plain one, else none."""
    from fast import decode_gpu
    model, tokens = model_of()
    recorded = []

    def record(step, token, generators):
        recorded.append("plain" if step.__name__ == "plain" else "fused")
        if fault == "fused fails" and recorded == ["fused"]:
            raise ValueError("out of resources")

        def replay():
            logits = step()
            if fault == "both are wrong":
                token.add_(1).remainder_(50)
                logits = logits + 1
            return logits

        return replay

    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(graph, "WANTED", True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    if fault == "fused is wrong":
        right = decode_gpu.Layer.step
        monkeypatch.setattr(decode_gpu.Layer, "step", lambda self, xbar, routing: -right(self, xbar, routing))
    with torch.no_grad():
        _, state = model(tokens[:, :5])
        want_state, want, token = [h.clone() for h in state], [], tokens[:, 5].clone()
        step = graph.record_step(model, token, state, lambda logits, _: logits.argmax(-1), (None,))
        for _ in range(3):
            logits, want_state = model(token, want_state)
            token = logits.argmax(-1)
            want.append(token)
        if fault == "both are wrong":
            assert step is None
        else:
            assert torch.equal(torch.stack([step() for _ in range(3)]), torch.stack(want))
    assert recorded == (["fused"] if fault == "none" else ["fused", "plain"])
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == {"none": 0, "fused is wrong": 1, "fused fails": 1, "both are wrong": 2}[fault]
    assert all(line.startswith("fmem: no fused step: ") for line in lines[:1])


@needs_triton
def test_the_joined_weights_live_as_long_as_the_graph(monkeypatch):
    """A graph keeps no tensor alive: it would read memory that others have by then."""
    from fast import decode_gpu
    model, tokens = model_of()
    layers, init = [], decode_gpu.Layer.__init__
    monkeypatch.setattr(decode_gpu.Layer, "__init__", lambda self, *a: init(self, *a) or layers.append(weakref.ref(self)))
    monkeypatch.setattr(graph, "record", lambda step, token, generators: lambda: torch.zeros(3, 50))
    monkeypatch.setattr(graph, "WANTED", False)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    with torch.no_grad():
        step = graph.record_step(model, tokens[:, 5], model(tokens[:, :5])[1], lambda logits, _: logits.argmax(-1), (None,))
    gc.collect()
    assert len(layers) == 2 and all(layer() is not None for layer in layers)
    del step
    gc.collect()
    assert all(layer() is None for layer in layers)
