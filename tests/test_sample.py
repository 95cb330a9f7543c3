"""sample.py: prompts, streaming, samples side by side, saved states, conversations, refusals."""

import codecs
import dataclasses
import errno
import functools
import io
import os
import random
import re
import subprocess
import sys

import pytest
import tiktoken
import torch

import fmem
import sample
from data import tokenizer
from lab.layers import Attention, ExtendedMemory, Mamba2

LINE = "\n" + "-" * 20 + "\n"  # between two samples
LAYERS = {
    "memory": (fmem.FactorizationMemory, {}),
    "extended": (ExtendedMemory, dict(conv=3, shift=True)),
    "attention": (Attention, dict(n_head=2)),
    "mamba2": (Mamba2, dict(d_state=8)),
}
RANKS = tokenizer.train_bpe(["the river über the sea, the river 東京 " * 20], 280)
ENC = tiktoken.Encoding(
    "small",
    pat_str=tokenizer.GPT2_PATTERN,
    mergeable_ranks=RANKS,
    special_tokens={tokenizer.EOT: len(RANKS)},
)
BYTES_OF = tokenizer.token_bytes(ENC)
CYCLE = "é東🙂".encode() + b"\xffa\n"  # no byte twice


def random_model(layer="memory", seed=0, end_logit=-20.0):
    """A model that says all sorts of bytes, as its state has it, and EOT with a fixed logit."""
    torch.manual_seed(seed)
    kind, arguments = LAYERS[layer]
    size = dict(n_layer=2, d_model=16, n_rows=8, k_rows=2, tie_embeddings=False)
    model = fmem.FMem(fmem.FMemConfig(ENC.n_vocab, **size), kind, arguments).eval()
    with torch.no_grad():
        model.embed.weight *= 16
        model.embed.weight[:, 0] = 1  # and no layer adds to it
        for block in model.blocks:
            block.memory.W_o.weight *= 2  # what the state says counts
            block.memory.W_o.weight[0] = 0
            block.mlp.W_down.weight[0] = 0
        model.head.weight *= 8
        model.head.weight[ENC.eot_token] = 0
        model.head.weight[:, 0] = 0
        model.head.weight[ENC.eot_token, 0] = end_logit
    return model.double()


def parrot(end=None):
    """A model that says the bytes of CYCLE again and again, or EOT after the byte `end`."""
    size = dict(n_layer=1, d_model=64, n_rows=4, k_rows=2, tie_embeddings=False)
    model = fmem.FMem(fmem.FMemConfig(ENC.n_vocab, **size))
    tokens = [ENC.encode_single_token(bytes([byte])) for byte in CYCLE]
    with torch.no_grad():
        model.embed.weight *= 1000  # what the blocks add does not count
        model.head.weight.zero_()
        for token, following in zip([ENC.eot_token, *tokens], [*tokens, tokens[0]], strict=True):
            following = ENC.eot_token if BYTES_OF[token] == end else following
            model.head.weight[following] += model.embed.weight[token]
    return model


def save_checkpoint(path, model, **changes):
    checkpoint = {
        "format": fmem.FORMAT,
        "config": dataclasses.asdict(model.config),
        "layer": model.layer_name,
        "layer_arguments": model.layer_arguments,
        "model": model.state_dict(),
        "tokenizer": tokenizer.dump_tokenizer(ENC),
        "corpus": "a test corpus",
        "step": 7,
    }
    torch.save({**checkpoint, **changes}, path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for layer in LAYERS:
        save_checkpoint(folder / f"{layer}.pt", random_model(layer))
        save_checkpoint(folder / f"{layer}-ends.pt", random_model(layer, end_logit=4.5))
    save_checkpoint(folder / "other.pt", random_model(seed=1))
    save_checkpoint(folder / "parrot.pt", parrot())
    save_checkpoint(folder / "parrot-ends.pt", parrot(end=b"a"))
    return folder


@pytest.fixture
def run(checkpoints, tmp_path, monkeypatch, capsys):
    """run(*arguments, model="memory") -> what sample.py prints, without the last line end.

    The model computes in float64, in which sums in another order choose no other token. run.err:
    what is written to stderr.
    """
    load = fmem.load

    def load_double(path, device):
        model, checkpoint = load(path, device)
        return model.double(), checkpoint

    monkeypatch.setattr(fmem, "load", load_double)
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model="memory"):
        capsys.readouterr()
        checkpoint = str(checkpoints / f"{model}.pt")
        sample.main(["--checkpoint", checkpoint, "--device", "cpu", *map(str, arguments)])
        out, run.err = capsys.readouterr()
        assert "a test corpus" in run.err
        return out.removesuffix("\n")

    return run


