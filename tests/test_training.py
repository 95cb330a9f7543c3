"""Training: resume, batches, evaluation, optimiser, skipped steps, checkpoints kept."""
import contextlib
import functools
import io
import itertools
import math
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train as train_py
from data import token_files, tokenizer
from fmem import FMem
from tests.helpers import error, log_rows, same, settings, tiny
from training import tasks
from training.batches import Batches, Streams
from training.checkpoint import load_checkpoint, model_from, save_checkpoint
from training.device import Meter, flops_per_token, try_compile
from training.log import draws, sparkline
from training.optimizer import learning_rate, make_optimizer
from training.options import PRESETS, Settings
from training.run import step_seed
from variants.build import ModelConfig, n_parameters


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resume_is_bit_for_bit(number, corpus, run20, tmp_path, monkeypatch):
    """20 steps = 10, a signal, a resume, 10: weights, optimiser, log, dropout included."""
    batch = Batches.__call__

    def interrupting(self, step, *part):
        if step == 9:
            signal.raise_signal(number)
        return batch(self, step, *part)

    given, handler = settings(corpus, tmp_path / "out"), signal.getsignal(number)       # in the background SIGINT is ignored
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__call__", interrupting)
        assert train_py.train(given)["step"] == 10
    assert signal.getsignal(number) == handler
    with open(tmp_path / "out/log.csv", "a") as f:
        f.write("11,1056,0.1,3.0,1e-3,1,9,,,,\n1")                 # a kill: a row after the checkpoint, and half a row
    resumed = train_py.train({"out": given["out"], "resume": True})
    whole = run20[1]
    for part in ("model", "optimizer", "config", "tokenizer", "best", "random"):
        assert same(resumed[part], whole[part]), part
    for column in ("train_loss", "val_loss", "lr", "grad_norm"):
        assert log_rows(given["out"], column) == log_rows(run20[0], column)
    assert same(load_checkpoint(run20[0] / "last.pt")["model"], whole["model"])


def test_best_checkpoint_is_the_best(corpus, tmp_path, monkeypatch):
    losses = iter([4.0, 3.0, 5.0, 3.5, 1.0])                    # after 5, 10, 15, 20 steps; at the end, of all tokens
    monkeypatch.setattr(tasks, "evaluate", lambda *a: (next(losses), 1.0))
    out = tmp_path / "out"
    train_py.train(settings(corpus, out))
    best, last = (load_checkpoint(out / name) for name in ("best.pt", "last.pt"))
    assert (best["step"], best["best"]) == (10, 3.0) and (last["step"], last["best"]) == (20, 3.0)
    assert not same(best["model"], last["model"])
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".png") == ["best.pt", "last.pt", "log.csv"]


def test_a_run_never_overwrites_another(corpus, run20, tmp_path):
    shutil.copytree(run20[0], tmp_path / "out")
    given = settings(corpus, tmp_path / "out", max_steps=1)
    before = (tmp_path / "out/last.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run.*--resume.*--out.*--overwrite"):
        train_py.train(given)
    assert (tmp_path / "out/last.pt").read_bytes() == before
    with pytest.raises(ValueError, match="--d_model is not that of the run"):
        train_py.train({"out": given["out"], "resume": True, "d_model": 32})
    assert train_py.train({**given, "overwrite": True, "eval_every": 9})["step"] == 1
    assert load_checkpoint(tmp_path / "out/best.pt")["step"] == 1      # nothing is left of the run before


