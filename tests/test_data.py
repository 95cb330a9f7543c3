"""data/: tokenizer, token files, splits, the default corpus."""
import contextlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import regex

from data import corpora, messages, prepare, sources, token_files, tokenizer
from tests.helpers import EVERY_KIND, ROOT, WORDS, some_text
from tests.server import serving


def slow_bpe(text, vocab_size):
    """Byte-pair encoding as it is defined: count every pair of the whole text again for every merge."""
    words = [[bytes([b]) for b in w.encode()] for w in regex.findall(tokenizer.GPT2_PATTERN, text)]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        pairs = Counter(pair for w in words for pair in itertools.pairwise(w))
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        ranks.setdefault(best[0] + best[1], len(ranks))
        for w in words:
            i = 0
            while i < len(w) - 1:
                if (w[i], w[i + 1]) == best:
                    w[i:i + 2] = [best[0] + best[1]]
                i += 1
    return ranks


@pytest.mark.parametrize("text", [some_text(300), "aaaaaaaaab aaaa ababababab bbbb aaaaa", "x", ""])
def test_bpe_is_its_definition(text):
    assert tokenizer.train_bpe([text], 320) == slow_bpe(text, 320)


def test_tokenizer_keeps_any_text(corpus):
    _, _, fields, _ = token_files.load(corpus)
    enc = tokenizer.load_tokenizer(json.loads(json.dumps(fields)))
    for text in ("", EVERY_KIND, some_text(50), "<|endoftext|>"):
        tokens = enc.encode_ordinary(text)
        assert enc.decode(tokens) == text and enc.eot_token not in tokens
    pieces = tokenizer.token_strings(enc)
    assert all(bytes([b]) in pieces for b in range(256))        # so any bytes at all can be written
    assert b"".join(pieces[t] for t in enc.encode_ordinary(EVERY_KIND)) == EVERY_KIND.encode()
    assert pieces[enc.eot_token] == b"" and len(pieces) == enc.n_vocab == 301
    assert tokenizer.dump_tokenizer(enc) == fields


def test_prepared_folder(corpus):
    train, val, fields, meta = token_files.load(corpus)
    enc = tokenizer.load_tokenizer(fields)
    assert meta["train"]["sources"] == [f"doc{i}" for i in range(10)] and meta["val"]["documents"] == 2
    for tokens, name, first in ((train, "train", 0), (val, "val", 10)):
        texts = enc.decode(tokens[:].tolist()).split("<|endoftext|>")
        assert texts.pop() == "" and len(texts) == meta[name]["documents"]
        assert texts[0] == some_text(700, seed=first) or texts[0] == some_text(700, seed=11)
        assert len(tokens) == meta[name]["tokens"] and tokens.dtype == np.uint16


def test_split(tmp_path):
    def parts(texts, val=None):
        splits = sources.split([sources.Source(name, text=text) for name, text in texts.items()], val)
        return {name: [(s.name, "".join(block for part in sources.read_text(s, "") for block in part)) for s in parts]
                for name, (parts, _) in splits.items()}

    (_, train), = (whole := parts({"a": "0123456789" * 10}))["train"]
    assert train == "0123456789" * 9 and [text for _, text in whole["val"]] == ["0123456789"]
    three = parts({"a": "x" * 50, "b": "y" * 45, "c": "z" * 5})
    assert three == {"train": [("a", "x" * 50)], "val": [("b", "y" * 45), ("c", "z" * 5)]}
    assert parts({"a": "x", "b": "y"}, {"a"}) == {"train": [("b", "y")], "val": [("a", "x")]}
    for empty in ({}, {"a": "x"}):
        with pytest.raises(messages.DataError):
            parts(empty)


def test_wide_vocabularies_take_four_bytes(tmp_path):
    token_files.write_tokens(tmp_path / "t.bin", [[1, 2], [70000]], 70001, bytes(32))
    assert token_files.read_tokens(tmp_path / "t.bin").tolist() == [1, 2, 70000]


