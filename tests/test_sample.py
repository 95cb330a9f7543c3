"""sample.py: options, streaming, saved states, prompts of any bytes."""
import io
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch

import sample as sample_py
import train as train_py
from data import token_files, tokenizer
from data.messages import printable
from sampling.texts import Writing
from tests.helpers import ROOT, SLOW, raw_text, settings, shown, some_text, survived


def test_sample_command(run20, tmp_path):
    """As a user runs it: in a folder with the checkpoint and nothing else."""
    (tmp_path / "out").mkdir()
    shutil.copy(run20[0] / "best.pt", tmp_path / "out")
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--max_new_tokens", "8", "--prompt", "-"], cwd=tmp_path,
                          input="über 東京".encode(), capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0 and done.stdout.decode().startswith("über 東京"), done.stderr
    assert re.search(rb"\d tokens/s", done.stderr) and b"a test corpus" in done.stderr


def test_sample_ends_quietly_when_nobody_reads_on(run20):
    command = [sys.executable, str(ROOT / "sample.py"), "--checkpoint", str(run20[0] / "best.pt"), "--num_samples", "50"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace") as process:
        process.stdout.read(5)
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1 and "rror" not in said, said


def test_sample_options(run20, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        sample_py.main(["--device", "cpu", "--max_new_tokens", "8", *arguments])
        return capsys.readouterr().out

    with pytest.raises(SystemExit, match="python train.py makes one"):
        run()
    shutil.copytree(run20[0], tmp_path / "out")
    (tmp_path / "prompt.txt").write_text("über 東京", encoding="utf-8")
    assert run("--prompt", "über 東京") == run("--prompt", "FILE:prompt.txt") != run()
    assert run("--prompt", "caf\udce9 \x1b[31m").startswith("caf? \ufffd[31m")    # bytes of another encoding; a colour code
    assert run("--seed", "2") != run("--seed", "3") == run("--seed", "3")
    two = run("--num_samples", "2", "--seed", "2").split("-" * 20)
    assert [t.strip() for t in two] == [run("--seed", s).strip() for s in ("2", "3")]
    assert run("--max_new_tokens", "0", "--prompt", "x") == "x\n\n"
    (tmp_path / "out/best.pt").unlink()
    assert run() == run("--checkpoint", "out/last.pt")
    with pytest.raises(SystemExit):
        run("--top_q", "1")
    assert re.fullmatch("sample.py: error: .*--top_q.*\n", capsys.readouterr().err)
    for arguments, message in [(["--temperature", "-1"], "temperature"), (["--top_p", "2"], "top_p"), (["--top_k", "0"], "top_k"),
                               (["--max_new_tokens", "-5"], "max_new_tokens"), (["--prompt", "FILE:none"], "none"),
                               (["--checkpoint", "none.pt"], "none.pt"), (["--num_samples", "0"], "num_samples"),
                               (["--seed", "-1"], "seed")]:
        with pytest.raises(SystemExit, match=f"sample.py: error: .*{message}") as e:
            run(*arguments)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("mixer", ["memory", "mamba2", "attention"])
def test_a_saved_state_continues_as_if_never_stopped(mixer, corpus, tmp_path, capsys):
    """In pieces of 1, 9 and 30 tokens, each of which may end inside a character, and with a prompt in between."""
    train_py.train(settings(corpus, tmp_path / "out", max_steps=1, mixer=mixer, d_state=8))
    best, state = str(tmp_path / "out/best.pt"), str(tmp_path / "state.pt")
    capsys.readouterr()

    def run(*arguments, seed=0):
        sample_py.main(["--device", "cpu", "--checkpoint", best, "--temperature", "2", "--seed", str(seed), *map(str, arguments)])
        return capsys.readouterr().out

    whole, text, load = run("--prompt", "über", "--max_new_tokens", 40), "", ["--prompt", "über"]
    for n in (1, 9, 30):
        text += run(*load, "--max_new_tokens", n, "--save-state", state)[:-2]            # but for the two line ends
        load = ["--load-state", state]
    cut = "\N{REPLACEMENT CHARACTER}"                  # where a piece ended inside a character there is one too many
    assert text.replace(cut, "") == whole[:-2].replace(cut, "") and len(whole) > 20
    saved = (tmp_path / "state.pt").read_bytes()
    assert run(*load, "--prompt", "東", "--max_new_tokens", 5).startswith("東")
    assert (tmp_path / "state.pt").read_bytes() == saved                        # reading it does not change it
    (tmp_path / "cut.pt").write_bytes(saved[:900])
    train_py.train(settings(corpus, tmp_path / "other", max_steps=1, mixer=mixer, d_state=8, seed=5))
    for arguments, message in [(["--load-state", tmp_path / "cut.pt"], "cannot be read"),
                               (["--load-state", best], "not written by"),
                               (["--load-state", tmp_path / "no.pt"], "sample.py --save-state makes one"),
                               (["--save-state", state, "--num_samples", 2], "one text"),
                               (["--load-state", state, "--checkpoint", tmp_path / "other/best.pt"], "another model")]:
        with pytest.raises(SystemExit, match=f"sample.py: error: .*{message}") as e:
            run(*arguments)
        assert "\n" not in str(e.value)


def test_a_character_is_never_cut(corpus):
    """A model that says given bytes one token at a time: characters appear whole, what is no UTF-8 as U+FFFD."""
    enc = tokenizer.load_tokenizer(token_files.load(corpus)[2])
    said = "é東🙂".encode() + b"\xff" + b"a\x1b[2J"

    class Parrot:
        def generate(self, tokens, *_, **__):
            return (torch.tensor([enc.encode_single_token(bytes([b]))]) for b in said)

    writing, shown = Writing(Parrot(), enc, "", "cpu", [0]), ""
    for b, (_, piece) in zip(said, writing, strict=False):
        assert "\ufffd" not in piece or b in (0xff, 0x61), piece
        shown += printable(piece)
    assert shown == "é東🙂\ufffda\ufffd[2J" and writing.count == len(said)


@pytest.mark.slow
def test_any_prompt_is_answered(run20, tmp_path, capsys, monkeypatch):
    """Any bytes, by file and by pipe, and lone surrogates, as the shell hands on what is no UTF-8."""
    g, n, answered = random.Random(0), 1000 if SLOW else 60, 0
    start = ["--checkpoint", str(run20[0] / "best.pt"), "--max_new_tokens", "3", "--device", "cpu"]
    for i in range(n):
        raw = raw_text(g, g.choice([0, 1, 30, 1000]))
        (tmp_path / "prompt").write_bytes(raw)
        if i % 3 == 0:
            prompt = f"FILE:{tmp_path / 'prompt'}"
        elif i % 3 == 1:
            prompt = "-"
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        else:
            prompt = os.fsdecode(raw.replace(b"\0", b""))
            if prompt == "-" or prompt.startswith(("FILE:", "-")):
                continue
        sample_py.main([*start, f"--prompt={prompt}", "--seed", str(i)])
        out, err = shown(capsys)
        assert "trained on a test corpus" in err and len(out) >= 1     # if the text does not end at once, also how fast
        answered += 1
    assert answered > 0.9 * n
    survived("prompts", prompts=answered)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "spaces", "one letter", "any bytes", "no spaces"])
def test_long_prompts(kind, run20, tmp_path, capsys):
    """Ten megabytes; 200 KB where FMEM_SLOW is not set."""
    size = 10**7 if SLOW else 2 * 10**5
    text = {"text": some_text(2000), "spaces": " ", "one letter": "a", "no spaces": "東京1905x"}.get(kind, "")
    raw = random.Random(0).randbytes(size) if kind == "any bytes" else (text * (size // len(text.encode()) + 1)).encode()[:size]
    (tmp_path / "prompt").write_bytes(raw + b"!" * (kind == "spaces"))
    prompt = f"--prompt=FILE:{tmp_path / 'prompt'}"
    sample_py.main(["--checkpoint", str(run20[0] / "best.pt"), "--max_new_tokens", "3", prompt])
    out, err = shown(capsys)
    assert "tokens/s" in err and len(out) > size / 5
    survived(f"long_prompt_{kind.replace(' ', '_')}", bytes=size)
