"""data/prepare.py: every kind of file, any number of workers, corpora larger than memory, what can go wrong."""
import gzip
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import messages, prepare, token_files, tokenizer
from tests.helpers import ROOT, SLOW, contents, mutated, some_text, survived, zoo


def test_prepare_reads_every_kind_and_gives_the_same_bytes_for_any_workers(tmp_path, monkeypatch):
    documents = [text for texts in zoo(tmp_path / "in").values() for text in texts]
    monkeypatch.setattr(prepare, "JOB", 3000)
    monkeypatch.setattr(prepare, "PIECE", 800)
    results = []
    for workers in (1, 2, 5):
        out = tmp_path / f"out{workers}"
        prepare.main(["--input", str(tmp_path / "in"), "--out", str(out), "--vocab_size", "300", "--workers", str(workers),
                      "--shard_tokens", "20000"])
        results.append(contents(out))
    assert results[0] == results[1] == results[2]
    train, val, fields, meta = token_files.load(tmp_path / "out2")
    enc = tokenizer.load_tokenizer(fields)
    assert meta["train"]["shards"] > 2 and [len(f) >= 20000 for f in train.files[:-1]] == [True] * (meta["train"]["shards"] - 1)
    end = "<|endoftext|>"
    assert enc.decode(val[:].tolist()).split(end) == documents[::10] + [""]                 # every tenth, the first included
    assert enc.decode(train[:].tolist()).split(end) == [d for i, d in enumerate(documents) if i % 10] + [""]
    assert meta["train"]["documents"] + meta["val"]["documents"] == len(documents)
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == sum(len(d.encode()) for d in documents)
    whole = np.concatenate(train.files)
    for start, stop in ((0, 5), (19990, 20020), (len(whole) - 3, len(whole) + 9), (7, 7), (0, None)):
        assert np.array_equal(train[start:stop], whole[start:stop])
    assert train[20001] == whole[20001] and len(train) == len(whole)
    assert not list(tmp_path.glob(".*"))                # neither lock nor work is left behind