def test_a_failed_save_keeps_the_last_checkpoint(run20, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(run20[1], path)
    before = path.read_bytes()

    def full_disk(checkpoint, f):
        f.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(run20[1], path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


def test_resume_takes_new_rates(corpus, run20, tmp_path):
    """Options given again replace the saved ones, those of the optimiser too; what it has learnt stays."""
    shutil.copytree(run20[0], tmp_path / "out")
    resumed = train_py.train({"out": str(tmp_path / "out"), "resume": True, "max_steps": 21, "weight_decay": 0.5, "beta2": 0.5})
    groups = resumed["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0] and all(g["betas"] == (0.9, 0.5) for g in groups)
    assert all(state["step"] == 21 for state in resumed["optimizer"]["state"].values())
    with pytest.raises(ValueError, match="grouped differently"):
        train_py.train({"out": str(tmp_path / "out"), "resume": True, "max_steps": 22, "router_lr": 0.5})


@pytest.mark.parametrize("n, context", [(1000, 24), (25, 24), (49, 24), (30, 1)])
def test_batches_cover_the_text_once_per_epoch(n, context):
    batches = Batches(np.arange(n, dtype=np.uint16), context, 3, seed=1)
    steps = math.ceil(2 * batches.per_epoch / 3)
    windows = torch.cat([batches(step) for step in range(steps)])
    assert (windows == windows[:, :1] + torch.arange(context + 1)).all()        # each a piece of the text
    for epoch in range(2):
        targets = windows[epoch * batches.per_epoch:(epoch + 1) * batches.per_epoch, 1:].flatten().tolist()
        assert len(set(targets)) == len(targets) >= n - 2 * context             # no token twice, few left out
    again = Batches(np.arange(n, dtype=np.uint16), context, 3, seed=1)
    assert torch.equal(again(steps - 1), batches(steps - 1))                    # a step does not depend on those before
    assert torch.equal(torch.cat([again(0, slice(0, 1)), again(0, slice(1, 3))]), batches(0))
    if n > 100:
        assert not torch.equal(Batches(batches.tokens, context, 3, seed=2)(0), batches(0))
        # each epoch has an offset and an order of its own
        first, second = (windows[i * batches.per_epoch:(i + 1) * batches.per_epoch, 0] for i in range(2))
        assert first[0] % context != second[0] % context and not torch.equal(first.argsort(), second.argsort())


def test_batches_need_enough_text():
    with pytest.raises(ValueError, match="--context"):
        Batches(np.arange(24), 24, 1, 0)


def test_evaluate_counts_every_token_once(corpus):
    _, val, fields, _ = token_files.load(corpus)
    enc = tokenizer.load_tokenizer(fields)
    sizes = np.array([len(piece) for piece in tokenizer.token_strings(enc)])
    model = FMem(tiny(vocab_size=enc.n_vocab)).eval()
    val = val[:130]                                             # five windows of 24 and a last one of 9
    loss, bpb = tasks.evaluate(model, val, 24, sizes, torch.device("cpu"), contextlib.nullcontext, batch=2)
    nats = 0.0
    for a in range(0, 129, 24):
        window = torch.from_numpy(val[a:a + 25].astype(np.int64))
        nats += F.cross_entropy(model(window[None, :-1])[0][0], window[1:], reduction="sum").item()
    assert loss == pytest.approx(nats / 129, rel=1e-5)
    text = enc.decode([t for t in val[1:].tolist() if t != enc.eot_token], errors="surrogateescape")
    size = sum(len(enc.decode_single_token_bytes(t)) for t in val[1:].tolist() if t != enc.eot_token)
    assert text and bpb == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert model.training                                       # as the training loop expects it


def test_learning_rate():
    s = Settings(**{**PRESETS["cpu"], "lr": 1.0, "warmup": 9, "min_lr": 0.1})
    assert [learning_rate(s, i, 0) for i in range(11)] == pytest.approx([min(1, (i + 1) / 10) for i in range(11)])
    assert learning_rate(s, 100, 0.5) == pytest.approx(0.55)
    assert learning_rate(s, 100, 1.0) == learning_rate(s, 100, 1.5) == pytest.approx(0.1)


def test_dropout_differs_in_every_step_and_process(corpus, tmp_path, monkeypatch):
    seeds, batch = [], Batches.__call__
    monkeypatch.setattr(Batches, "__call__", lambda self, *a: seeds.append(torch.initial_seed()) or batch(self, *a))
    train_py.train(settings(corpus, tmp_path / "out", max_steps=5))
    assert seeds == [step_seed(1337, step, 0) for step in range(5)]
    drawn = {step_seed(seed, step, rank) for seed in (1, 2) for step in range(10) for rank in range(4)}
    assert len(drawn) == 80


def test_weight_decay_groups():
    model = FMem(tiny())
    s = Settings(**PRESETS["cpu"])
    decayed, free = make_optimizer(model, s, torch.device("cpu")).param_groups
    name = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    names = sorted(name[id(p)].split(".")[-2] for p in free["params"])
    assert names == ["embed", "memory_norm", "memory_norm", "mlp_norm", "mlp_norm", "norm"]
    assert len(decayed["params"]) == 2 * 8 and len(free["params"]) == len(name) - 2 * 8


def test_seconds_finishes_the_schedule(corpus, tmp_path):
    done = train_py.train(settings(corpus, tmp_path / "out", max_steps=10**6, seconds=1.5, eval_every=10**5))
    assert 1.5 <= done["seconds"] < 10 and 5 < done["step"] < 10**5
    rates = [lr for _, lr in log_rows(tmp_path / "out", "lr")]
    assert rates[-1] < 0.1 * max(rates)                         # the cosine has come down to its end of 0.05


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_never_reaches_the_weights(wrong, corpus, tmp_path, monkeypatch, capsys):
    """Steps 4 and from 8 on have a loss that is not a number, or infinite: each is skipped, three in a row end the run."""
    given = settings(corpus, tmp_path / "out", keep_every=1, max_skipped=3, eval_every=100)
    losses, true_loss = itertools.count(1), F.cross_entropy

    def cross_entropy(*args, **options):
        loss = true_loss(*args, **options)
        return loss if options or (i := next(losses)) < 4 or 4 < i < 8 else loss * wrong      # options: an evaluation

    with monkeypatch.context() as patch:
        patch.setattr(train_py.F, "cross_entropy", cross_entropy)
        with pytest.raises(ValueError, match="not finite in 3 steps in a row.*--resume"):
            train_py.train(given)
    kept = [load_checkpoint(tmp_path / f"out/step-{i}.pt") for i in range(10)]
    assert [same(kept[i]["model"], kept[i + 1]["model"]) for i in range(9)] == [False] * 3 + [True] + [False] * 3 + [True] * 2
    last = load_checkpoint(tmp_path / "out/last.pt")
    assert last["step"] == 10 and same(last["model"], kept[7]["model"])
    assert same(last["optimizer"]["state"], kept[7]["optimizer"]["state"])      # moments and step counts
    assert capsys.readouterr().out.count("\nskipped ") == 4 and log_rows(given["out"], "skipped")[-1] == (7, 1)
    resumed = train_py.train({"out": given["out"], "resume": True})          # whatever it was is over
    assert resumed["step"] == 20 and not same(resumed["model"], last["model"])


def test_gradient_accumulation_changes_nothing(corpus, tmp_path):
    runs = [train_py.train(settings(corpus, tmp_path / str(n), micro_batch=n, max_steps=5, dropout=0.0)) for n in (1, 4)]
    for a, b in zip(runs[0]["model"].values(), runs[1]["model"].values(), strict=True):
        assert error(a, b) < 1e-4                               # float32 sums in another order, through AdamW's square root


def test_trains_in_bf16(corpus, run20, tmp_path):
    """Under autocast the weights and the optimiser stay float32, and twenty steps lead where float32 leads."""
    done = train_py.train(settings(corpus, tmp_path / "out", dtype="bf16", max_steps=20))
    assert {v.dtype for v in done["model"].values()} == {torch.float32}
    want = [loss for _, loss in log_rows(run20[0], "train_loss")]
    # 8 bits of mantissa: 0.4 % per product, less in the mean of a batch
    assert [loss for _, loss in log_rows(tmp_path / "out", "train_loss")] == pytest.approx(want, rel=5e-3)


def test_compile_falls_back(corpus, tmp_path, monkeypatch, capsys):
    def broken(model):
        def fail(*a):
            raise RuntimeError("no compiler here")
        return fail
    monkeypatch.setattr(torch, "compile", broken)
    assert train_py.train(settings(corpus, tmp_path / "out", max_steps=2, compile=True))["step"] == 2
    assert "compile   no: RuntimeError: no compiler here" in capsys.readouterr().out


@pytest.mark.parametrize("mixer", [dict(), dict(conv=3, gate=True), dict(mixer="mamba2", d_state=8)])
def test_carry_state_reads_one_long_text(mixer, corpus, tmp_path):
    """With a learning rate of next to nothing the losses are those of the whole streams, read in one go."""
    given = settings(corpus, tmp_path / "out", max_steps=10, eval_every=3, carry_state=True, lr=1e-12, dropout=0.0, micro_batch=2,
                     weight_decay=0.0, **mixer)
    checkpoint = train_py.train(given)
    model, tokens = model_from(checkpoint, "cpu"), token_files.load(corpus)[0]
    batches = Streams(tokens, 24, 4, 1337)
    assert batches.steps > 10 and batches.begins(0) and not batches.begins(10) and batches.begins(batches.steps)
    streams = torch.cat([batches(0)[:, :-1], *(batches(i)[:, :-1] for i in range(1, 10)), batches(9)[:, -1:]], 1)
    with torch.no_grad():
        losses = F.cross_entropy(model(streams[:, :-1])[0].transpose(1, 2), streams[:, 1:], reduction="none")
    want = losses.view(4, 10, 24).mean((0, 2)).tolist()
    got = [loss for _, loss in log_rows(given["out"], "train_loss")]
    assert got == pytest.approx(want, rel=2e-5)                         # log.csv keeps 6 digits
    fresh = F.cross_entropy(model(streams[:, 216:240])[0].transpose(1, 2), streams[:, 217:241]).item()
    assert abs(fresh - want[9]) > 1e-4                                  # and the state does matter
    resumed = load_checkpoint(tmp_path / "out/last.pt")
    given |= {"out": str(tmp_path / "two"), "max_steps": 6}
    train_py.train(given)
    resumed = train_py.train({"out": given["out"], "resume": True, "max_steps": 10})
    assert same(resumed["states"], checkpoint["states"])                # the states are in the checkpoint


def test_carry_state_says_where_it_cannot_be(corpus, tmp_path):
    for options, message in ((dict(mixer="attention"), "does not grow"), (dict(data="mqar"), "for text"),
                             (dict(batch_size=10**6, micro_batch=1), "--batch_size must be at most")):
        with pytest.raises(ValueError, match=message):
            train_py.train(settings(corpus, tmp_path / "out", carry_state=True, **options))


def test_the_balancing_loss_is_trained_on(corpus, tmp_path):
    routers = []
    for weight in ("1e-9", "10"):
        given = settings(corpus, tmp_path / weight, max_steps=3, ablation=f"balance={weight}", clip=1e9)
        routers.append(train_py.train(given)["model"]["blocks.0.memory.W_alpha.weight"])
    assert error(*routers) > 0.01


def test_keep_every(corpus, tmp_path):
    given = settings(corpus, tmp_path / "out", max_steps=5, keep_every=2)
    train_py.train(given)
    kept = sorted(tmp_path.glob("out/step-*.pt"))
    assert [p.name for p in kept] == ["step-0.pt", "step-2.pt", "step-4.pt"]
    assert [load_checkpoint(p)["step"] for p in kept] == [0, 2, 4]
    train_py.train({**given, "overwrite": True, "keep_every": None})
    assert not list(tmp_path.glob("out/step-*.pt"))                     # nothing is left of the run before


def test_router_lr(corpus, tmp_path):
    """W_alpha alone moves at its own rate, and a resumed run keeps it. AdamW's first step is the learning rate's size."""
    moved = {}
    for times in (1.0, 3.0):
        given = settings(corpus, tmp_path / str(times), max_steps=1, router_lr=times, weight_decay=0.0, keep_every=1)
        after = train_py.train(given)["model"]
        before = load_checkpoint(tmp_path / str(times) / "step-0.pt")["model"]
        moved[times] = {k: (after[k] - before[k]).abs().median().item() for k in after}
        train_py.train({"out": given["out"], "resume": True, "max_steps": 2})
    for k in moved[1.0]:
        assert moved[3.0][k] == pytest.approx(moved[1.0][k] * (3 if k.endswith("W_alpha.weight") else 1), rel=0.01)


def test_a_checkpoint_from_before_the_mixers_is_resumed(run20, tmp_path):
    """Fields that are younger than a checkpoint have their defaults."""
    old = load_checkpoint(run20[0] / "last.pt")
    young = ("mixer", "conv", "gate", "n_head", "n_kv_head", "d_state", "ablation", "shared_row", "shift", "read_rank")
    for name in young:
        del old["config"][name], old["settings"][name]
    del old["settings"]["router_lr"], old["settings"]["keep_every"]
    (tmp_path / "out").mkdir()
    save_checkpoint(old, tmp_path / "out/last.pt")
    assert train_py.train({"out": str(tmp_path / "out"), "resume": True, "max_steps": 21})["step"] == 21
    assert model_from(old, "cpu").config.mixer == "memory"


def test_a_checkpoint_from_before_the_house_is_resumed(run20, tmp_path):
    """Its config had a chunk_size and no recompute of its own, and the form "fast" was named "chunked"."""
    old = load_checkpoint(run20[0] / "last.pt")
    old["config"] |= {"chunk_size": 32, "scan": "chunked"}
    old["settings"]["scan"] = "chunked"
    (tmp_path / "out").mkdir()
    save_checkpoint(old, tmp_path / "out/last.pt")
    resumed = train_py.train({"out": str(tmp_path / "out"), "resume": True, "max_steps": 21})
    assert resumed["step"] == 21 and resumed["settings"]["scan"] == resumed["config"]["scan"] == "fast"
    assert model_from(load_checkpoint(tmp_path / "out/best.pt"), "cpu").config.scan == "fast"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_the_loss_so_far_is_drawn_in_a_terminal(corpus, tmp_path):
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁" and sparkline([1.0]) == "▁" and sparkline([]) == "" == sparkline([math.nan])
    assert sparkline([1, math.inf, 2]) == "▁ █" and len(sparkline(list(range(1000)))) == 60
    assert sparkline(list(range(1000)))[0] == "▁" and sparkline(list(range(1000)))[-1] == "█"
    given = settings(corpus, tmp_path / "out", max_steps=10)
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal):
        train_py.train(given)
    drawn = [line.split() for line in terminal.getvalue().splitlines() if "so far" in line]
    losses = [loss for _, loss in log_rows(tmp_path / "out", "val_loss")][:2]
    assert [bars for bars, *_ in drawn] == ["▁", sparkline(losses)]
    terminal.encoding = "ascii"                         # a terminal that has no bars, and what is no terminal
    assert not draws(terminal) and not draws(io.StringIO())


class TooSmall:
    """A memory that holds the activations of so many windows, as a GPU's allocator says it."""

    def __init__(self, most, monkeypatch, error=None):
        error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.seen, forward = [], FMem.forward

        def limited(model, tokens, state=None):
            self.seen.append(len(tokens))
            if len(tokens) > most and torch.is_grad_enabled():
                raise error
            return forward(model, tokens, state)

        monkeypatch.setattr(FMem, "forward", limited)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_too_little_memory_halves_the_micro_batch(error, corpus, tmp_path, monkeypatch, capsys):
    """The run is bit for bit the one that had the smaller micro batch from the start, dropout included."""
    given = dict(batch_size=12, max_steps=6, eval_every=3, dropout=0.2)
    want = train_py.train(settings(corpus, tmp_path / "small", micro_batch=3, **given))
    with monkeypatch.context() as patch:
        memory = TooSmall(4, patch, error)
        got = train_py.train(settings(corpus, tmp_path / "halved", **given))
    assert memory.seen[:3] == [12, 6, 3] and same(got["model"], want["model"]) and same(got["optimizer"], want["optimizer"])
    said = capsys.readouterr().out
    assert said.count("too little for 12 windows at once; from step 1 on 6 (--micro_batch 6)") == 1
    assert "on 3 (--micro_batch 3)" in said
    assert log_rows(tmp_path / "halved", "train_loss") == log_rows(tmp_path / "small", "train_loss")
    assert got["settings"]["micro_batch"] == 3


def test_memory_that_runs_out_in_the_middle_of_a_run(corpus, tmp_path, monkeypatch):
    """Half of the gradients of a step were there already: they do not count twice."""
    given = dict(batch_size=8, max_steps=4, dropout=0.0)
    want = train_py.train(settings(corpus, tmp_path / "whole", micro_batch=4, **given))
    calls, forward = [], FMem.forward

    def once(model, tokens, state=None):
        calls.append(len(tokens))
        if len(calls) == 6:                             # the second part of the third step
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, tokens, state)

    monkeypatch.setattr(FMem, "forward", once)
    got = train_py.train(settings(corpus, tmp_path / "broken", micro_batch=4, **given))
    assert calls[4:11] == [4, 4, 2, 2, 2, 2, 2]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got["model"].values(), want["model"].values(), strict=True))


