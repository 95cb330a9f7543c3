"""data/corpora.py: every corpus by name, its real loading code against a server of our own with small made files."""
import gzip
import io
import json
import random
import zipfile

import pytest

from data import corpora, download, prepare, sources, token_files, tokenizer
from data.messages import DataError
from experiments import evaluate
from tests.helpers import mutated, some_text
from tests.server import cut, serving
from train import train

END = "<|endoftext|>"


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "STALL", 1)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(prepare, "DEFAULT", tmp_path / "data/default")
    monkeypatch.setattr(sources, "VAL_MOST", 10**4)
    with serving() as one:
        monkeypatch.setenv("HF_ENDPOINT", one.address)
        monkeypatch.setattr(corpora, "ENWIK8_URL", f"{one.address}/enwik8.zip")
        yield one


def made(name, *options):
    """Prepare it as the command does. -> {split: text}, meta."""
    prepare.main(["--corpus", name, "--vocab_size", "300", *options])
    folder = prepare.DEFAULT.parent / name
    fields, meta = token_files.load(folder)[2:]
    enc = tokenizer.load_tokenizer(fields)
    parts = {"train": token_files.load(folder)[0]}
    parts |= {split: token_files.load(folder, held_out=split)[1] for split in ("val", "test") if split in meta}
    return {split: enc.decode(tokens[:].tolist()) for split, tokens in parts.items()}, meta