def big_corpus(folder, size):
    """About `size` bytes of text as .txt, .jsonl and .jsonl.gz, of 200,000 different words as frequent as words are."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxzéü東"))
    words = np.array(["".join(rng.choice(letters, n)) for n in 1 + rng.poisson(4, 200_000 if SLOW else 20_000)])

    def text(n):                                                    # Zipf's law: rank r with a frequency like 1 / r
        return " ".join(words[((len(words) + 1) ** rng.random(n)).astype(int) - 1])

    paragraphs = [text(int(n)) for n in rng.integers(50, 2000, 3000)]
    mean = sum(len(p.encode()) for p in paragraphs) / len(paragraphs)
    for name, share in (("a.txt", 0.2), ("b/c.txt", 0.2), ("d.jsonl", 0.3), ("e.jsonl.gz", 0.3)):
        (folder / name).parent.mkdir(exist_ok=True)
        with (gzip.open if name.endswith("gz") else open)(folder / name, "wb") as f:
            for i in rng.integers(len(paragraphs), size=int(share * size / mean)):
                f.write((paragraphs[i] if name.endswith("txt") else json.dumps({"text": paragraphs[i]})).encode() + b"\n")
    return paragraphs


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
def test_prepare_a_corpus_larger_than_its_memory(tmp_path):
    """FMEM_SLOW: 2 GB of text in less than 1 GB of memory; else 8 MB."""
    size, workers = (2 * 10**9 if SLOW else 8 * 10**6), len(os.sched_getaffinity(0))
    paragraphs = big_corpus(tmp_path / "in", size)
    code = "import sys; from data import prepare; prepare.main(sys.argv[1:]); print(open('/proc/self/status').read())"
    command = [sys.executable, "-c", code, "--input", tmp_path / "in", "--out", tmp_path / "out", "--workers", workers]
    start = time.perf_counter()
    child = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    seconds, said = time.perf_counter() - start, child.stdout
    assert child.returncode == 0, child.stderr
    peak = int(re.search(r"^VmHWM:\s+(\d+) kB", said, flags=re.M)[1])
    _, _, fields, meta = token_files.load(tmp_path / "out", check=True)
    done, enc = meta["train"]["bytes"] + meta["val"]["bytes"], tokenizer.load_tokenizer(fields)
    assert 0.8 * size < done < 1.2 * size and 0 < meta["val"]["bytes"] < 0.11 * done
    assert peak < 1e6, peak                             # in KiB
    if SLOW:
        assert "s left" in said and meta["train"]["shards"] > 5
    sample = (paragraphs * 10)[:20000 if SLOW else 1000]
    start = time.perf_counter()
    enc.encode_ordinary_batch(sample, num_threads=workers)
    own = sum(len(p.encode()) for p in sample) / (time.perf_counter() - start)
    shutil.rmtree(tmp_path / "in")
    shutil.rmtree(tmp_path / "out")
    survived("prepare_large", bytes=done, seconds=round(seconds), workers=workers, peak_mb=round(peak / 1024),
             files=meta["train"]["shards"], mb_per_second=round(done / seconds / 1e6, 1),
             tiktoken_mb_per_second=round(own / 1e6, 1))


def test_prepare_says_what_is_wrong(tmp_path, capsys):
    good = json.dumps({"text": "some words"}) + "\n"
    (tmp_path / "empty").mkdir()
    parquet = "cannot be read as .parquet" if importlib.util.find_spec("pyarrow") else "pip install pyarrow"
    cases = {"cut.jsonl.gz": (gzip.compress(good.encode() * 500)[:-20], "line .* cannot be read"),
             "not.jsonl.gz": (b"hello", "line 1 cannot be read"),
             "broken.jsonl": (good.encode() + b'{"text": "a', "line 2 cannot be read"),
             "other.jsonl": (b'{"body": "words"}\n', "line 1 has no text in a field text"),
             "list.jsonl": (b'["words"]', "line 1 has no text"),
             "number.jsonl": (b'{"text": 5}', "line 1 has no text"),
             "deep.jsonl": (b"[" * 10**5, "line 1 cannot be read"),
             "latin.jsonl": (b'{"text": "caf\xe9"}', "line 1 cannot be read"),
             "latin.txt": (b"x" * 2**20 + b"caf\xe9", "not UTF-8 text .byte 1048579"),
             "half.txt": (b"caf\xc3", "not UTF-8 text .byte 3"),
             "null.parquet": (b"PAR1PAR1", parquet),
             "one.jsonl": (good.encode(), "no document is left for training"),
             "two.jsonl": (good.encode() * 2, None), "empty": (None, "has no file"), "nothing": (None, "No such file"),
             "/dev/null": (None, "neither a file nor a folder")}
    for name, (content, message) in cases.items():
        if content:
            (tmp_path / name).write_bytes(content)
        if message:
            with pytest.raises(SystemExit, match=f"data/prepare.py: error: .*{message}") as e:
                prepare.main(["--input", str(tmp_path / name), "--out", str(tmp_path / "out"), "--vocab_size", "260"])
            assert "\n" not in str(e.value) and (name in str(e.value) or "left" in message), name
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "out").exists()
    prepare.main(["--input", str(tmp_path / "two.jsonl"), "--out", str(tmp_path / "out"), "--vocab_size", "260"])
    assert token_files.load(tmp_path / "out")[3]["train"]["documents"] == 1
    prepare.main(["--check", str(tmp_path / "out")])
    (tmp_path / "out/val-00000.bin").write_bytes((tmp_path / "out/val-00000.bin").read_bytes()[:-2] + b"\1\0")
    with pytest.raises(SystemExit, match="a checksum differs"):
        prepare.main(["--check", str(tmp_path / "out")])


def test_what_is_kept_is_of_use_to_the_same_command_only(tmp_path, monkeypatch, capsys):
    """A full disk after three files of tokens: the message says what is kept; other options, or another text, start over."""
    zoo(tmp_path / "in")
    monkeypatch.setattr(prepare, "JOB", 3000)
    write_tokens, calls = token_files.write_tokens, itertools.count()

    def full_disk(*args):
        if next(calls) % 4 == 3:
            raise OSError(28, "No space left on device")
        return write_tokens(*args)

    def run(out, vocab_size="300"):
        prepare.main(["--input", str(tmp_path / "in"), "--out", str(tmp_path / out), "--vocab_size", vocab_size,
                      "--shard_tokens", "4000"])
        return contents(tmp_path / out), capsys.readouterr().out.count("data: resumes")

    for changed in ("nothing", "option", "text", "kept file"):
        if changed == "text":
            (tmp_path / "in/sub/a.txt").write_text("other words", encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "write_tokens", full_disk)
            with pytest.raises(SystemExit, match=r"No space left.*is kept in .*\.part; the same command resumes"):
                run("out")
        kept = tmp_path / ".out.part"
        assert (kept / "train-00002.bin").exists()
        if changed == "kept file":
            (kept / "train-00001.bin").write_bytes(mutated((kept / "train-00001.bin").read_bytes(), random.Random(0))[1])
        elif changed == "text":
            (tmp_path / "in/sub/a.txt").write_text("quite other words", encoding="utf-8")
        size = "301" if changed == "option" else "300"
        got, resumed = run("out", size)
        assert resumed == (changed == "nothing")
        shutil.rmtree(tmp_path / "out")
        assert got == run("fresh", size)[0]
        shutil.rmtree(tmp_path / "fresh")
        assert not kept.exists()


def test_what_waits_for_the_workers_is_bounded():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    with prepare.ThreadPoolExecutor(2) as pool:
        for done, result in enumerate(prepare.in_order(pool, lambda i: i * i, items(), 4)):
            assert result == done * done and len(taken) <= done + 4


def test_two_prepares_of_one_folder_do_not_mix(tmp_path):
    pytest.importorskip("fcntl", reason="locks on files are for Unix")
    with prepare.locked(tmp_path / ".out.lock"), pytest.raises(messages.DataError, match="another process"):
        prepare.prepare(tmp_path / "out", {"a": some_text(99)}, corpus="x", vocab_size=260)
    prepare.prepare(tmp_path / "out", {"a": some_text(99)}, corpus="x", vocab_size=260)