@pytest.fixture
def refused(run, capsys):
    """refused(*arguments, code=1) -> the one line that sample.py ends with, beside its first."""

    def refused(*arguments, code=1, **options):
        with pytest.raises(SystemExit) as end:
            run(*arguments, **options)
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if "a test corpus;" not in line]
        assert end.value.code == code and out == "" and len(lines) == 1
        assert lines[0].startswith("sample.py: error: ") and lines[0].isprintable()
        return lines[0]

    return refused


# --------------------------------------------------------------------------- prompts and output


def test_as_a_command_in_a_folder_with_nothing_but_the_checkpoint(checkpoints, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/best.pt").write_bytes((checkpoints / "memory.pt").read_bytes())
    arguments = [sys.executable, sample.__file__, "--max_new_tokens", "8", "--prompt", "-"]
    prompt = "über 東京\r\n".encode()
    done = subprocess.run(arguments, cwd=tmp_path, input=prompt, capture_output=True, timeout=100)
    assert done.returncode == 0 and done.stdout.startswith(prompt), done.stderr
    assert re.search(rb"best.pt: step 7, a test corpus.*\n\d+ tokens/s", done.stderr)


def test_it_ends_quietly_when_nobody_reads_on(checkpoints):
    arguments = ["--checkpoint", checkpoints / "parrot.pt", "--max_new_tokens", "100000"]
    command = [sys.executable, sample.__file__, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read().count(b"\n") == 1  # the line about the checkpoint
    assert process.returncode == 1


def test_best_is_taken_and_else_last(run, tmp_path, checkpoints, capsys):
    (tmp_path / "out").mkdir()
    for file, model in (("last.pt", "other"), ("best.pt", "memory")):
        want = run("--max_new_tokens", 20, model=model)
        (tmp_path / "out" / file).write_bytes((checkpoints / f"{model}.pt").read_bytes())
        sample.main(["--device", "cpu", "--max_new_tokens", "20"])
        assert capsys.readouterr().out == want + "\n"


def test_prompts_as_text_file_and_standard_input(run, tmp_path, monkeypatch):
    raw = "\ufeffüber 東京".encode()  # a byte-order mark is no part of it
    (tmp_path / "prompt.txt").write_bytes(raw)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    want = run("--prompt", "über 東京", "--max_new_tokens", 30)
    assert want.startswith("über 東京") and len(want) > 20
    for prompt in ("\ufeffüber 東京", "FILE:prompt.txt", "-"):
        assert run("--prompt", prompt, "--max_new_tokens", 30) == want


def test_what_is_no_utf8_in_a_prompt(run, refused, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9!")
    for prompt in ("FILE:latin", "caf\udce9!"):  # as Python has it from the command line
        assert run("--prompt", prompt, "--max_new_tokens", 0) == "caf\ufffd!"
    for bom in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        (tmp_path / "utf16").write_bytes(bom + b"a\0b\0")
        assert "UTF-16" in refused("--prompt", "FILE:utf16")


def test_only_a_terminal_is_protected_from_characters(run, monkeypatch):
    """No-break and ideographic spaces, joiners and CR reach a file; no terminal gets an ESC."""
    prompt = "a\u00a0b\u3000c\u200cd\u200de\rf\x1b[31m\n\t"
    assert run("--prompt", prompt, "--max_new_tokens", 0) == prompt
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = run("--prompt", prompt, "--max_new_tokens", 0)
    assert "\x1b" not in shown and shown.startswith("a\u00a0b\u3000c\u200cd\u200de")


def test_text_is_shown_as_it_is_generated_and_characters_whole(run, monkeypatch):
    events = []

    def note(function, event=None):
        def noted(*arguments, **options):
            events.append(event or arguments[0])
            return function(*arguments, **options)

        return noted

    monkeypatch.setattr(sample, "show", note(sample.show))
    monkeypatch.setattr(fmem, "sample", note(fmem.sample, "token"))
    run("--max_new_tokens", 5, model="parrot")
    assert events[:2] == ["token", ""]  # the options are tried out; there is no prompt
    assert events[2:8] == ["token", "", "token", "é", "token", ""]
    assert events[8:] == ["token", "", "token", "東", "\n"]


def test_what_never_becomes_a_character(run):
    assert run("--max_new_tokens", 24, model="parrot") == 2 * "é東🙂\ufffda\n"
    assert run("--max_new_tokens", 3, model="parrot") == "é\ufffd"


def test_choices(run):
    options = ["--max_new_tokens", 30]
    greedy = run("--temperature", 0, *options)
    text = run(*options)
    assert run("--top_k", 1, *options) == run("--top_p", 1e-9, *options) == greedy != text
    assert run("--seed", 1337, *options) == text != run("--seed", 1338, *options)
    assert run("--temperature", 2, *options) != text != run("--top_p", 0.5, *options)


def test_threads(run):
    run("--max_new_tokens", 1, "--threads", 2)
    assert torch.get_num_threads() == 2
    run("--max_new_tokens", 1)
    assert torch.get_num_threads() == 1


# ------------------------------------------------------------------------------- several samples


@pytest.mark.parametrize("layer", LAYERS)
def test_each_sample_is_what_it_is_alone(layer, run):
    """Some end early, the others go on. With a prompt, without one, and after a saved state."""
    options = ["--temperature", 1.5, "--max_new_tokens", 50]
    model = f"{layer}-ends"
    run("--save_state", "s", "--max_new_tokens", 9, model=model)
    lengths = []
    for start in ([], ["--prompt", "über 東京"], ["--load_state", "s", "--prompt", "x"]):
        several = run(*start, *options, "--seed", 5, "--num_samples", 5, model=model).split(LINE)
        assert several == [run(*start, *options, "--seed", 5 + i, model=model) for i in range(5)]
        assert len(set(several)) > 3
        lengths += [len(text.encode("utf-8", "replace")) for text in several]
    assert min(lengths) < 40 and max(lengths) > 60


def test_a_text_ends_at_its_end(run):
    assert run("--max_new_tokens", 100, model="parrot-ends") == "é東🙂\ufffda"


# ---------------------------------------------------------------------------------- saved states


def same(a, b):
    """Whether two states are equal, bit for bit."""
    if isinstance(a, (list, tuple)):
        return all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("layer", LAYERS)
def test_a_saved_state_continues_as_if_never_stopped(layer, run, tmp_path):
    """In pieces of 1, 9 and 30 tokens, which end inside characters too."""
    start = ["--prompt", "über", "--seed", 3]
    later = ["--load_state", "s"]
    whole = run(*start, "--max_new_tokens", 40, model=layer)
    pieces = run(*start, "--max_new_tokens", 1, "--save_state", "s", model=layer)
    pieces += run(*later, "--max_new_tokens", 9, "--save_state", "s", model=layer)
    saved = (tmp_path / "s").read_bytes()
    pieces += run(*later, "--max_new_tokens", 30, model=layer)
    assert pieces == whole and len(whole) > 25
    assert (tmp_path / "s").read_bytes() == saved  # reading it does not change it
    run(*start, "--max_new_tokens", 10, "--save_state", "t", model=layer)
    assert same(sample.read_saved("t")["state"], sample.read_saved("s")["state"])


def test_a_prompt_can_be_read_now_and_continued_later(run):
    whole = run("--prompt", "the river", "--max_new_tokens", 30)
    start = run("--prompt", "the river", "--max_new_tokens", 0, "--save_state", "s")
    assert start + run("--load_state", "s", "--max_new_tokens", 30) == whole


def test_a_half_character_in_a_saved_state(run):
    assert run("--max_new_tokens", 3, "--save_state", "s", model="parrot") == "é"
    load = ["--load_state", "s", "--max_new_tokens", 5]
    assert run(*load, "--num_samples", 3, model="parrot").split(LINE) == 3 * ["東\ufffd"]
    assert run(*load, "--prompt", "x", model="parrot").startswith("\ufffdx")  # it stays a half


def test_a_new_seed_after_a_saved_state_is_obeyed(run):
    run("--save_state", "s", "--max_new_tokens", 5)
    load = ["--load_state", "s", "--max_new_tokens", 20]
    texts = [run(*load), run(*load, "--seed", 8), run(*load, "--seed", 1337)]
    assert len(set(texts)) == 3
    assert run(*load, "--seed", 8) == texts[1]


def test_files_that_are_no_state_of_this_model(run, refused, checkpoints, tmp_path):
    run("--save_state", "s", "--max_new_tokens", 5)
    saved = sample.read_saved("s")
    h = saved["state"][0]
    changes = {
        "wide": dict(state=[torch.cat([h, h], -1)] * 2),
        "two texts": dict(state=[torch.cat([h, h])] * 2),
        "one layer": dict(state=[h]),
        "float32": dict(state=[h.float()] * 2),
        "no state": dict(state=5),
        "large token": dict(token=ENC.n_vocab),
        "no token": dict(token="a"),
        "half": dict(half_character="x"),
        "gpu": dict(generator=torch.zeros(16, dtype=torch.uint8)),
    }
    for name, change in changes.items():
        torch.save({**saved, **change}, tmp_path / name)
    (tmp_path / "cut").write_bytes((tmp_path / "s").read_bytes()[:900])
    (tmp_path / "empty").write_bytes(b"")
    for name in ("cut", "empty", "none", *changes, checkpoints / "memory.pt"):
        assert str(name) in refused("--load_state", name)
    assert "another model" in refused("--load_state", "s", model="other")
    assert "--seed" in refused("--load_state", "gpu")
    new = ["--seed", 1, "--max_new_tokens", 5]
    assert run("--load_state", "gpu", *new) == run("--load_state", "s", *new)


def test_damaged_states_are_refused_or_the_same(run, tmp_path, capsys):
    run("--save_state", "s", "--max_new_tokens", 5)
    options = ["--max_new_tokens", 5, "--load_state"]
    want = run(*options, "s")
    whole = (tmp_path / "s").read_bytes()
    rng = random.Random(0)
    same = 0
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / "d").write_bytes(damaged)
        try:
            assert run(*options, "d") == want
            same += 1  # padding, or a field of the archive that nothing reads
        except SystemExit:
            assert re.search(r"\nsample.py: error: [^\n]+\n$", capsys.readouterr().err)
    assert same < 20


def test_no_other_file_is_replaced(run, refused, tmp_path, checkpoints):
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / "model").write_bytes((checkpoints / "memory.pt").read_bytes())
    for name in ("thesis", "model"):
        before = (tmp_path / name).read_bytes()
        refused("--save_state", name)
        assert (tmp_path / name).read_bytes() == before
    run("--save_state", "new/folder/s", "--max_new_tokens", 5)
    os.link("new/folder/s", "link")
    before = (tmp_path / "link").read_bytes()
    run("--save_state", "new/folder/s", "--max_new_tokens", 6)  # one of ours is, by another file
    assert (tmp_path / "link").read_bytes() == before != (tmp_path / "new/folder/s").read_bytes()


def test_a_full_disk_leaves_the_old_state(run, tmp_path, monkeypatch, capsys):
    run("--save_state", "s", "--max_new_tokens", 5)
    before = (tmp_path / "s").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="1"):
        run("--save_state", "s", "--max_new_tokens", 6)
    assert re.search("\nsample.py: error: .*No space left on device\n$", capsys.readouterr().err)
    assert (tmp_path / "s").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def interrupt(monkeypatch, after):
    """Ctrl-C when `after` tokens have been chosen, once."""
    choose = fmem.sample
    count = -1  # the first choice is the check of the options

    def choose_or_stop(*arguments, **options):
        nonlocal count
        count += 1
        if count == after + 1:
            raise KeyboardInterrupt
        return choose(*arguments, **options)

    monkeypatch.setattr(fmem, "sample", choose_or_stop)


