"""train.py: exact resume, output folder, training loop, several processes, settings, data."""

import contextlib
import csv
import functools
import itertools
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import time
import traceback
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from data import prepare, tokenizer
from fmem import FMem, FMemConfig

# Log lines, evaluations and kept checkpoints fall on different steps.
UNEVEN = {"log_every": 3, "eval_every": 5, "keep_every": 8}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")


def read(path):
    return torch.load(path, weights_only=True)


def log(folder):
    """The rows of log.csv as text, without the seconds."""
    lines = (Path(folder) / "log.csv").read_text().splitlines()
    return [line.rpartition(",")[0] for line in lines]


def column(folder, name):
    """The [(step, value)] of a column of log.csv, without its empty cells."""
    with open(Path(folder) / "log.csv", newline="") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row[name]]


def same(a, b):
    """Equal bit for bit, also in dicts of tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(folder, whole):
    """Every checkpoint and every row, except for the seconds."""
    names = {path.name for path in whole.glob("*.pt")}
    assert names == {path.name for path in folder.glob("*.pt")} and "last.pt" in names
    for name in names:
        a, b = read(folder / name), read(whole / name)
        assert a.keys() == b.keys()
        assert all(same(a[part], b[part]) for part in a.keys() - {"seconds", "log"}), name
    assert log(folder) == log(whole)


def before_step(monkeypatch, step, action, batch_size=4):
    """Call `action` when this step of the run begins."""
    windows = train.Corpus.windows

    def patched(self, first, count):
        if first // batch_size == step - 1:
            action()
        return windows(self, first, count)

    monkeypatch.setattr(train.Corpus, "windows", patched)


def options(given, out):
    """Settings as a command line."""
    return [*(f"--{name}={value}" for name, value in given.items()), f"--out={out}"]


def fork(action, errors, environment=()):
    """Run `action` in a child process. Returns its id; its exception is written to a file."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.environ.update(environment)
            action()
        except BaseException:
            errors.write_text(traceback.format_exc())
        finally:
            os._exit(errors.exists())
    return child


def test_signal_saves_and_the_printed_command_resumes_exactly(small, tmp_path, monkeypatch, capsys):
    """In a folder whose name needs quotes, with a log as a kill can leave it."""
    settings = {**small, **UNEVEN}
    out = tmp_path / "my run"
    with monkeypatch.context() as patch:
        before_step(patch, 10, lambda: signal.raise_signal(signal.SIGTERM))
        assert train.train({**settings, "out": str(out)})["step"] == 10
    hint = re.search(r"python train\.py (--resume.*)", capsys.readouterr().out)[1]
    assert read(out / "last.pt")["losses"]  # since the last log line
    with open(out / "log.csv", "a") as file:
        file.write("11,1056,3.0,1e-3,1,0,,,,0.5\n12,1")  # an extra row, and half of one
    train.main([*shlex.split(hint), "--device=cpu"])
    train.train({**settings, "out": str(tmp_path / "whole")})
    assert_same_run(out, tmp_path / "whole")


