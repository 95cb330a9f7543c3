"""kernel.py in Triton's interpreter (on a GPU: compiled) against the loop in float64."""

import ast
import itertools

import pytest
import torch

import train as train_py
from fmem import FMem, scan, scan_loop
from tests.helpers import (
    DEVICE,
    GPU,
    KERNEL_ERROR,
    ROOT,
    by_steps,
    error,
    kernel,
    kernel_errors,
    log_rows,
    needs_triton,
    scan_inputs,
    settings,
    step_tiles,
    step_triton,
    tiny,
    with_gradients,
)
from training import tasks


@needs_triton
@pytest.mark.parametrize("T, m, d, sharp, sparse, h0, dtype", [
    (1, 6, 10, 3.0, None, True, torch.float32), (1, 2, 1, 3.0, None, False, torch.bfloat16),
    (5, 17, 33, 0.0, None, True, torch.float32), (5, 3, 70, 30.0, 1, False, torch.float16),
    (63, 6, 10, 3.0, 2, True, torch.float32), (64, 6, 10, 30.0, None, True, torch.float32),
    (65, 17, 33, 3.0, None, True, torch.float32), (70, 6, 10, 3.0, None, True, torch.float32),
    (40, 70, 40, 3.0, 9, True, torch.float32), (63, 5, 65, 3.0, None, True, torch.bfloat16),
    (64, 20, 10, 3.0, 4, True, torch.float16), (65, 6, 10, 0.0, None, False, torch.bfloat16),
    (130, 6, 10, 30.0, None, True, torch.bfloat16), (33, 130, 20, 3.0, 8, True, torch.bfloat16),
    (163, 17, 33, 3.0, 4, True, torch.float32)])
def test_kernels_are_the_loop(poisoned, T, m, d, sharp, sparse, h0, dtype):
    """Every kernel, with theta of exactly 0 and 1, a state in, and gradients into hT and out of h0."""
    errors = kernel_errors(scan_inputs(T=T, m=m, d=d, sharp=sharp, sparse=sparse, h0=h0), dtype)
    assert all(e < KERNEL_ERROR[dtype] for e in errors), errors


@needs_triton
def test_gradients_reach_over_many_chunks(poisoned):
    """What is left over of a chunk's gradient decays over more chunks than are taken at a time."""
    theta, phi, x, h0 = scan_inputs(B=1, T=600, m=3, d=5, sharp=0.0, ends=False)
    errors = kernel_errors([theta / 50, phi, x, h0], torch.float32)
    assert all(e < KERNEL_ERROR[torch.float32] for e in errors), errors


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
    strided = [v.mT.contiguous().mT for v in inputs]
    for recompute in (False, True):
        for given in (inputs, strided):
            torch.library.opcheck(kernel.scan, (*given, 1e-5, recompute), test_utils=("test_schema", "test_faketensor"))