def test_ctrl_c_ends_the_program_and_says_what_is_not_saved(run, tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, after=5)
    with pytest.raises(SystemExit, match="130"):
        run("--save_state", "s")
    assert "s is not written" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------------------------- conversations


@pytest.fixture
def talk(run, monkeypatch):
    """talk(lines, *options) -> the answers to lines of standard input, one string."""

    def talk(lines, *options, model="memory"):
        raw = "".join(line or "\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))
        return run("--interactive", "--max_new_tokens", 12, *options, model=model) + "\n"

    return talk


def answers(lines, stopped=None, **options):
    """What `talk` gives if each answer is to the whole text so far, read from its beginning.

    stopped: {number of a line: tokens of its answer, which Ctrl-C ended}.
    """
    model = random_model(**options)
    choice = dict(temperature=0.8, top_p=0.95, generator=torch.Generator().manual_seed(1337))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    tokens = [ENC.eot_token]
    said = ""
    for i, line in enumerate(lines):
        if line and tokens[-1] != ENC.eot_token and not BYTES_OF[tokens[-1]].endswith(b"\n"):
            line = "\n" + line
        decoder.decode(line.encode())
        tokens += tokenizer.encode(ENC, line).tolist()
        count = stopped[i] if stopped and i in stopped else 12
        for new in model.generate(torch.tensor([tokens]), count, **choice):
            tokens.append(new.item())
            ended = tokens[-1] == ENC.eot_token
            said += decoder.decode(BYTES_OF[new], final=ended)
            if ended:
                break
        said += "\n"
    return said


def test_a_conversation_is_one_text(talk):
    lines = ["the river\n", "", "/* not a command\n", "über 東京\n", "", "/quit\n", "", ""]
    assert talk(lines) == answers(lines)
    assert talk(lines, model="memory-ends") == answers(lines, end_logit=4.5) != answers(lines)


def test_a_conversation_begins_with_the_prompt_or_a_saved_state(run, talk):
    assert talk(["sea\n"], "--prompt", "the river") == answers(["the river\n", "sea\n"])
    run("--prompt", "the river\n", "--max_new_tokens", 12, "--save_state", "s")
    both = answers(["the river\n", "sea\n"])
    last = talk(["sea\n"], "--load_state", "s")
    assert both.endswith(last) and len(last) > 5


def test_ctrl_c_ends_an_answer_and_no_memory_is_lost(talk, monkeypatch):
    lines = ["the river\n", "sea\n", "the\n", ""]
    whole = answers(lines)
    for after in (0, 5):
        with monkeypatch.context() as patch:
            interrupt(patch, after)
            stopped = talk(lines)
        assert stopped == answers(lines, {0: after}) != whole


# --------------------------------------------------------------------------------------- refusals

WRONG = """--top_q 1 | --temp 1 | --seed x\x1b[31m | --seed -1 | --seed 9223372036854775808
| --top_p 2 | --temperature -1 | --temperature nan | --top_k 0 | --max_new_tokens -5
| --num_samples 0 | --threads 0 | --interactive --num_samples 2 | --interactive --save_state s
| --interactive --prompt - | --save_state s --num_samples 2"""


@pytest.mark.parametrize("arguments", WRONG.split("|"), ids=str.strip)
def test_a_wrong_command_line_is_one_line(arguments, refused):
    arguments = arguments.split()
    assert arguments[0] in refused(*arguments, code=2)


def test_what_cannot_be_used_is_one_line(refused, run, tmp_path):
    refused("--prompt", "FILE:none")
    refused("--checkpoint", "none.pt")
    refused("--device", "abacus")
    (tmp_path / "text.pt").write_text("no checkpoint")
    refused("--checkpoint", "text.pt")
    save_checkpoint(tmp_path / "recall.pt", random_model(), tokenizer=None, corpus="recall of 8")
    assert "recall of 8, which is not text" in refused("--checkpoint", "recall.pt")
    fields = tokenizer.dump_tokenizer(ENC)
    fields["special_tokens"] = {tokenizer.EOT: ENC.n_vocab + 5}
    save_checkpoint(tmp_path / "mixed.pt", random_model(), tokenizer=fields)
    refused("--checkpoint", "mixed.pt")
    with pytest.raises(ValueError):
        run("--checkpoint", "none.pt", "--debug")


# ---------------------------------------------------------------------------------------- compile


@pytest.fixture
def compiler(monkeypatch):
    """compiler(backend): torch.compile compiles with this one."""

    def use(backend):
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))

    yield use
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def test_compile_compiles_the_step_alone(run, compiler):
    inputs = []

    def eager(graph, example_inputs):
        inputs.extend(example_inputs)
        return graph.forward

    options = ["--prompt", "the river", "--max_new_tokens", 20]
    want = run(*options)
    compiler(eager)
    assert run(*options, "--compile") == want
    tokens = [part for part in inputs if part.dtype == torch.long]
    assert tokens and all(part.shape == (1,) for part in tokens)


def test_where_compiling_fails_it_goes_on_without(run, compiler):
    def broken(graph, example_inputs):
        raise RuntimeError("no compiler here\nand more")

    options = ["--num_samples", 2, "--max_new_tokens", 20]
    want = run(*options)
    compiler(broken)
    assert run(*options, "--compile") == want
    assert re.search(r"\nsample.py: [^\n]*--compile failed[^\n]*\n\d+ tokens/s", run.err)