def test_token_file_errors_name_the_command(tmp_path):
    path = tmp_path / "train.bin"
    token_files.write_tokens(path, [[1, 2, 3]], 300, b"t" * 32)
    good = path.read_bytes()
    assert token_files.read_tokens(path, b"t" * 32).tolist() == [1, 2, 3]
    cases = {"does not exist": None, "not a file of tokens": b"hello", "is damaged": good[:-1], "damaged": good + b"x",
             "has version 9": good[:8] + b"\x09" + good[9:], "is not a file": b"\0" * 64}
    for message, content in cases.items():
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(messages.DataError, match=f"{message}.*run: python data/prepare.py"):
            token_files.read_tokens(path)
    path.write_bytes(good)
    with pytest.raises(messages.DataError, match="another tokenizer"):
        token_files.read_tokens(path, b"u" * 32)
    with pytest.raises(messages.DataError, match="not a prepared folder.*python data/prepare.py"):
        token_files.load(tmp_path)


def test_prepare_never_replaces_a_folder_unasked(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(messages.DataError, match="--overwrite"):
        prepare.prepare(tmp_path / "out", {"a": some_text(99)}, corpus="x", vocab_size=260)
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    assert os.listdir(tmp_path) == ["out"]                      # nothing half-made is left behind


def test_plays_are_cleaned():
    markdown = ("# The Play\n\n## ACT I\n\n_Enter ROMEO,\nand others_\n\n**ROMEO**  \n_[Aside]_  \nBut soft!  what\\ light "
                "_[To\nher]_ \nbreaks\n\n_Exit_\n\n**A MAN**  \n_Dies_\n\n**ROMEO**  \nAnd\n\n_Music_\n\nso on.\nTHE PLAY\n")
    assert corpora.clean_play(markdown, "the-play") == "ROMEO:\nBut soft! what light\nbreaks\n\nROMEO:\nAnd\nso on.\n"


@pytest.mark.parametrize("internet", ["unreachable", "wrong"])
def test_without_network_the_standard_library_is_the_corpus(internet, tmp_path, monkeypatch, capsys):
    no_pip = subprocess.CompletedProcess([], 1, "", "No module named pip")
    monkeypatch.setattr(corpora.subprocess, "run", lambda *a, **k: no_pip)
    with serving() as server:
        server.files["/tiny"] = b"<html>please log in</html>"   # must fail its checksum
        place = f"{server.address}/tiny" if internet == "wrong" else "http://nowhere.invalid/tiny"
        monkeypatch.setattr(corpora, "TINY_URL", place)
        meta = prepare.prepare(tmp_path / "out", vocab_size=300)
    said = capsys.readouterr().out
    assert "standard library" in meta["corpus"] and "standard library" in said
    assert "No module named pip" in said and ("is there a network" if internet == "unreachable" else "its sha256 is") in said
    assert 0.02 < meta["val"]["bytes"] / meta["train"]["bytes"] < 0.3


def test_prepare_command(tmp_path):
    def run(*arguments):
        command = [sys.executable, ROOT / "data/prepare.py", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    zero = tmp_path / "0.txt"
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(some_text(200, seed=i), encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    done = run("--input", zero, tmp_path / "1.txt", "--val", tmp_path / "2.txt", "--out", tmp_path / "o", "--vocab_size", 280)
    assert done.returncode == 0, done.stderr
    assert token_files.load(tmp_path / "o")[3]["val"]["sources"] == [str(tmp_path / "2.txt")]
    for arguments, message in [(["--input", tmp_path / "bad.txt"], "not UTF-8"),
                               (["--input", tmp_path / "no.txt"], "No such file"),
                               (["--input", zero, "--vocab_size", 9, "--out", tmp_path / "p"], "256 "),
                               (["--input", zero, "--tokenizer", "nonsense", "--out", tmp_path / "p"], "nonsense"),
                               (["--inputs", zero], "--inputs"), (["--vocab_size", "x"], "--vocab_size"),
                               (["--input", zero, "--out", tmp_path / "o"], "--overwrite")]:
        done = run(*arguments)
        assert done.returncode != 0 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "p").exists()


PATTERNS = {"gpt2": tokenizer.GPT2_PATTERN,
            "cl100k": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"""
                      r"""\s*[\r\n]|\s+(?!\S)|\s""",
            "o200k": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
                     r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}"""
                     r"""\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"""
                     r"""\s+(?!\S)|\s+"""}


@pytest.mark.parametrize("name", PATTERNS)
def test_pieces_have_the_tokens_of_the_whole(name, corpus, monkeypatch):
    """A cut falls where every tokenizer's pattern ends a word; and where there is no such place, no character is lost."""
    enc = tokenizer.load_tokenizer({**token_files.load(corpus)[2], "pat_str": PATTERNS[name]})
    rng = random.Random(0)
    monkeypatch.setattr(tokenizer, "PIECE", 40)
    whole = 0
    for _ in range(200):
        words = [*WORDS, "a'll", " ", "  \n", "!\r\n", "12345", "e\u0301 ", "— ", "..."]
        text = "".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randrange(80)))
        blocks = [text[i:i + 33] for i in range(0, len(text), 33)]
        pieces = list(tokenizer.cut(blocks))
        assert "".join(pieces) == text and all(0 < len(p) <= 40 for p in pieces)
        good = [re.search(r"[^\W\d_]\Z", a) and b[0] == " " for a, b in itertools.pairwise(pieces)]
        for a, b, is_good in zip(pieces, pieces[1:], good, strict=False):
            assert is_good or (len(a) == 40 and not re.search(r"[^\W\d_] ", (a + b)[20:40])), (a, b)
        if all(good):
            whole += 1
            assert tokenizer.encode(enc, text).tolist() == enc.encode_ordinary(text)
        assert b"".join(tokenizer.token_strings(enc)[t] for t in tokenizer.encode(enc, text)) == text.encode()
    assert whole > 100
    monkeypatch.setattr(tokenizer, "PIECE", 2**18)
    for hard in ("a" * 10**6, " " * 10**6 + "a", "\n " * 10**6 + "x", "\x00" * 10**6, "東" * 10**6, "\ud800" * 1000):
        tokens = tokenizer.encode(enc, hard)              # tiktoken alone panics on the second
        assert b"".join(map(tokenizer.token_strings(enc).__getitem__, tokens)) == hard.encode("utf-16", "surrogatepass").decode(
            "utf-16", "replace").encode()