@needs_triton
def test_kernels_have_no_second_gradient():
    """It would be wrong, so it is an error."""
    leaves = [v.float().to(DEVICE).requires_grad_() for v in scan_inputs(T=9)]
    y, _ = kernel.scan_triton(*leaves)
    first, = torch.autograd.grad(y.square().sum(), leaves[2], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@needs_triton
def test_kernels_say_why_they_do_not_run(fresh_choice, capfd):
    inputs = [v.to(DEVICE) for v in scan_inputs(T=5)]
    for _ in range(2):
        got = scan(*inputs, form="kernel")                          # float64: the caller takes another form
    assert all(torch.equal(g, w) for g, w in zip(got, scan(*inputs, form="fast"), strict=True))
    line = capfd.readouterr().err
    assert line.count("\n") == 1 and "float32, bf16 and fp16, not torch.float64" in line
    with pytest.raises(ValueError, match="cannot run: they are built for float32"):
        kernel.scan_triton(*inputs)
    assert "m up to 512" in kernel.why_not(torch.device(DEVICE), 513, 8, torch.float32)
    assert "d up to 4096" in kernel.why_not(torch.device(DEVICE), 8, 4097, torch.float32)
    theta, phi, x, h0 = (v.float() for v in inputs)
    for wrong in ((theta, phi, x, h0[:, 1:]), (theta, phi[:, 1:], x, h0), (theta[:, 1:], phi[:, 1:], x, h0)):
        with pytest.raises(ValueError, match="do not fit each other"):
            kernel.scan_triton(*wrong)


@needs_triton
@pytest.mark.parametrize("m, d, k", [(20, 70, None), (20, 70, 1), (20, 70, 5), (40, 1000, None), (45, 600, 42)])
def test_step_kernel_touches_only_its_rows(m, d, k, poisoned):
    """Also where several programs do the rows of a text, the last two."""
    t = step_tiles(3, k or m, d)
    assert (t["PART"] < (k or m)) == (m > 20)
    g = torch.Generator().manual_seed(0)
    h, x = torch.randn(3, m, d, generator=g), torch.randn(3, d, generator=g)
    theta, phi = torch.rand(2, 3, k or m, generator=g)
    theta[0, 0], theta[1, 0] = 0.0, 1.0
    rows = k and torch.stack([torch.randperm(m, generator=g)[:k] for _ in range(3)])
    full = [v if k is None else torch.zeros(3, m).scatter(1, rows, v) for v in (theta, phi)]
    want_y, want_h = scan_loop(*(v[:, None].double() for v in full), x[:, None].double(), h.double())
    now, rows = h.clone().to(DEVICE), rows if k is None else rows.to(DEVICE)
    y = step_triton(now, x.to(DEVICE), theta.to(DEVICE), phi.to(DEVICE), rows).cpu()
    assert error(y, want_y[:, 0]) < 1e-6 and error(now.cpu(), want_h) < 1e-6        # a few roundings of 2^-24
    if k:
        others = torch.ones(3, m, dtype=torch.bool).scatter(1, rows.cpu(), False)
        assert torch.equal(now.cpu()[others], h[others])
    with pytest.raises(ValueError, match="float32 and contiguous"):
        step_triton(now.mT.contiguous().mT, x.to(DEVICE), theta.to(DEVICE), phi.to(DEVICE), rows)


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


@needs_triton
def test_training_agrees_with_and_without_the_kernels(corpus, tmp_path, fresh_choice, monkeypatch):
    """100 steps on a GPU; in the interpreter 2, with their evaluations and the sample at the end."""
    losses, steps = [], 100 if GPU else 2
    if not GPU:                                         # the interpreter is slow: less text to evaluate at the end
        validate = tasks.Text.validate
        monkeypatch.setattr(tasks.Text, "validate", lambda self, model, device, amp, limit, batch: validate(
            self, model, device, amp, limit or 200, batch))
    for form in ("kernel", "fast"):
        train_py.train(settings(corpus, tmp_path / form, scan=form, device=DEVICE, dtype="float32", max_steps=steps,
                                eval_every=steps))
        losses.append([loss for _, loss in log_rows(tmp_path / form, "train_loss")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if GPU else 1e-5)     # rounding grows with the steps


@needs_triton
def test_rows_of_a_step_are_divided_where_few_texts_have_many():
    for B, k, d, programs in ((1, 16, 384, 1), (1, 64, 1024, 8), (1, 256, 1024, 32), (1, 512, 4096, 128), (64, 64, 1024, 2),
                              (256, 64, 1024, 1), (8, 512, 4096, 16)):
        t = step_tiles(B, k, d)
        assert t["PART"] % t["BK"] == 0 and -(-k // t["PART"]) == programs


@needs_triton
@pytest.mark.parametrize("k, d", [(1, 16), (1, 128), (2, 70), (16, 384), (64, 4096), (512, 1024)])
def test_no_two_warps_of_the_step_hold_the_same_numbers(k, d):
    """The step loads and stores the same addresses; a number held twice could be loaded after it was stored."""
    t = step_tiles(1, k, d)
    assert t["num_warps"] == 1 or t["BK"] * t["BD"] >= 32 * t["num_warps"] * 32


# which arguments of a call are loaded, and which are stored; `across` begins with a barrier
LOADS = {"tl.load": [0], "tile": [0], "tile_T": [0], "before": [0, 1, 2, 3], "across": [2, 3, 4]}
STORES = {"tl.store": [0], "put": [0], "across": [0, 1]}


def pointers(kernel_source, calls):
    """{argument of a kernel: the lines in which one of these calls takes it as a pointer}"""
    names = {argument.arg for argument in kernel_source.args.args} - {"row0", "bc", "b", "m", "d", "k", "n", "T", "N", "C"}
    aliases, found = {}, {}
    for node in ast.walk(kernel_source):                # p, mask = h + ..., ... makes p stand for h
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple):
            aliases |= {ast.unparse(t): v for t, v in zip(node.targets[0].elts, node.value.elts, strict=True)}
    for node in ast.walk(kernel_source):
        for n in calls.get(ast.unparse(node.func), ()) if isinstance(node, ast.Call) else ():
            pointer = aliases.get(ast.unparse(node.args[n]), node.args[n])
            for part in ast.walk(pointer):
                if isinstance(part, ast.Name) and part.id in names:
                    found.setdefault(part.id, []).append(node.lineno)
    return found


@needs_triton
def test_no_kernel_loads_what_it_stores():
    """A late thread would load what an early one has stored. By the names of the pointers in the source of each kernel; what is
    loaded all the same is behind a barrier."""
    files = [(ROOT / name).read_text(encoding="utf-8") for name in ("kernel.py", "fast/step_gpu.py", "fast/decode_gpu.py")]
    functions = {node.name: node for source in files for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    kernels, both = {name: node for name, node in functions.items() if name.endswith("_kernel")}, {}
    for name, node in kernels.items():
        loads, stores = pointers(node, LOADS), pointers(node, STORES)
        barriers = [call.lineno for call in ast.walk(node) if isinstance(call, ast.Call)
                    and ast.unparse(call.func) in ("tl.debug_barrier", "across")]
        both[name] = loads.keys() & stores.keys() - {"h"}
        for pointer in both[name]:
            # a load that stands before the store is that of the next round
            for store, load in itertools.product(stores[pointer], loads[pointer]):
                assert any(store < line <= (load if load > store else line) for line in barriers), (name, pointer, store, load)
    assert len(both) == 11 and all(pointers(node, STORES) for node in kernels.values())
    assert ast.unparse(functions["across"].body[2]) == "tl.debug_barrier()"
    # the steps work in place, on h, see above
    assert {name: names for name, names in both.items() if names} == {
        "mix_kernel": {"S_n", "Y_n", "qP"}, "mix_back_kernel": {"kappa", "wP"}, "theta_kernel": {"Z"}}
