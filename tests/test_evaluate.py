"""data/recall.py and experiments/evaluate.py."""
import contextlib
import importlib.util
import itertools
import json
import math
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample as sample_py
from data import recall, token_files
from experiments import evaluate
from tests.helpers import ROOT, error, log_rows, tiny_model
from training.checkpoint import load_checkpoint, model_from
from variants.build import build


def test_recall_windows():
    task = recall.Recall("mqar", 64, batch_size=40, seed=3)
    windows = task(5)
    assert torch.equal(windows, task(5)) and torch.equal(windows[10:20], task(5, slice(10, 20)))
    assert not torch.equal(windows, task(6))
    counts = Counter()
    for window, targets in zip(windows.tolist(), task.targets(windows).tolist(), strict=True):
        ask = window.index(recall.ASK)
        pairs = dict(zip(window[:ask:2], window[1:ask:2], strict=True))
        counts[len(pairs)] += 1
        asked = [(key, want) for key, want in zip(window, targets, strict=False) if want >= 0]
        asked = Counter(asked)
        assert ask == 2 * len(pairs) and set(asked) == set(pairs.items())       # every key, with its own value,
        assert max(asked.values()) - min(asked.values()) <= 1                   # over and over
    assert set(counts) == {4, 8, 16}
    window = task.make(np.random.default_rng(0), 1, 5)                          # in a test once
    assert window[0].tolist().count(recall.FILL) == 65 - 21 and (task.targets(window) >= 0).sum() == 5
    task = recall.Recall("passkey", 40, batch_size=40, seed=3)
    for window, targets in zip(task(0).tolist(), task.targets(task(0)).tolist(), strict=True):
        at = window.index(recall.HERE)
        assert window[at + 1:at + 5] == window[-4:] == [t for t in targets if t >= 0] == targets[-4:]
        assert window[-5] == recall.ASK
    assert task.make(np.random.default_rng(0), 1, 31)[0, 0] == recall.HERE
    windows = recall.Recall("mqar-any", 64, batch_size=200)(0)
    repeated = same = 0
    for window, targets in zip(windows.tolist(), task.targets(windows).tolist(), strict=True):
        ask = window.index(recall.ASK)
        pairs = dict(zip(window[:ask:2], window[1:ask:2], strict=True))
        asked = [key for key, want in zip(window, targets, strict=False) if want >= 0]
        assert answers(targets) == [pairs[key] for key in asked]                # any key, with its value
        if len(pairs) == 4:                                                     # also that which was asked for last
            same, repeated = same + len(asked) - 1, repeated + sum(a == b for a, b in itertools.pairwise(asked))
    assert repeated / same == pytest.approx(1 / 4, abs=5 * (3 / 16 / same) ** 0.5)
    for name, hard in (("mqar", 17), ("passkey", 32), ("repeat", 2), ("copy", 17), ("copy", 0)):
        with pytest.raises(ValueError, match="room for|1 to 16 values"):
            recall.Recall(name, 64 if name == "mqar" else 40).make(np.random.default_rng(0), 1, hard)
        with pytest.raises(ValueError, match="--context of at least"):
            recall.Recall(name, 3)


def answers(targets):
    return [t for t in targets if t >= 0]


def test_windows_to_copy():
    """The values before the question, in their order, are the answers, and the only ones; each place is as likely."""
    task, counts, places = recall.Recall("copy", 60, batch_size=400, seed=3), Counter(), Counter()
    windows = task(5)
    for window, targets in zip(windows.tolist(), task.targets(windows).tolist(), strict=True):
        ask = window.index(recall.ASK)
        values = [t for t in window[:ask] if t != recall.FILL]
        assert ask == 44 and window[ask + 1:] == values + [recall.FILL] * (16 - len(values)) and answers(targets) == values
        assert targets[ask:ask + len(values)] == values and all(64 <= t < 128 for t in values)
        counts[len(values)] += 1
        places.update(at for at, t in enumerate(window[:ask]) if t != recall.FILL)
    assert set(counts) == set(range(4, 17)) and set(places) == set(range(44))
    assert max(places.values()) < 2 * min(places.values())             # 91 on average, a standard deviation of about 8
    assert len(answers(task.targets(task.make(np.random.default_rng(0), 1, 7))[0].tolist())) == 7
    shortest = recall.Recall("copy", 32).make(np.random.default_rng(0), 1, 16)[0].tolist()
    assert shortest[16] == recall.ASK and shortest[17:] == shortest[:16] and recall.FILL not in shortest