@needs_fork
@pytest.mark.parametrize("kills", [5, pytest.param(40, marks=pytest.mark.slow)])
def test_run_survives_kills_at_any_moment(kills, small, tmp_path):
    """A checkpoint at nearly every step, so that kills hit some that are half-written."""
    given = {**small, **UNEVEN, "max_steps": 8 * kills, "eval_every": 2}
    rng = random.Random(kills)
    out = tmp_path / "out"
    errors = tmp_path / "errors"

    def life():
        begun = (out / "last.pt").is_file()
        train.train({**given, "out": str(out), "resume": begun, "overwrite": not begun})

    for _ in range(kills):
        child = fork(life, errors)
        time.sleep(rng.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not errors.exists(), errors.read_text()
    assert os.waitpid(fork(life, errors), 0)[1] == 0, errors.read_text()
    assert not list(out.glob(".*.tmp"))
    train.train({**given, "out": str(tmp_path / "whole")})
    assert_same_run(out, tmp_path / "whole")


def test_second_signal_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        received = train.note_signals(stack)
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_resume_with_another_batch_size_repeats_and_skips_nothing(small, tmp_path):
    out = str(tmp_path)
    windows = train.Corpus.windows
    with patch.object(train.Corpus, "windows", autospec=True, side_effect=windows) as spy:
        train.train({**small, "out": out, "max_steps": 3})
        train.train({"out": out, "resume": True, "device": "cpu", "max_steps": 5, "batch_size": 6})
    read_ones = [call.args[1:] for call in spy.call_args_list]
    assert read_ones == [(0, 4), (4, 4), (8, 4), (12, 6), (18, 6)]
    assert column(out, "tokens")[-1] == (5, 24 * 24)


def test_resume_takes_new_rates_and_keeps_moments_and_a_foreign_log(run, tmp_path):
    """A log.csv of another program is set aside, and the run gets its rows back."""
    out = tmp_path / "out"
    shutil.copytree(run, out)
    foreign = (run / "log.csv").read_bytes().replace(b",", b";").replace(b"\n", b"\r\n")
    (out / "log.csv").write_bytes(foreign)
    given = {"out": str(out), "resume": True, "device": "cpu", "max_steps": 21}
    done = train.train({**given, "weight_decay": 0.5, "beta2": 0.5})
    groups = done["optimizer"]["param_groups"]
    decays = [(len(group["params"]), group["weight_decay"]) for group in groups]
    assert decays == [(8, 0.5), (4, 0.0)]  # matrices of the layer; norms and embedding
    assert all(group["betas"] == (0.9, 0.5) for group in groups)
    assert all(state["step"] == 21 for state in done["optimizer"]["state"].values())
    assert [path.read_bytes() for path in out.glob("log-*.csv")] == [foreign]
    rows = log(run)[:-1]  # without the final validation, which follows the checkpoint
    assert log(out)[: len(rows)] == rows and len(log(out)) > len(rows)


def test_invalid_resume_is_refused(run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run, out)
    given = {"out": str(out), "resume": True, "device": "cpu"}
    with pytest.raises(ValueError, match="d_model"):
        train.train({**given, "d_model": 32})
    other = tmp_path / "other"
    prepare.prepare(other, {"a": "to be or not to be " * 500}, corpus="another", vocab_size=300)
    with pytest.raises(ValueError, match="tokenizer"):
        train.train({**given, "data": str(other)})
    shutil.copy(out / "best.pt", out / "last.pt")
    with pytest.raises(ValueError, match="only weights"):
        train.train(given)


def test_renamed_checkout_resumes_with_its_own_data(small, corpus, tmp_path, monkeypatch):
    """Nothing in a checkpoint is tied to a machine: no absolute path, no device."""
    first = tmp_path / "first"
    shutil.copytree(corpus, first / "data")
    monkeypatch.chdir(first)
    train.train({**small, "data": str(first / "data"), "max_steps": 2})  # with the default --out
    assert "device" not in read("out/last.pt")["settings"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.chdir(first.rename("second"))
    assert train.train({"resume": True, "device": "cpu", "max_steps": 3})["step"] == 3


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "step-8.pt"])
def test_folder_with_any_checkpoint_needs_overwrite(name, small, tmp_path):
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(SystemExit, match="--overwrite"):
        train.main(options(small, tmp_path))
    with pytest.raises(SystemExit, match="not written by train.py"):  # by another program
        train.main([*options(small, tmp_path), "--overwrite"])
    assert (tmp_path / name).read_bytes() == b"weights"


