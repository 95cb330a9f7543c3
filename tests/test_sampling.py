"""sampling/: texts side by side, what ends them, their log probabilities, conversations."""
import io
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import sample as sample_py
from data import token_files, tokenizer
from data.messages import printable
from sampling.interactive import Conversation
from sampling.texts import END, LENGTH, STOP, Text, Writing
from tests.helpers import ROOT, SLOW, raw_text, shown, survived
from training.checkpoint import load_checkpoint, model_from
from variants.build import ModelConfig, build


@pytest.fixture(scope="module")
def enc(corpus):
    return tokenizer.load_tokenizer(token_files.load(corpus)[2])


@pytest.fixture(scope="module")
def trained(run20, enc):
    """A model in float64, in which sums in another order choose no other token."""
    return model_from(load_checkpoint(run20[0] / "best.pt"), "cpu").double()


def written(model, enc, seeds, prompt="über", before=None, stops=(), **choice):
    writing = Writing(model, enc, prompt, torch.device("cpu"), seeds, before, stops, **{**dict(max_new_tokens=60), **choice})
    for _ in writing:
        pass
    return writing


@pytest.mark.parametrize("options", [{}, {"mixer": "mamba2", "d_state": 8}, {"mixer": "attention"}, {"k_rows": None},
                                     {"shared_row": True, "shift": True, "conv": 4, "gate": True}], ids=str)
def test_each_text_is_the_same_as_alone(options, enc):
    """Eight at a time and one at a time, some of which end early; with a prompt, without, and after an earlier text."""
    config = dict(vocab_size=enc.n_vocab, n_layer=2, d_model=32, n_rows=8, k_rows=2) | options
    model = build(ModelConfig(**config)).double().eval()
    with torch.no_grad():
        model.head.weight[enc.eot_token] += 0.3 * model.head.weight.std() * torch.randn(32, dtype=torch.float64)
    seeds, ends = range(5, 13), set()
    first = written(model, enc, [3], max_new_tokens=7).after()
    for prompt, before in (("über 東京", None), ("", None), ("a", None), ("", first), ("b c", first)):
        together = written(model, enc, seeds, prompt, before, temperature=1.5)
        for seed, text in zip(seeds, together.texts, strict=True):
            if before and seed == seeds[0]:
                alone = written(model, enc, [seed], prompt, before, temperature=1.5)
            else:                                       # of an earlier text only the first takes over the generator
                alone = written(model, enc, [-1, seed], prompt, before, temperature=1.5)
            assert alone.texts[-1].tokens == text.tokens and alone.texts[-1].shown == text.shown
            ends.add(text.end)
        assert len({text.shown for text in together.texts}) == 8
    assert {LENGTH} <= ends


def test_the_command_writes_them_side_by_side_and_in_order(run20, capsys):
    """More than are written at once; each as the command writes it alone, the texts of float32 here included."""
    def run(*options):
        sample_py.main(["--checkpoint", str(run20[0] / "best.pt"), "--device", "cpu", "--max_new_tokens", "25", "--prompt", "the",
                        *options])
        return capsys.readouterr().out

    many = run("--num_samples", "40", "--seed", "3").split("\n" + "-" * 20 + "\n")
    assert many == [run("--seed", str(seed)).removesuffix("\n\n") for seed in range(3, 42)] + [run("--seed", "42")]
    lines = [json.loads(line) for line in run("--num_samples", "40", "--seed", "3", "--json").splitlines()]
    assert [printable(line["prompt"] + line["text"]) for line in lines] == [text.removesuffix("\n\n") for text in many]
    assert [line["seed"] for line in lines] == list(range(3, 43))


def test_eight_at_once_are_faster():
    """At least three times the tokens per second of one; two here, where other processes may be busy."""
    model = build(ModelConfig(vocab_size=1025, n_layer=4, d_model=192, n_rows=32, k_rows=8)).eval()
    ratios = []
    for _ in range(5):
        speed = []
        for n in (1, 8):
            generators = [torch.Generator().manual_seed(i) for i in range(n)]
            start = time.perf_counter()
            list(model.generate(torch.zeros(n, 1, dtype=torch.long), 60, generator=generators))
            speed.append(n * 60 / (time.perf_counter() - start))
        ratios.append(speed[1] / speed[0])
    print(f"\n8 texts at once: {statistics.median(ratios):.1f} times the tokens per second of one")
    assert statistics.median(ratios) > 2


