"""sample.py: prompts, streaming, batches, saved states, conversations, invalid input."""

import codecs
import functools
import io
import shutil
import signal
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
import tiktoken
import torch

import fmem
import sample
from data import tokenizer
from lab.layers import Attention, ExtendedMemory, Mamba2

RANKS = tokenizer.train_bpe(["the river über the sea, the river 東京 " * 20], 280)
SPECIAL = {tokenizer.EOT: len(RANKS)}
ENC = tiktoken.Encoding(
    "small", pat_str=tokenizer.GPT2_PATTERN, mergeable_ranks=RANKS, special_tokens=SPECIAL
)
LAYERS = {  # their states differ: a tensor, a tuple with None, one that grows, two tensors
    "memory": {},
    "extended": dict(layer=ExtendedMemory, layer_arguments=dict(conv=3, shift=True)),
    "attention": dict(layer=Attention, layer_arguments=dict(n_head=2)),
    "mamba2": dict(layer=Mamba2, layer_arguments=dict(d_state=8)),
}


def random_model(seed=0, ends=False, **layer):
    """A model that writes all sorts of bytes, depending on its state, and EOT only if it `ends`."""
    torch.manual_seed(seed)
    size = dict(n_layer=2, d_model=16, n_rows=8, k_rows=2, tie_embeddings=False)
    model = fmem.FMem(fmem.FMemConfig(ENC.n_vocab, **size), **layer).eval()
    with torch.no_grad():
        model.embed.weight *= 16
        for block in model.blocks:
            block.memory.W_o.weight *= 2  # so that the state matters
        model.head.weight *= 8
        model.head.weight[ENC.eot_token] *= 2 if ends else 0
    return model.double()


def script(monkeypatch, tokens):
    """Force these tokens, whatever the model predicts. The id of a single byte is its value."""

    def choose(logits, *arguments, **options):
        if tokens[0] is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
            del tokens[0]
        return torch.tensor([tokens.pop(0)])

    monkeypatch.setattr(fmem, "sample", choose)


@pytest.fixture
def write(tmp_path, monkeypatch, capsys):
    """write(*arguments, model=...) -> what sample.py prints, without the last newline.

    The model computes in float64, so that summation order does not change a token.
    """
    monkeypatch.chdir(tmp_path)
    about = {"tokenizer": tokenizer.dump_tokenizer(ENC), "corpus": "a test corpus"}

    def write(*arguments, model=None):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            if "--checkpoint" not in arguments:
                patch.setattr(fmem, "load", lambda path, device: (model or random_model(), about))
            sample.main(["--device", "cpu", *map(str, arguments)])
        out, write.err = capsys.readouterr()
        return out.removesuffix("\n")

    return write


@pytest.fixture
def refused(write, capsys):
    """refused(*arguments, code=1) -> the one-line error of sample.py."""

    def refused(*arguments, code=1, **options):
        with pytest.raises(SystemExit) as end:
            write(*arguments, **options)
        out, err = capsys.readouterr()
        message = end.value.code  # from sys.exit; argparse prints its own and exits with 2
        if code == 2:
            assert message == 2
            message = err.removesuffix("\n")
        assert message.startswith("sample.py: error: ") and message.isprintable() and out == ""
        return message

    return refused


def test_last_is_used_without_best_and_a_closed_pipe_ends_it_quietly(run, tmp_path):
    shutil.copytree(run, tmp_path / "out", ignore=shutil.ignore_patterns("best.pt"))
    command = [sys.executable, sample.__file__, "--max_new_tokens", "100000", "--temperature", "0"]
    with Popen(command, cwd=tmp_path, stdout=PIPE, stderr=PIPE) as process:
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read().count(b"\n") == 1  # the line about the checkpoint
    assert process.returncode == 1


def test_prompt_from_argument_file_and_standard_input(write, refused, monkeypatch):
    raw = "\ufeffüber 東京".encode()  # the byte-order mark is not part of the prompt
    Path("prompt.txt").write_bytes(raw)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    want = write("--prompt", "über 東京", "--max_new_tokens", 30)
    assert want.startswith("über 東京") and len(want) > 20
    for prompt in ("\ufeffüber 東京", "FILE:prompt.txt", "-"):
        assert write("--prompt", prompt, "--max_new_tokens", 30) == want
    Path("latin").write_bytes(b"caf\xe9!")
    for prompt in ("FILE:latin", "caf\udce9!"):  # as Python gets it from the command line
        assert write("--prompt", prompt, "--max_new_tokens", 0) == "caf\ufffd!"
    Path("utf16").write_bytes(codecs.BOM_UTF16_LE + b"a\0b\0")
    assert "UTF-16" in refused("--prompt", "FILE:utf16")