def test_overwrite_deletes_only_files_of_a_run(small, run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run, out)
    shutil.copy(out / "last.pt", out / "step-8.pt")
    mine = {"notes.txt", "step-by-step.pt", "model.pt", "log-1.csv"}
    for name in mine:
        (out / name).write_text(name)
    with pytest.raises(ValueError):  # a run that cannot start deletes nothing
        train.train({**small, "out": str(out), "overwrite": True, "k_rows": 99})
    full = patch.object(os, "fsync", side_effect=OSError("the disk is full"))
    with full, pytest.raises(OSError, match="the disk is full"):
        train.train({**small, "out": str(out), "overwrite": True, "max_steps": 1})
    assert read(out / "last.pt")["step"] == 20
    train.train({**small, "out": str(out), "overwrite": True, "max_steps": 1})
    assert all((out / name).read_text() == name for name in mine)
    names = {path.name for path in out.iterdir()} - {".lock", "loss.png"}
    assert names == mine | {"last.pt", "best.pt", "log.csv"}
    assert read(out / "best.pt")["step"] == 1


def test_log_and_plot_without_a_checkpoint_are_kept(small, tmp_path):
    for name in ("log.csv", "loss.png"):
        (tmp_path / name).write_text("mine")
    train.train({**small, "out": str(tmp_path), "overwrite": True, "max_steps": 1})
    (aside,) = tmp_path.glob("log-*.csv")
    assert aside.read_text() == (tmp_path / "loss.png").read_text() == "mine"


def test_second_run_in_one_folder_is_refused(small, tmp_path, monkeypatch):
    def second():
        with pytest.raises(SystemExit, match="another run"):
            train.main(options(small, tmp_path))

    before_step(monkeypatch, 2, second)
    assert train.train({**small, "out": str(tmp_path), "max_steps": 3})["step"] == 3


def test_best_holds_only_the_best_weights(small, tmp_path, monkeypatch):
    losses = iter([4.0, 3.0, math.nan, 3.5, 1.0])  # after 5, 10, 15, 20 steps; at the end
    monkeypatch.setattr(train.Corpus, "validate", lambda *args: (next(losses), "", {}))
    train.train({**small, "out": str(tmp_path), "keep_every": 10})
    best = read(tmp_path / "best.pt")
    last = read(tmp_path / "last.pt")
    assert (best["step"], best["val_loss"], last["best"]) == (10, 3.0, 3.0)
    assert same(best["model"], read(tmp_path / "step-10.pt")["model"])
    assert "optimizer" not in best and "log" not in best