def zipped(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        for name, raw in files.items():
            z.writestr(name, raw)
    return buffer.getvalue()


def downloads(name):
    return sorted(file.name for file in (prepare.DEFAULT.parent / "downloads" / name).iterdir())


def test_enwik8_has_the_usual_split(server, monkeypatch, tmp_path):
    """In bytes, moved to where characters begin, here in every text of characters of up to four bytes; nothing is unpacked."""
    monkeypatch.setattr(corpora, "ENWIK8_BYTES", 20_000)
    for seed in range(4):
        text = "".join(random.Random(seed).choices("aé東🙂 ", k=20_000))
        raw = text.encode()[:20_000]                    # the last character may be cut
        server.files["/enwik8.zip"] = zipped(enwik8=raw)
        server.faults = [cut(3000)]
        got, meta = made("enwik8", "--overwrite")
        assert "".join(got[split].removesuffix(END) for split in ("train", "val", "test")) == raw.decode("utf-8", "ignore")
        first, second = meta["train"]["bytes"], meta["train"]["bytes"] + meta["val"]["bytes"]
        assert 18_000 <= first <= 18_003 and 19_000 <= second <= 19_003
        assert downloads("enwik8") == ["enwik8.zip", "enwik8.zip.sha256"]
        for file in ("enwik8.zip", "enwik8.zip.sha256"):
            (prepare.DEFAULT.parent / "downloads/enwik8" / file).unlink()
    folder = str(prepare.DEFAULT.parent / "enwik8")
    train(dict(data=folder, out=str(tmp_path / "out"), device="cpu", n_layer=1, d_model=16, n_rows=8, k_rows=2, context=24,
               batch_size=4, max_steps=2, eval_every=2, sample_tokens=0))
    results = {}
    for split in ("val", "test"):
        evaluate.main([str(tmp_path / "out/best.pt"), "--split", split, "--json", str(tmp_path / "r.json")])
        results[split] = json.loads((tmp_path / "r.json").read_text())["loss"]
    assert results["val"]["tokens"] == meta["val"]["tokens"] - 1 and results["test"]["tokens"] == meta["test"]["tokens"] - 1
    assert results["val"]["nats"] != results["test"]["nats"]


def test_the_hub_gives_the_others(server):
    """TinyStories: documents between marks; and FineWeb-Edu and WikiText, where pyarrow is installed."""
    stories = [some_text(30, seed=i).strip() for i in range(40)]
    server.hub("roneneldan/TinyStories", "", {
        "TinyStoriesV2-GPT4-train.txt": f"\n{END}\n".join(stories[:30]).encode(),
        "TinyStoriesV2-GPT4-valid.txt": (f"\n{END}\n".join(stories[30:]) + f"\n{END}\n").encode(),
        "TinyStories-train.txt": b"older"})
    got, meta = made("tinystories")
    assert got == {"train": END.join(stories[:30]) + END, "val": END.join(stories[30:]) + END}
    assert meta["train"]["documents"] == 30 and "TinyStories-train.txt" not in downloads("tinystories")
    pytest.importorskip("pyarrow", reason="reading .parquet needs pyarrow")
    rows = [f" = Heading {i} = \n" if i % 5 == 0 else some_text(20, seed=i) + "\n" for i in range(60)]
    parts = {"train-00000-of-00002": rows[:20], "train-00001-of-00002": rows[20:40], "validation-00000-of-00001": rows[40:50],
             "test-00000-of-00001": rows[50:]}
    server.hub("Salesforce/wikitext", "wikitext-103-raw-v1", {f"{name}.parquet": parquet(text) for name, text in parts.items()})
    got, meta = made("wikitext103")
    assert got == {"train": "".join(rows[:20]) + END + "".join(rows[20:40]) + END, "val": "".join(rows[40:50]) + END,
                   "test": "".join(rows[50:]) + END}


def parquet(rows):
    import pyarrow
    import pyarrow.parquet
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": rows, "id": list(range(len(rows)))}), buffer, row_group_size=7)
    return buffer.getvalue()


def test_a_sample_is_as_large_as_asked_for(server):
    pytest.importorskip("pyarrow", reason="reading .parquet needs pyarrow")
    pages = [[some_text(400, seed=100 * i + j) for j in range(50)] for i in range(3)]
    files = {f"000_0000{i}.parquet": parquet(texts) for i, texts in enumerate(pages)}
    server.hub("HuggingFaceFW/fineweb-edu", "sample/10BT", {**files, "README.md": b"x"})
    size = len(files["000_00000.parquet"])
    _, meta = made("fineweb-edu", "--gb", str(1.5 * size / 1e9))
    assert downloads("fineweb-edu")[::2] == ["000_00000.parquet", "000_00001.parquet"]
    text = meta["train"]["bytes"] + meta["val"]["bytes"]
    assert 1.45 * size < text < sum(len(t.encode()) for texts in pages[:2] for t in texts) and meta["val"]["bytes"] > 0
    with pytest.raises(SystemExit, match="--gb 1: the sample has"):
        made("fineweb-edu", "--gb", "1", "--overwrite")


def test_what_is_here_and_what_is_there(capsys, monkeypatch, tmp_path):
    prepare.main(["--corpus", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(corpora.CORPORA)
    for corpus, line in zip(corpora.CORPORA.values(), lines, strict=True):
        assert corpus.licence in line and corpus.size in line and corpus.place in line
    monkeypatch.setattr(prepare, "DEFAULT", tmp_path / "data/default")
    got, meta = made("stdlib")
    assert "Python" in meta["corpus"] and "import " in got["val"] and meta["train"]["documents"] > 100
    for options, message in ((["--corpus", "enwik9"], "must be one of"), (["--corpus", "enwik8", "--gb", "0"], "--gb must"),
                             (["--corpus", "enwik8", "--input", "x"], "No such file|exclude each other")):
        with pytest.raises(SystemExit, match=message):
            prepare.main(options)


def test_nothing_is_fetched_for_a_folder_that_is_there(server):
    (prepare.DEFAULT.parent / "enwik8").mkdir(parents=True)
    (prepare.DEFAULT.parent / "enwik8/mine.txt").write_text("precious")
    with pytest.raises(SystemExit, match="--overwrite"):
        made("enwik8")
    assert not server.asked


@pytest.mark.parametrize("listing", [b"", b"{}", b"[]", b"[1, null]", b"<html>", b"[" * 10**5, b'[{"path": 5}]', b"\xff\xfe",
                                     b'[{"path": "TinyStoriesV2-GPT4-train.txt"}]',
                                     b'[{"path": "TinyStoriesV2-GPT4-train.txt", "size": -1}]',
                                     b'[{"path": "TinyStoriesV2-GPT4-train.txt", "size": 5, "lfs": {"oid": "../../x"}}]',
                                     b'[{"path": "../../TinyStoriesV2-GPT4-train.txt\\u0000", "size": 5}]'])
def test_a_hostile_listing(listing, server):
    server.files["/api/datasets/roneneldan/TinyStories/tree/main"] = listing
    with pytest.raises(SystemExit, match=r"data/prepare.py: error: ") as e:
        made("tinystories")
    assert e.value.code.isprintable() and not (prepare.DEFAULT.parent / "tinystories").exists()


def test_damaged_archives(server, monkeypatch, tmp_path, capsys):
    """One line for each; random damage is noticed, since .zip and .gz keep checksums."""
    monkeypatch.setattr(corpora, "ENWIK8_BYTES", 20_000)
    whole, g = zipped(enwik8=some_text(5000).encode()[:20_000]), random.Random(0)
    cases = [whole[:-30], b"PK", b"<html>", zipped(enwik9=b"x" * 20_000), zipped(enwik8=b"x" * 19_999),
             zipped(enwik8=b"\xff" * 20_000), whole.replace(b"PK\x01\x02", b"PK\x01\x03")]
    cases += [mutated(whole, g)[1] for _ in range(30)]
    text, said = some_text(5000).encode()[:20_000].decode("utf-8", "ignore"), []
    for raw in cases:
        server.files["/enwik8.zip"] = raw
        try:
            got, _ = made("enwik8", "--overwrite")      # where the damage is outside what is read
            assert "".join(got[split].removesuffix(END) for split in got) == text
        except SystemExit as e:
            said.append(e.code)
        for file in ("enwik8.zip", "enwik8.zip.sha256"):
            (prepare.DEFAULT.parent / "downloads/enwik8" / file).unlink()
    assert len(said) > 27 and all(line.startswith("data/prepare.py: error: ") and line.isprintable() for line in said)
    text = some_text(3000)
    packed = gzip.compress(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(packed)
    prepare.prepare(tmp_path / "out", sources.find_sources([tmp_path / "a.txt.gz"]), corpus="x", vocab_size=260)
    tokens, val, fields, _ = token_files.load(tmp_path / "out")
    assert tokenizer.load_tokenizer(fields).decode([*tokens[:-1], *val[:-1]]) == text
    (tmp_path / "a.txt.gz").write_bytes(packed[:-20])
    with pytest.raises(DataError, match=r"a\.txt\.gz cannot be unpacked"):
        prepare.prepare(tmp_path / "out2", sources.find_sources([tmp_path / "a.txt.gz"]), corpus="x", vocab_size=260)