def test_where_halving_does_not_help(corpus, tmp_path, monkeypatch):
    """One window that is too large, carried states, and errors of another kind end the run as before."""
    TooSmall(0, monkeypatch)
    options = [f"--{k}={v}" for k, v in settings(corpus, tmp_path / "out").items()]
    with pytest.raises(SystemExit, match="train.py: error: out of memory .*--micro_batch"):
        train_py.main(options)
    with pytest.raises(SystemExit, match="train.py: error: out of memory"):
        train_py.main([*options, "--carry_state", "--overwrite"])
    TooSmall(2, monkeypatch, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        train_py.main([*options, "--overwrite"])


def test_the_share_of_a_gpus_peak(monkeypatch):
    """6 N and the scan, as docs/scaling.md has them; half the peak where a step takes twice the time of its FLOPs."""
    big = ModelConfig(vocab_size=50257, n_layer=24, d_model=2560, n_rows=64, k_rows=8)
    assert flops_per_token(big, 1024) == pytest.approx(10.35e9, rel=1e-3)
    attention = ModelConfig(vocab_size=100, n_layer=2, d_model=64, mixer="attention")
    # of each token's scores with t others and the mixture of their values, both ways: 3 times 2 products of 2 d FLOPs
    assert flops_per_token(attention, 100) - 6 * n_parameters(attention) == pytest.approx(2 * 3 * 2 * 2 * 64 * 50)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    gpu = torch.device("cuda", 0)
    speed = 0.5 * 989e12 / flops_per_token(big, 1024)
    assert Meter(gpu, torch.bfloat16, big, 1024)(speed) == " | 50.0% of the peak | 3.0 GB at most"
    assert Meter(gpu, torch.bfloat16, big, 1024, 4)(4 * speed) == " | 50.0% of the peak | 3.0 GB at most"
    assert Meter(gpu, torch.float32, big, 1024)(speed) == " | 3.0 GB at most"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card of tomorrow")
    assert Meter(gpu, torch.bfloat16, big, 1024)(speed) == " | 3.0 GB at most"
    assert Meter(torch.device("cpu"), torch.float32, big, 1024)(speed) == ""


@pytest.mark.parametrize("slower, asked, said", [(1, 0, "no: "), (-1, 0, "yes: "), (1, 1, "yes"), (None, 0, "no: ")])
def test_compile_is_taken_if_it_is_faster(slower, asked, said, monkeypatch):
    """With a torch.compile of our own, which waits before the model or lets the model itself wait, or fails."""
    model, lines = FMem(tiny()), []
    forward = FMem.forward

    def waits(*arguments):
        time.sleep(0.02)
        return forward(*arguments)

    if slower is None:
        monkeypatch.setattr(torch, "compile", lambda net: lambda tokens: 1 / 0)
    else:
        monkeypatch.setattr(FMem, "forward", waits if slower < 0 else forward)
        monkeypatch.setattr(torch, "compile", lambda net: functools.partial(waits if slower > 0 else forward, net))
    net = try_compile(model, torch.randint(50, (2, 9)), contextlib.nullcontext, lines.append, asked)
    assert (net is model) == said.startswith("no") and lines[0].startswith(f"compile   {said}") and len(lines) == 1
    assert all(p.grad is None for p in model.parameters())
    if slower and not asked:
        ratio = float(re.search(r"([\d.]+) times as fast", lines[0])[1])
        assert ratio > 1.5 if slower < 0 else ratio < 0.7