def test_control_characters_are_replaced_only_on_a_terminal(write, monkeypatch):
    """No-break and ideographic spaces, joiners and CR reach a file. No ESC reaches a terminal."""
    prompt = "a\u00a0b\u3000c\u200cd\u200de\rf\x1b[31m\n\t"
    assert write("--prompt", prompt, "--max_new_tokens", 0) == prompt
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = write("--prompt", prompt, "--max_new_tokens", 0)
    assert "\x1b" not in shown and shown.startswith("a\u00a0b\u3000c\u200cd\u200de")


def test_text_is_streamed_in_whole_characters(write, monkeypatch):
    to_come = [*"é東".encode(), *b"\xff!\xe6"]
    script(monkeypatch, to_come)
    shown = []
    monkeypatch.setattr(sample, "show", lambda string: shown.append((string, len(to_come))))
    write("--max_new_tokens", 8, "--prompt", "ü")
    assert shown[:6] == [("ü", 8), ("", 7), ("é", 6), ("", 5), ("", 4), ("東", 3)]
    assert shown[6:] == [("\ufffd", 2), ("!", 1), ("", 0), ("\ufffd", 0), ("\n", 0)]


def test_sampling_options(write):
    length = ["--max_new_tokens", 20]
    text = write(*length)
    for option, value in (("--seed", 1), ("--temperature", 2), ("--top_p", 0.3), ("--top_k", 2)):
        assert write(*length, option, value) != text
    assert write(*length, "--seed", 1337) == text


def test_each_sample_is_the_same_as_alone(write):
    """Some end early, and the others continue."""
    options = ["--prompt", "über 東京", "--temperature", 1.5, "--max_new_tokens", 50]
    model = random_model(ends=True)
    several = write(*options, "--seed", 5, "--num_samples", 5, model=model)
    alone = [write(*options, "--seed", 5 + i, model=model) for i in range(5)]
    assert several == ("\n" + "-" * 20 + "\n").join(alone)
    assert len(min(alone, key=len)) < 15 and len(max(alone, key=len)) > 25


@pytest.mark.parametrize("layer", LAYERS)
def test_saved_state_continues_as_if_never_stopped(layer, write):
    """First only the prompt, then 1, 9 and 30 tokens, some of which end inside a character."""
    model = random_model(**LAYERS[layer])
    start = ["--prompt", "über", "--seed", 3]
    whole = write(*start, "--max_new_tokens", 40, model=model)
    save = ["--save_state", "new/folder/s"]
    load = ["--load_state", "new/folder/s"]
    pieces = write(*start, *save, "--max_new_tokens", 0, model=model)
    for count in (1, 9):
        pieces += write(*load, *save, "--max_new_tokens", count, model=model)
    pieces += write(*load, "--max_new_tokens", 30, model=model)
    assert pieces == whole and len(whole) > 25


def test_incomplete_character_in_a_saved_state(write, monkeypatch):
    script(monkeypatch, [*"é東東".encode()])
    assert write("--max_new_tokens", 3, "--save_state", "s") == "é"
    assert write("--max_new_tokens", 3, "--load_state", "s", "--save_state", "s") == "東"
    assert write("--max_new_tokens", 0, "--load_state", "s", "--prompt", "x") == "\ufffdx"


def test_new_seed_overrides_the_saved_generator(write):
    write("--save_state", "s", "--max_new_tokens", 5)
    load = ["--load_state", "s", "--max_new_tokens", 20]
    text = write(*load)
    assert write(*load) == text != write(*load, "--seed", 1337) != write(*load, "--seed", 8)