def test_the_tokenizer_hash_covers_all_that_decides(corpus):
    fields = token_files.load(corpus)[2]
    hashes = {tokenizer.tokenizer_hash(fields), tokenizer.tokenizer_hash({**fields, "pat_str": r"(?s:.)"}),
              tokenizer.tokenizer_hash({**fields, "special_tokens": {**fields["special_tokens"], "<|other|>": 301}}),
              tokenizer.tokenizer_hash({**fields, "ranks": fields["ranks"].replace(" 299\n", " 298\n")})}
    assert len(hashes) == 4 and all(len(h) == 32 for h in hashes)
    assert tokenizer.tokenizer_hash({**fields, "name": "other"}) in hashes       # a name decides nothing


def test_tokenizers_with_impossible_numbers_are_refused(corpus):
    fields = token_files.load(corpus)[2]
    ranks, special = fields["ranks"], fields["special_tokens"]
    named_twice = tokenizer.load_tokenizer({**fields, "special_tokens": {**special, "<|other|>": 300}})   # as o200k_harmony does
    assert named_twice.n_vocab == 301 and tokenizer.encode(named_twice, EVERY_KIND).max() < 300
    for wrong in ({**fields, "special_tokens": {**special, "<|other|>": 7}}, {**fields, "special_tokens": {tokenizer.EOT: 2**24}},
                  {**fields, "special_tokens": {}}, {**fields, "ranks": ranks.replace(" 299\n", " 298\n")},
                  {**fields, "ranks": ranks.replace("YQ== 97\n", "")}, {**fields, "ranks": ranks.replace(" 299\n", " -1\n")}):
        with pytest.raises(messages.DataError, match="the tokenizer is damaged"):
            tokenizer.load_tokenizer(wrong)


@pytest.mark.parametrize("pattern", ["", "a", "x*", "(", r"(a+)+$|(?s:.)", r"\w+", None, 5, "(?s:.{1,3})"])
def test_hostile_tokenizer_patterns_are_refused_at_once(pattern, corpus):
    fields = {**token_files.load(corpus)[2], "pat_str": pattern}
    start = time.perf_counter()
    if pattern == "(?s:.{1,3})":                        # odd, but it works
        enc = tokenizer.load_tokenizer(fields)
        assert enc.decode(tokenizer.encode(enc, EVERY_KIND).tolist()) == EVERY_KIND
    elif pattern == r"(a+)+$|(?s:.)":                   # takes exponential time on a's that something follows
        with contextlib.suppress(messages.DataError):
            tokenizer.load_tokenizer(fields)
    else:
        with pytest.raises(messages.DataError):
            tokenizer.load_tokenizer(fields)
    assert time.perf_counter() - start < 5