def test_windows_to_repeat():
    """Every string comes back whole, and all of its tokens but the first are answers."""
    task, counts = recall.Recall("repeat", 150, batch_size=60, seed=3), Counter()
    windows = task(5)
    for window, targets in zip(windows.tolist(), task.targets(windows).tolist(), strict=True):
        ask = window.index(recall.ASK)
        assert ask % 16 == 0 and len(set(window[:ask])) == ask         # no token twice: its successor is known
        follows = {a: b for i, (a, b) in enumerate(itertools.pairwise(window[:ask])) if i % 16 != 15}
        counts[ask // 16] += 1
        for at in range(150):
            inside = at > ask and (at - ask) % 16 != 0
            assert targets[at] == (window[at + 1] if inside else -100) and (not inside or follows[window[at]] == window[at + 1])
        again = [window[at] for at in range(ask + 1, 151, 16)][:ask // 16]
        assert sorted(again) == sorted(window[:ask:16])                # each string before any comes a second time
    assert set(counts) == {1, 2, 3, 4}
    for strings in (1, 4):
        window = task.make(np.random.default_rng(0), 1, strings)
        assert len(answers(task.targets(window)[0].tolist())) == 15 * strings
        assert window[0].tolist().count(recall.FILL) == 150 - 32 * strings


def test_recall_is_scored_right():
    """A model that knows the answers has all of them right, one that guesses a value 1 in 128."""
    class Oracle(torch.nn.Module):
        def __init__(self, knows):
            super().__init__()
            self.knows, self.seen = knows, []

        def hidden(self, tokens, state):
            before = tokens if state is None else torch.cat([state, tokens], 1)     # in pieces: the past is the state
            return self.answer(before)[:, -tokens.shape[1]:], before

        def answer(self, tokens):
            logits = torch.zeros(*tokens.shape, recall.VOCAB)
            for b, text in enumerate(tokens.tolist()):
                known = dict(itertools.pairwise(text)) if self.knows else {}
                for t, token in enumerate(text):
                    if recall.ASK in text[:t]:
                        logits[b, t, dict(itertools.pairwise(text)).get(token, 128) if known else 128] = 99.0
            return logits

        def head(self, x):
            return x

    task = recall.Recall("mqar", 64)
    for knows, right in ((True, 1.0), (False, 1 / 128)):
        nats, got = task.evaluate(Oracle(knows), torch.device("cpu"), contextlib.nullcontext, windows=64, hard=16, piece=20)
        assert got == pytest.approx(right, abs=0 if knows else 0.012) and (nats < 1e-6) == knows    # 1,024 answers


def test_training_on_recall(recall_runs, tmp_path, capsys):
    checkpoint = load_checkpoint(recall_runs / "mqar/best.pt")
    assert checkpoint["corpus"] == "mqar" and checkpoint["tokenizer"] is None
    assert len(log_rows(recall_runs / "mqar", "val_accuracy")) == 2
    assert 4.5 < log_rows(recall_runs / "mqar", "val_loss")[-1][1] < 6          # ln 128 = 4.85, ln 259 = 5.56
    for task, key, cases in (("mqar", "pairs", [4, 8]), ("mqar-any", "pairs", [4, 8]), ("copy", "length", [32, 128, 512]),
                             ("passkey", "distance", [23, 119, 503, 4087]), ("repeat", "strings", [1])):
        evaluate.main([str(recall_runs / task / "best.pt"), "--recall", "--json", str(tmp_path / "a.json")])
        rows = json.loads((tmp_path / "a.json").read_text())["recall"]["rows"]
        assert [r[key] for r in rows] == cases
    capsys.readouterr()
    with pytest.raises(SystemExit, match="eval.py --recall|--recall tests it"):
        sample_py.main(["--checkpoint", str(recall_runs / "mqar/best.pt")])
    with pytest.raises(SystemExit, match="trained on mqar"):
        evaluate.main([str(recall_runs / "mqar/best.pt"), "--routing"])


def test_eval_losses_are_those_of_the_training(run20, corpus):
    checkpoint = load_checkpoint(run20[0] / "last.pt")
    model = model_from(checkpoint, "cpu")
    _, val, *_ = token_files.load(corpus)
    tokens = torch.from_numpy(val[:97].astype(np.int64))
    for length in (24, 96):
        losses = evaluate.token_losses(model, tokens, length, torch.device("cpu"), at_once=40)       # two windows, or half of one
        want = [F.cross_entropy(model(tokens[a:a + length][None])[0][0], tokens[a + 1:a + length + 1], reduction="none")
                for a in range(0, 96, length)]
        assert error(losses, torch.cat(want)) < 1e-6
    got = evaluate.measure_loss(model, checkpoint, None, torch.device("cpu"))
    assert got["nats"] == pytest.approx(log_rows(run20[0], "val_loss")[-1][1], rel=1e-5)       # log.csv keeps 6 digits
    count = [r["to"] - r["from"] + 1 for r in got["by_position"]]
    mean = sum(n * r["nats"] for n, r in zip(count, got["by_position"], strict=True)) / sum(count)
    assert sum(count) == 24 and mean == pytest.approx(got["nats"], rel=0.02)                   # but for the last, short window


def test_eval_long(run20, corpus, monkeypatch):
    """Without a memory the length of the window cannot matter; one that reads the wrong thing further on shows."""
    checkpoint = load_checkpoint(run20[0] / "last.pt")
    checkpoint["settings"]["context"] = 32
    model = model_from(checkpoint, "cpu")
    cpu = torch.device("cpu")
    for block in model.blocks:
        block.memory.W_o.weight.data.zero_()
    result = evaluate.measure_long(model, checkpoint, None, cpu, 8, 10**9)
    assert [r["length"] for r in result["rows"]] == [32, 64, 128, 256]
    assert all(abs(r["position"] - result["base"]) < 1e-5 for r in result["rows"])
    assert all(abs(r["mean"] - result["rows"][0]["mean"]) < 1e-5 for r in result["rows"])
    losses = evaluate.token_losses

    def worse(model, tokens, length, device):                           # a nat more from the 33rd token on
        return losses(model, tokens, length, device) + (torch.arange(len(tokens) - 1) % length >= 32)

    monkeypatch.setattr(evaluate, "token_losses", worse)
    result = evaluate.measure_long(model, checkpoint, None, cpu, 8, 10**9)
    for r, beyond in zip(result["rows"], (0, 1, 1, 1), strict=True):
        assert r["position"] - result["base"] == pytest.approx(beyond, abs=1e-5)
        assert r["mean"] - result["rows"][0]["mean"] == pytest.approx(1 - 32 / r["length"], abs=1e-5)
    with pytest.raises(ValueError, match="at most"):
        evaluate.measure_long(model, checkpoint, None, cpu, 10**6, 10**9)


def test_eval_repeat_sees_a_copy(run20, monkeypatch):
    """A model that copies predicts a passage the second time, at the distances that it can look back."""
    checkpoint = load_checkpoint(run20[0] / "last.pt")
    vocab = checkpoint["config"]["vocab_size"]

    def copier(tokens, state=None):
        logits = torch.zeros(*tokens.shape, vocab)
        for b, text in enumerate(tokens.tolist()):
            seen = defaultdict(list)                    # where each pair of tokens has been
            for t, pair in enumerate(itertools.pairwise(text), 1):
                back = [s for s in seen[pair] if s >= t - 200]
                if back:
                    logits[b, t, text[back[0] + 1]] = 9.0
                seen[pair].append(t)
        return logits, state

    rows = evaluate.measure_recall(copier, checkpoint, None, torch.device("cpu"))["rows"]
    gains = {r["distance"]: r["first"] - r["second"] for r in rows}
    assert gains[0] > 2 and gains[64] > 2 and abs(gains[256]) < 1.5 and gains[0] > gains[256] + 1


def test_eval_routing(run20, corpus):
    """On a memory whose affinities are known."""
    checkpoint = load_checkpoint(run20[0] / "last.pt")
    n, m, context = 960, 8, 24
    tokens = torch.randint(100, (n,))
    words = list(map(str, range(200)))
    eta, flat = torch.full((n,), 0.5, dtype=torch.float64), torch.full((n, m), 1 / m, dtype=torch.float64)
    none = torch.zeros(n, 0)
    hard = F.one_hot(tokens % 4, m).double()                            # the token alone decides, half of the rows are dead
    got = evaluate.describe(flat, hard, eta, eta, none, tokens, context, words)
    assert got["entropy"] == pytest.approx(math.log(m)) and got["rows_per_token"] == pytest.approx(1)
    assert got["rows_used"] == pytest.approx(4, rel=0.02) and got["dead"] == 0.5 and got["told_by_token"] > 0.98
    assert got["moves"] == pytest.approx(0.75, abs=0.06) and got["moves_if_random"] == pytest.approx(0.75, abs=0.01)
    assert got["told_by_most_common"] < 0.35 and got["eta"] == [0.5, pytest.approx(0)]
    assert all(int(word) % 4 == row for row, kept in enumerate(got["collected"]) for word in kept)
    # a write of 1/2 to a quarter of the tokens: ln 2 / (ln 2 / 4) = 4 tokens
    assert got["half_life"][0] == pytest.approx(4, rel=0.2) and got["half_life"][-1] > 1e9
    same_row = F.one_hot(torch.zeros(n, dtype=torch.long), m).double()
    got = evaluate.describe(flat, same_row, eta, eta, none, tokens, context, words)
    assert got["moves"] == 0 and got["rows_used"] == pytest.approx(1) and got["told_by_most_common"] == 1
    # tokens that the first half of the text does not have tell nothing
    words = list(map(str, range(n)))
    assert evaluate.describe(flat, hard, eta, eta, none, torch.arange(n), context, words)["told_by_token"] < 0.3
    assert "shared_row" not in got
    rates = torch.tensor([[0.75, 0.25], [0.75, 0.35]], dtype=torch.float64).repeat(n // 2, 1)
    got = evaluate.describe(flat, hard, eta, eta, rates, tokens, context, words)["shared_row"]
    assert got["eta"] == [pytest.approx(0.75), pytest.approx(0)] and got["mu"][0] == pytest.approx(0.3)
    assert got["half_life"] == pytest.approx(0.5)                       # 3/4 at every token: half of it twice
    # and what is recorded is what the layer does
    model = model_from(checkpoint, "cpu")
    seen = evaluate.record_routing(model, tokens[:48] % 50, context, torch.device("cpu"))
    soft, alpha, eta, mu, shared = seen[0]
    assert shared.shape == (48, 0)
    assert soft.shape == alpha.shape == (48, 8) and torch.allclose(soft.sum(-1), torch.ones(48).double())
    assert ((alpha > 0).sum(-1) == 2).all() and torch.allclose(alpha.sum(-1), torch.ones(48).double(), atol=1e-6)
    x = model.blocks[0].memory_norm(model.embed(tokens[:24] % 50))
    theta, _, rows = model.blocks[0].memory.route(x)
    assert torch.allclose((alpha * eta[:, None])[:24].gather(-1, rows), theta.double(), atol=1e-6)
    assert "route" not in vars(model.blocks[0].memory)                  # nobody watches any more
    model = tiny_model(shared_row=True, shift=True, k_rows=3).eval()
    soft, alpha, eta, mu, shared = evaluate.record_routing(model, tokens[:48] % 50, context, torch.device("cpu"))[0]
    assert soft.shape == alpha.shape == (48, 7) and ((alpha > 0).sum(-1) == 3).all() and shared.shape == (48, 2)
    assert torch.allclose(alpha.sum(-1), torch.ones(48).double(), atol=1e-6) and (shared == 0.5).all()     # as it starts
    # the shift's lambda starts at sigmoid(-2)
    model, text = build(replace(model_from(checkpoint, "cpu").config, shift=True)), (str(corpus), "val")
    got = evaluate.measure_routing(model.eval(), checkpoint, text, torch.device("cpu"), 96)
    assert [layer["lambda"] for layer in got["layers"]] == [pytest.approx(1 / (1 + math.exp(2)))]


def test_eval_command(run20, corpus, recall_runs, tmp_path, capsys):
    def run(*arguments):
        command = [sys.executable, "-m", "experiments.evaluate", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    best = run20[0] / "best.pt"
    everything = [best, "--loss", "--long", 2, "--recall", "--routing"]
    figure = importlib.util.find_spec("matplotlib") is not None
    if figure:
        everything += ["--figure", tmp_path / "f.png"]
    else:
        assert "pip install matplotlib" in run(best, "--routing", "--figure", tmp_path / "f.png").stderr
    with ThreadPoolExecutor(2) as pool:
        twice = list(pool.map(lambda i: run(*everything, "--json", tmp_path / f"{i}.json"), range(2)))
    assert twice[0].returncode == 0, twice[0].stderr
    assert twice[0].stdout == twice[1].stdout and (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()
    assert set(json.loads((tmp_path / "0.json").read_text())) == {"loss", "long", "recall", "routing"}
    assert len(list(tmp_path.glob("f-*.png"))) == (3 if figure else 0)
    for arguments, message in [([tmp_path / "no.pt"], "does not exist"), ([best, "--long", 0], "--long"),
                               ([best, "--tokens", 0], "--tokens"), ([best, "--long", 10**7], "at most"),
                               ([best, "--data", tmp_path], "prepare"), ([best, "--x"], "--x"),
                               ([recall_runs / "mqar/best.pt", "--loss"], "mqar"),
                               ([best, "--json", tmp_path / "no/f.json"], "No such file")]:
        with pytest.raises(SystemExit) as e:
            evaluate.main(list(map(str, arguments)))
        said = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err.strip()
        assert e.value.code and message in said and "\n" not in said, said