def test_a_stop_ends_a_text_and_is_never_seen(enc):
    """Random texts, cut into random tokens, with stops that overlap themselves: against a search in the whole."""
    g, stopped = random.Random(0), 0
    for _ in range(400):
        alphabet = g.choice(["ab", "aé東", "ab\n🙂"])
        whole = "".join(g.choice(alphabet) for _ in range(g.randrange(1, 40)))
        stops = ["".join(g.choice(alphabet) for _ in range(g.randrange(1, 5))) for _ in range(g.randrange(3))]
        raw, pieces = whole.encode(), []
        if g.random() < 0.3:                            # it may end inside a character
            raw = raw[:-1]
        whole = raw.decode("utf-8", "replace")
        rest = raw
        while rest:
            n = g.randrange(1, 6)
            pieces, rest = [*pieces, rest[:n]], rest[n:]
        text = Text(enc, pieces, "cpu", 0, stops)
        seen = ""
        for i in range(len(pieces)):
            seen += text.add(i)
            assert whole.startswith(seen)
            if text.end:
                break
        seen += text.rest()
        # The first stop to be complete ends the text, even if a longer one began before it.
        until = [raw[:sum(map(len, pieces[:i + 1]))].decode("utf-8", "ignore") for i in range(len(pieces))]
        done = next((part for part in until if any(stop in part for stop in stops)), None)
        want = whole if done is None else done[:min(done.find(stop) for stop in stops if stop in done)]
        assert seen == want and text.end == (LENGTH if done is None else STOP)
        stopped += done is not None
    assert 100 < stopped < 300


def test_log_probabilities_are_those_of_the_model(trained, enc):
    """Against single steps in float64, with and without an earlier text."""
    for before in (None, written(trained, enc, [1], max_new_tokens=9).after()):
        writing = written(trained, enc, [2], "the river", before, top_k=5, max_new_tokens=290)
        text, = writing.texts
        state, want = writing.begin, []
        for token, then in zip([*writing.prompt, *text.tokens][:-1], [*writing.prompt, *text.tokens][1:], strict=True):
            with torch.no_grad():
                logits, state = trained(torch.tensor([[token]]), state)
            want.append(F.log_softmax(logits[0, 0].float(), -1)[then].item())
        got = writing.log_probs(text)
        assert len(got) == len(text.tokens) and got == pytest.approx(want[-len(got):], abs=1e-4)    # float32 at the end


def test_json_lines(run20, capsys, enc):
    sample_py.main(["--checkpoint", str(run20[0] / "best.pt"), "--prompt", "\x1b[31m 東", "--num_samples", "3", "--json",
                    "--stop", " t", "--max_new_tokens", "200", "--temperature", "1.5"])
    out, _ = shown(capsys)
    lines = [json.loads(line) for line in out.splitlines()]
    for line in lines:
        text = b"".join(tokenizer.token_strings(enc)[token] for token in line["tokens"]).decode("utf-8", "replace")
        assert text.startswith(line["text"]) and len(line["tokens"]) == len(line["logprobs"]) and " t" not in line["text"]
        assert all(-math.inf < p <= 0 for p in line["logprobs"]) and line["prompt"] == "\x1b[31m 東"
        assert line["end"] in (STOP, END, LENGTH) and (line["end"] == STOP) == (" t" in text)
    assert len(lines) == 3 and STOP in {line["end"] for line in lines}