def test_full_disk_gives_one_line_and_keeps_the_old_checkpoint(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(run, out)
    before = (out / "last.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError("the disk is full")))
    with pytest.raises(OSError, match=r"^cannot write .*the disk is full.*$"):
        train.train({"resume": True, "device": "cpu", "out": str(out), "max_steps": 21})
    assert (out / "last.pt").read_bytes() == before and not list(out.glob(".*.tmp"))


def test_seconds_end_the_schedule_and_resume_reports_it(small, tmp_path, capsys):
    out = tmp_path / "out"
    given = {"max_steps": 10**6, "seconds": 1.0, "eval_every": 10**5}
    done = train.train({**small, **given, "out": str(out)})
    assert 1.0 <= done["seconds"] < 5 and 5 < done["step"] < 10**5
    rates = [rate for _, rate in column(out, "lr")]
    assert rates[-1] < 0.1 * max(rates)  # the cosine has reached its end of 0.05
    again = {"out": str(out), "resume": True, "device": "cpu"}
    capsys.readouterr()
    assert train.train({**again, "max_steps": 10**5}) is None
    assert re.search("--seconds 1.0 is reached; .* --seconds N", capsys.readouterr().out)
    more = train.train({**again, "max_steps": done["step"] + 2, "seconds": math.inf})
    assert more["step"] == done["step"] + 2


def test_non_finite_losses_never_reach_the_weights(small, tmp_path, monkeypatch):
    """Step 4 and all from 8 have such a loss. Each is skipped, and three in a row end the run."""
    given = {**small, "out": str(tmp_path), "keep_every": 1, "max_skipped": 3, "eval_every": 100}
    loss = F.cross_entropy
    factors = iter([1, 1, 1, math.nan, 1, 1, 1, math.nan, math.nan, math.nan])
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **kw: loss(*args, **kw) * next(factors))
    with pytest.raises(ValueError, match="3 steps in a row.*--resume"):
        train.train(given)
    kept = [read(tmp_path / f"step-{i}.pt") for i in range(1, 11)]
    unchanged = [same(a["model"], b["model"]) for a, b in itertools.pairwise(kept)]
    assert unchanged == [False, False, True, False, False, False, True, True, True]
    last = read(tmp_path / "last.pt")
    assert last["step"] == 10 and last["skipped"] == 4
    assert same(last["optimizer"]["state"], kept[6]["optimizer"]["state"])


class Uneven(train.Corpus):
    """The first token of a window decides how many of its 24 targets count."""

    def targets(self, windows):
        return windows[:, 1:].masked_fill(torch.arange(24) >= windows[:, :1] % 25, -100)


def test_micro_batches_and_bf16_change_only_the_rounding(small, tmp_path):
    """Even if the number of targets that count varies between windows."""
    given = {**small, "dropout": 0.0, "max_steps": 4, "clip": 1e9}
    for name, more in (("one", {}), ("micro", {"micro_batch": 3}), ("bf16", {"dtype": "bf16"})):
        done = train.train({**given, **more, "out": str(tmp_path / name)}, task=Uneven)
        assert {weight.dtype for weight in done["model"].values()} == {torch.float32}
    # bf16 has an 8-bit mantissa: 0.4 % per product, less in the mean of a batch
    for run, name, rel in (
        ("micro", "train_loss", 1e-5),
        ("micro", "grad_norm", 1e-4),
        ("bf16", "train_loss", 5e-3),
    ):
        want = [(i, pytest.approx(v, rel=rel)) for i, v in column(tmp_path / "one", name)]
        assert column(tmp_path / run, name) == want


def in_processes(world, given, folder):
    """train.train in `world` processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        action = functools.partial(train.train, given, task=Uneven)
        children.append(fork(action, folder / f"errors-{rank}", environment))
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert not any(statuses), [path.read_text() for path in folder.glob("errors-*")]


@needs_fork
def test_any_number_of_processes_gives_the_same_run(small, tmp_path, monkeypatch):
    """One process, then two, then two that share a sharded model, then one: the losses match those
    of one process to 1e-5, the float32 error of sums in another order."""
    given = {**small, "dropout": 0.0, "batch_size": 6, "max_steps": 8, "eval_every": 2}
    given |= {"micro_batch": 1, "d_memory": 24}
    train.train({**given, "out": str(tmp_path / "one")}, task=Uneven)
    given["out"] = str(tmp_path / "n")
    for step, world, fsdp in ((2, 1, False), (4, 2, False), (6, 2, True), (8, 1, False)):

        def stop(last=str(world - 1)):  # one of the processes gets the signal
            if os.environ.get("RANK", "0") == last:
                signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patch:
            before_step(patch, step, stop, batch_size=6)
            in_processes(world, {**given, "fsdp": fsdp, "resume": step > 2}, tmp_path)
        assert read(tmp_path / "n/last.pt")["step"] == step
    train.train({"out": given["out"], "resume": True, "device": "cpu"}, task=Uneven)
    for name in ("train_loss", "val_loss"):
        want = [(step, pytest.approx(v, rel=1e-5)) for step, v in column(tmp_path / "one", name)]
        assert column(tmp_path / "n", name) == want
    one, n = (read(tmp_path / folder / "last.pt") for folder in ("one", "n"))
    for name, weight in one["model"].items():  # AdamW's square root adds error
        assert torch.allclose(weight, n["model"][name], rtol=0, atol=1e-4)


def test_out_of_memory_gives_one_line_and_no_retry(small, tmp_path, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory.\nmore lines")
    forward = Mock(side_effect=error)
    monkeypatch.setattr(FMem, "forward", forward)
    with pytest.raises(SystemExit, match="out of memory.*--micro_batch.*--recompute.*--context"):
        train.main(options(small, tmp_path))
    assert forward.call_count == 1


BAD = "--max-steps=1 --max_steps=many --max_steps=0 --lr=nan --lr=inf --k_rows=99 --dtype=int8"
BAD += " --device=cuda:99 --preset=tpu --context=9999999 --data=nowhere --data=\x1b[2J"


@pytest.mark.parametrize("option", BAD.split())
def test_bad_input_gives_a_one_line_error(option, small, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        train.main([*options(small, tmp_path / "out"), option])
    message = exit.value.code
    if message == 2:  # argparse
        message = capsys.readouterr().err.removesuffix("\n")
    assert message.startswith("train.py: error: ") and message.isprintable()
    assert not (tmp_path / "out/last.pt").exists()


def test_settings_are_given_resumed_or_from_the_preset():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert (train.resolve({}, {}, cpu).d_model, train.resolve({}, {}, gpu).d_model) == (192, 384)
    assert train.resolve({"preset": "gpu"}, {}, cpu).max_steps == 650
    saved = {"preset": "gpu", "d_model": 8, "lr": 1.0}
    resolved = train.resolve({"lr": 2.0}, saved, cpu)
    assert (resolved.preset, resolved.d_model, resolved.lr, resolved.n_layer) == ("gpu", 8, 2.0, 8)


def test_epoch_reads_the_text_once(corpus, monkeypatch):
    loaded = prepare.load(corpus)
    monkeypatch.setattr(prepare, "load", lambda folder: (np.arange(1000), *loaded[1:]))
    task = train.Corpus(train.Settings(context=24, seed=1, data="numbers"))
    windows = task.windows(0, 2 * task.windows_per_epoch)
    assert (windows == windows[:, :1] + torch.arange(25)).all()  # each is a piece of it
    orders = []
    for epoch in windows.split(task.windows_per_epoch):
        targets = task.targets(epoch).flatten().tolist()
        assert len(set(targets)) == len(targets) >= 1000 - 2 * 24  # none twice, few omitted
        orders.append(epoch[:, 0].argsort().tolist())
    assert sorted(orders[0]) not in orders and orders[0] != orders[1]  # shuffled
    for number in (task.windows_per_epoch, 0):  # each depends only on its number
        assert torch.equal(task.windows(number, 1)[0], windows[number])


@pytest.mark.parametrize("count, limit", [(2, None), (7, 100)])
def test_validation_counts_every_token_once(count, limit, corpus):
    task = train.Corpus(train.Settings(data=str(corpus), context=24))
    task.val = task.val[:130]  # five windows of 24 and one of 9
    model = FMem(FMemConfig(task.vocab_size, n_layer=1, d_model=16, n_rows=8, k_rows=2)).eval()
    processes = train.Processes(torch.device("cpu"), False)
    loss, _, columns = task.validate(model, limit, count, processes, contextlib.nullcontext)
    tokens = torch.from_numpy(task.val.astype(np.int64))[: limit and limit + 1]
    windows = [tokens[i : i + 25] for i in range(0, len(tokens) - 1, 24)]
    logits = torch.cat([model(window[None, :-1])[0][0] for window in windows])
    nats = F.cross_entropy(logits, tokens[1:]).item()
    text = tokenizer.load_tokenizer(task.tokenizer).decode_bytes(tokens[1:].tolist())
    size = len(text.replace(tokenizer.EOT.encode(), b"")) / (len(tokens) - 1)  # bytes per token
    want = {"val_bpb": nats / math.log(2) / size, "val_tokens": len(tokens) - 1}
    assert {"loss": loss, **columns} == pytest.approx({"loss": nats, **want}, rel=1e-5)