def test_files_that_are_not_a_state_of_this_model_are_refused(write, refused, run):
    write("--save_state", "s", "--max_new_tokens", 5)
    Path("cut").write_bytes(Path("s").read_bytes()[:900])
    Path("empty").write_bytes(b"")
    flipped = bytearray(Path("s").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    Path("flipped").write_bytes(flipped)
    for name in ("cut", "empty", "flipped", "none", run / "last.pt"):
        assert str(name) in refused("--load_state", name)
    assert "another model" in refused("--load_state", "s", model=random_model(seed=1))


def test_save_state_overwrites_no_other_file(write, refused):
    torch.save({"format": fmem.FORMAT}, "model")
    before = Path("model").read_bytes()
    refused("--save_state", "model")
    assert Path("model").read_bytes() == before


def test_full_disk_keeps_the_old_state(write, tmp_path, monkeypatch, capsys):
    write("--save_state", "s", "--max_new_tokens", 5)
    before = Path("s").read_bytes()

    def full(path, content):
        path.open("wb").close()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit, match="sample.py: error: No space left on device"):
        write("--save_state", "s", "--max_new_tokens", 6)
    assert Path("s").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_conversation_is_one_text(write, monkeypatch):
    """Answers end within a line, at its end, inside a character, at EOT, and by Ctrl-C."""
    lines = ["/quit", "", "über", "sea", "東京", ""]
    forced = [*b"abc", *b"de\n", *b"fg\xc3", *b"h", ENC.eot_token]
    script(monkeypatch, [*forced, KeyboardInterrupt, *b"i", KeyboardInterrupt, *b"jklm"])
    stdin = io.TextIOWrapper(io.BytesIO("\n".join([*lines, ""]).encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    write("--prompt", "the river", "--max_new_tokens", 0, "--save_state", "s")
    options = ["--load_state", "s", "--save_state", "s", "--max_new_tokens", 3]
    out = write("--interactive", "--prompt", "/* no command", *options)
    assert out == "abc\nde\n\nfg\nh\ni\nj\nklm"

    tokens = [ENC.eot_token, *ENC.encode("the river"), *ENC.encode("\n/* no command\n"), *b"abc"]
    tokens += [*ENC.encode("\n/quit\n"), *b"de\n", *b"fg\xc3", *ENC.encode("\nüber\n"), *b"h"]
    tokens += [ENC.eot_token, *ENC.encode("sea\n"), *b"i", *ENC.encode("\n東京\n"), *b"jklm"]
    saved = sample.read_saved("s")
    assert saved["unread"] == tokens[-1:]
    _, state = random_model()(torch.tensor([tokens[:-1]]))
    torch.testing.assert_close(saved["state"], state)  # to 1e-7, since sums differ in order


def test_ctrl_c_ends_the_program_and_reports_the_unsaved_state(write, monkeypatch):
    script(monkeypatch, [*b"ab", KeyboardInterrupt])
    with pytest.raises(SystemExit, match="no state was written"):
        write("--save_state", "s")
    assert not Path("s").exists()


WRONG = """--top_q 1 | --temp 1 | --seed x\x1b[31m | --max_new_tokens -5 | --num_samples 0
| --num_samples 2 --interactive | --num_samples 2 --save_state s | --num_samples 2 --load_state s"""


@pytest.mark.parametrize("arguments", WRONG.split("|"), ids=str.strip)
def test_invalid_command_line_gives_a_one_line_error(arguments, refused):
    arguments = arguments.split()
    assert arguments[0] in refused(*arguments, code=2)


def test_invalid_values_and_files_give_a_one_line_error(refused, run):
    for option, value in (("--top_p", 2), ("--temperature", "nan"), ("--top_k", 0)):
        assert option[2:] in refused(option, value)
    refused("--device", "abacus")
    refused("--threads", 0)
    refused("--checkpoint", "none.pt")
    recall = torch.load(run / "best.pt") | {"tokenizer": None, "corpus": "recall of 8"}
    torch.save(recall, "recall.pt")
    assert "recall of 8, which is not text" in refused("--checkpoint", "recall.pt")


def test_only_the_step_is_compiled(write, monkeypatch):
    shapes = set()

    def backend(graph, inputs):
        shapes.update(part.shape for part in inputs if part.dtype == torch.long)
        return graph.forward

    options = ["--prompt", "the river", "--num_samples", 2, "--max_new_tokens", 20]
    want = write(*options)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    assert write(*options, "--compile") == want
    assert shapes == {(2,)}