def test_after_any_end_the_text_can_be_continued(trained, enc):
    """What `after` keeps is the state of all tokens but the last, whether the text was stopped, full, or broken off."""
    for kind in ("length", "stop", "broken off", "nothing"):
        writing = Writing(trained, enc, "über", torch.device("cpu"), [0], None, ("r",) if kind == "stop" else (),
                          max_new_tokens=0 if kind == "nothing" else 50)
        for n, _ in enumerate(writing):
            if kind == "broken off" and n == 20:
                break
        after, (text,) = writing.after(), writing.texts
        if kind == "stop":
            assert text.end == STOP
        whole = [*writing.prompt, *text.tokens]
        with torch.no_grad():
            _, state = trained(torch.tensor([whole[:-1]]))
        assert after["token"] == whole[-1]
        for got, want in zip(after["state"], state, strict=True):
            assert torch.allclose(got, want, atol=1e-12)


# -------------------------------------------------------------------------------------------------------- conversations

def conversation(model, enc, **choice):
    return Conversation(model, enc, torch.device("cpu"), 7, **{**dict(max_new_tokens=12, temperature=0), **choice})


def test_a_conversation_is_one_text(trained, enc, capsys):
    """Greedy answers are those to the whole text so far, read from its beginning."""
    talk, tokens, before = conversation(trained, enc), [enc.eot_token], "\n"
    trained.head.weight.data[enc.eot_token] = 0         # so that it does not end by itself
    for line in ("the river", "über 東京", "", "/a", "x" * 300):
        talk.turn(line)
        said = capsys.readouterr().out
        new = ("" if before.endswith("\n") or not line else "\n") + (line + "\n" if line else "")
        tokens += tokenizer.encode(enc, new).tolist()
        made = [t.item() for t in trained.generate(torch.tensor([tokens]), 12, temperature=0)]
        tokens += made
        answer = b"".join(tokenizer.token_strings(enc)[t] for t in made).decode("utf-8", "replace")
        assert said.rstrip("\n") == printable(answer).rstrip("\n")
        before = answer or new
        assert all(h.shape == (1, 8, 16) for h in talk.before["state"])


def test_commands_of_a_conversation(trained, enc, tmp_path, capsys):
    talk, state = conversation(trained, enc, temperature=1.5), tmp_path / "a b.state"

    def say(line):
        talk.turn(line)
        return capsys.readouterr().out

    first = say("the river")
    assert talk.command(f"/save {state}") and "saved" in capsys.readouterr().out
    second = say("of a")
    assert talk.command(f"/load {state}") and say("of a") == second != first
    assert talk.command("/reset") and capsys.readouterr().out and say("the river") == first
    assert talk.command("/temp 0") and talk.choice["temperature"] == 0.0 and talk.command("/tokens 3")
    say("x")
    assert talk.command("/help") and "/save FILE" in capsys.readouterr().out
    kept = talk.before
    for wrong, message in (("/temp", "needs a number"), ("/temp hot", "needs a number"), ("/temp -1", "temperature must be"),
                           ("/temp nan", "temperature must be"), ("/tokens 1.5", "needs a number"), ("/tokens -1", "max_new"),
                           ("/save", "needs the name"), ("/load", "needs the name"), ("/load none", "does not exist"),
                           (f"/save {tmp_path}/none/x", "No such file"), ("/foo", "there is no /foo"), ("/", "there is no /")):
        with pytest.raises((ValueError, OSError), match=message):
            talk.command(wrong)
        assert talk.before is kept and talk.choice["temperature"] == 0.0
    assert not talk.command("/quit")
    with pytest.raises(ValueError, match="no text yet"):
        conversation(trained, enc).command(f"/save {tmp_path}/y")


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(trained, enc, monkeypatch, capsys):
    talk, generate = conversation(trained, enc, temperature=1.5), trained.generate

    def interrupted(*args, **options):
        for i, token in enumerate(generate(*args, **options)):
            if i == 5:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(trained, "generate", interrupted)
    talk.turn("the river")
    monkeypatch.undo()
    shown = capsys.readouterr().out
    with torch.no_grad():
        tokens = [enc.eot_token, *tokenizer.encode(enc, "the river\n").tolist()]
        made = [t.item() for t in generate(torch.tensor([tokens]), 5, 1.5, generator=torch.Generator().manual_seed(7))]
        _, state = trained(torch.tensor([tokens + made[:-1]]))
    assert talk.before["token"] == made[-1] and shown
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(talk.before["state"], state, strict=True))


