"""A prepared folder: files of tokens behind a header, the tokenizer that made them, meta.json with their checksums.

    train-00000.bin ...    64 bytes of header (HEADER below), then the tokens as uint16 or uint32; several files if many
    val-00000.bin ...      the same, to validate on
    test-00000.bin ...     the same, to test on, where the corpus has such a part
    tokenizer.tiktoken     one line per token: its bytes in base64, its rank
    meta.json              the corpus, the sizes of each split, the tokenizer's pattern and special tokens, checksums
"""
import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np

from data.messages import DataError
from data.tokenizer import load_tokenizer, tokenizer_hash

HERE = Path(__file__).resolve().parent
# Where the default corpus is prepared: beside this file; by the installed package (setup.py) in the working folder.
DEFAULT = (Path("data") if __name__.startswith("fmem.") else HERE) / "default"

HEADER = struct.Struct("<8sIIQ32s8x")                   # magic, version, bytes per token, tokens, tokenizer hash
MAGIC, VERSION = b"FMEMTOKS", 1


def write_tokens(path, parts, n_vocab, tokenizer):
    """Write an iterable of token lists or arrays behind a header; returns the number of tokens."""
    dtype = np.dtype("<u2" if n_vocab <= 2**16 else "<u4")
    count = 0
    with open(path, "wb") as f:
        f.write(bytes(HEADER.size))
        for part in parts:
            f.write(np.asarray(part).astype(dtype).tobytes())
            count += len(part)
        f.seek(0)
        f.write(HEADER.pack(MAGIC, VERSION, dtype.itemsize, count, tokenizer))
        f.flush()
        os.fsync(f.fileno())
    return count


def shard_name(split, i):
    return f"{split}-{i:05d}.bin"


class Tokens:
    """Several files of tokens read as one array: len, slices and numbers. Raises DataError on a token beyond the vocabulary."""

    def __init__(self, files, n_vocab):
        self.files, self.n_vocab, self.dtype = files, n_vocab, files[0].dtype
        self.ends = np.cumsum([len(f) for f in files])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, at):
        start, stop, stride = (at if isinstance(at, slice) else slice(at, at + 1)).indices(len(self))
        if stride != 1:
            raise ValueError("slices of tokens have a stride of 1")
        parts, i = [], int(np.searchsorted(self.ends, start, "right"))
        while start < stop:
            before = int(self.ends[i - 1]) if i else 0
            parts.append(self.files[i][start - before:stop - before])
            start, i = int(self.ends[i]), i + 1
        part = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])
        if len(part) and part.max() >= self.n_vocab:
            raise DataError(f"token {part.max()} is beyond the {self.n_vocab} of the tokenizer; prepare the data again")
        return np.asarray(part) if isinstance(at, slice) else part[0]


def read_tokens(path, tokenizer=None):
    """The tokens of a file as a read-only memmap. Raises DataError, naming the command to run, if anything is off."""
    path = Path(path)
    again = "run: python data/prepare.py" + ("" if path.parent == DEFAULT else f" --out {path.parent} --input ...")
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


CHECKED = 2**32     # bytes: of larger folders the checksums are compared only on request, since that takes seconds per GB


def load(folder, check=None, held_out="val"):
    """A prepared folder -> (train Tokens, val Tokens, tokenizer fields, meta). Raises DataError.

    held_out: "test" gives that part, if there is one, instead of val.

    meta.json has a checksum of each file and of itself, so that damage is noticed (the oldest folders have none). check: also
    compare those of the tokens (None: if they are at most CHECKED bytes).
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        fields = {**meta["tokenizer"], "ranks": (folder / "tokenizer.tiktoken").read_text(encoding="ascii")}
        tokenizer = tokenizer_hash(fields)
        count = {name: meta[name].get("shards", 1) for name in ("train", "val", "test") if name in meta or name != "test"}
        sizes = [meta[name][what] for name in count for what in ("bytes", "tokens")] + [len(meta["corpus"]), *count.values()]
        if not all(type(n) is int and n > 0 for n in sizes) or max(count.values()) > 10**5:
            raise ValueError("meta.json has impossible sizes")
        shards = {name: [shard_name(name, i) for i in range(n)] for name, n in count.items()}
        if not (folder / shards["train"][0]).exists() and (folder / "train.bin").exists():     # as it was named before
            shards = {name: [f"{name}.bin"] for name in shards}
        if "sha256" in meta and (meta["sha256"] != meta_hash(meta) or meta["files"]["tokenizer.tiktoken"] !=
                                 hashlib.sha256(fields["ranks"].encode()).hexdigest()):
            raise ValueError("it is damaged, a checksum differs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{folder} is not a prepared folder ({e}); run: python data/prepare.py --out {folder}") from None
    if held_out not in shards:
        raise DataError(f"{folder} has no part to {held_out} on; --corpus enwik8 and wikitext103 make one")
    enc, tokens = load_tokenizer(fields), {}
    for name, names in shards.items():
        files = [read_tokens(folder / shard, tokenizer) for shard in names]
        if sum(map(len, files)) != meta[name]["tokens"] and "sha256" in meta:
            raise DataError(f"{folder} is damaged, tokens are missing; run: python data/prepare.py --out {folder} --overwrite")
        tokens[name] = Tokens(files, enc.n_vocab)
    if check is None:
        check = sum(len(t) * t.dtype.itemsize for t in tokens.values()) <= CHECKED
    if check and "sha256" in meta and any(file_hash(folder / shard) != meta["files"].get(shard)
                                          for names in shards.values() for shard in names):
        raise DataError(f"{folder} is damaged, a checksum differs; run: python data/prepare.py --out {folder} --overwrite")
    return tokens["train"], tokens[held_out], fields, meta


def write_json(path, value):
    """Write a JSON file whole, or not at all."""
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        with open(tmp, "w", encoding="utf-8", newline="\n") as f:
            json.dump(value, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