def test_interactive_as_a_command(run20, tmp_path):
    lines = f"the river\n/save {tmp_path / 's'}\n\n/nonsense\n//x\n/load {tmp_path / 's'}\n/temp 0\nover\n/quit\nnever read\n"
    command = [sys.executable, str(ROOT / "sample.py"), "--checkpoint", str(run20[0] / "best.pt"), "--interactive",
               "--max_new_tokens", "9"]
    done = subprocess.run(command, input=lines.encode() + b"\xff\xfe", capture_output=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "s").exists(), done.stderr
    assert re.search(rb"sample.py: there is no /nonsense", done.stderr) and b"Traceback" not in done.stderr
    ended = subprocess.run(command, input=b"a\nb", capture_output=True, timeout=120)        # no /quit, no end of line
    assert ended.returncode == 0 and ended.stdout.count(b"\n") >= 2
    for options in (["--json"], ["--num_samples", "2"], ["--save-state", "x"]):
        refused = subprocess.run([*command, *options], input=b"", capture_output=True, timeout=120)
        assert refused.returncode and refused.stderr.count(b"\n") == 1 and b"--interactive is one text" in refused.stderr


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are for Unix")
def test_lines_can_be_edited_in_a_terminal(run20):
    """A letter taken back, a line called up again; Ctrl-C at the prompt does not end it, Ctrl-D does."""
    import pty
    import select
    pytest.importorskip("readline", reason="this Python has no readline")
    pid, fd = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)        # it may be ignored here, and a program inherits that
        os.execvpe(sys.executable, [sys.executable, str(ROOT / "sample.py"), "--checkpoint", str(run20[0] / "best.pt"),
                                    "--interactive", "--max_new_tokens", "2"], {**os.environ, "TERM": "xterm"})
    seen, until = "", time.monotonic() + 120

    def expect(what, n, key=b""):
        """Press a key, and wait until `what` has appeared n times. readline may miss a signal between two keys: it is sent again
        after some seconds."""
        nonlocal seen
        while seen.count(what) < n and time.monotonic() < until:
            os.write(fd, key)
            again = time.monotonic() + (3 if key == b"\x03" else 120)
            while seen.count(what) < n and time.monotonic() < again:
                if select.select([fd], [], [], 0.1)[0]:
                    seen += os.read(fd, 4096).decode("utf-8", "replace")
        assert seen.count(what) >= n, seen

    expect("> ", 1)
    expect("> ", 2, b"/temq\x7fp 0.5x\x7f\n")
    expect("> ", 3, b"/nonsense\n")
    expect("/nonsense", 3, b"\x1b[A")                   # the line before
    expect("> ", 4, b"\x03")
    os.write(fd, b"\x04")
    _, status = os.waitpid(pid, 0)
    os.close(fd)
    assert os.waitstatus_to_exitcode(status) == 0 and "Traceback" not in seen
    assert "there is no /nonsense" in seen and "needs a number" not in seen and seen.count("/nonsense") >= 3


@pytest.mark.slow
def test_any_lines_at_all(run20, monkeypatch, capsys, tmp_path):
    """Bytes of all sorts and commands with all sorts of words: an answer or one line, and the memory is never lost."""
    monkeypatch.chdir(tmp_path)
    g = random.Random(0)
    words = [b"/save", b"/load", b"/temp", b"/tokens", b"/reset", b"/help", b"//", b"/", b"/save s", b"/load s", b"/tokens 3"]
    lines, n = [b"/tokens 3"], 2000 if SLOW else 150
    for _ in range(n):
        word = g.choice(words) + b" " if g.random() < 0.5 else b""
        lines.append(word + raw_text(g, g.choice([0, 1, 9])).replace(b"\n", b"").replace(b"\r", b"")[:g.choice([3, 30, 200])])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), encoding="utf-8"))
    sample_py.main(["--checkpoint", str(run20[0] / "best.pt"), "--interactive", "--device", "cpu"])
    _, err = shown(capsys)
    assert err.count("sample.py: ") > 0.1 * n and all(len(line) < 500 for line in err.splitlines())
    survived("conversation", lines=n, refused=err.count("sample.py: "))
