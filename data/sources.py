"""Where text comes from: files of several kinds, read in pieces, and which of their documents validate."""
import codecs
import contextlib
import gzip
import hashlib
import json
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from data.messages import DataError, one_line
from data.tokenizer import EOT

# What archives make their readers raise: damaged ones the first four, zipfile a KeyError where the member is missing, and a
# RuntimeError where it is encrypted or packed in a way that it does not know.
UNPACKING = zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, KeyError, RuntimeError


@dataclass
class Source:
    """A file of text, or a text itself.

    start, stop: the part of a single text that counts, in characters; span: from which byte of the file to which it is read.
    most: of a file of many documents, bytes of text after which no further document is read. member: of a .zip, the file in it.
    form: the entry of READERS, where the file's name does not tell it.
    """
    name: str
    path: Path | None = None
    text: str | None = None
    start: int = 0
    stop: int | None = None
    most: float = math.inf
    member: str | None = None
    span: tuple[int, int] | None = None
    form: str | None = None
    done: float = 0.0                                   # share of it that has been read, for the progress line

    @property
    def kind(self):
        """The entry of READERS that reads it; "" for a single text."""
        if self.form is not None:
            return self.form
        return next((suffix for suffix in READERS if self.path and self.path.name.lower().endswith(suffix)), "")

    @property
    def is_text(self):
        """Whether all of it is one document."""
        return self.kind in ("", ".txt", ".txt.gz", "joined rows")

    @property
    def size(self):
        """In bytes, on the disk, or of the part that is read."""
        if self.span:
            return self.span[1] - self.span[0]
        return self.path.stat().st_size if self.path else len(self.text.encode("utf-8", "replace"))

    def identity(self):
        """Changes when the source does: its name, size, time of change and part, or the hash of its text."""
        part = self.start, self.stop, repr(self.most), self.member, self.span, self.form
        if self.path is None:
            return self.name, hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest(), *part
        stat = self.path.stat()
        return self.name, stat.st_size, stat.st_mtime_ns, *part

    @contextlib.contextmanager
    def open(self):
        """-> its bytes as a file, unpacked on the way, and a function that gives the share read. Raises DataError."""
        try:
            with open(self.path, "rb") as raw, contextlib.ExitStack() as stack:
                f = raw
                if self.member:
                    f = stack.enter_context(stack.enter_context(zipfile.ZipFile(raw)).open(self.member))
                elif self.path.name.lower().endswith(".gz"):
                    f = stack.enter_context(gzip.open(raw))
                whole = max(self.path.stat().st_size, 1)
                yield f, lambda: min(raw.tell() / whole, 1.0)
        except UNPACKING as e:
            raise DataError(f"{self.path} cannot be unpacked: {one_line(e)}") from None


def read_text(source, field):
    """One document: an iterator over blocks of it."""
    def part():
        at = 0
        for block in blocks_of(source):
            stop = len(block) if source.stop is None else min(len(block), source.stop - at)
            yield block[max(source.start - at, 0):max(stop, 0)]
            at += len(block)
    yield part()


def blocks_of(source):
    """The text of a source, in blocks. Raises DataError where it is not UTF-8."""
    if source.path is None:
        yield source.text
        return
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with source.open() as (f, share):
        for raw in raw_blocks(f, source.span):
            held = len(decoder.getstate()[0])           # the begun character of the block before
            try:
                # of a span, a character that the end of the file cuts off is left out
                block = decoder.decode(raw, final=not raw and source.span is None)
            except UnicodeDecodeError as e:
                at = done - held + e.start + (source.span[0] if source.span else 0)
                raise DataError(f"{source.path} is not UTF-8 text (byte {at}); convert it first") from None
            done += len(raw)
            source.done = done / source.size if source.span else share()
            yield block


def raw_blocks(f, span):
    """The bytes of a file in blocks, at last an empty one. span: those from a to b, each moved to where a character begins."""
    if span is None:
        while raw := f.read(2**20):
            yield raw
        yield b""
        return
    start, stop = span
    skipped = 0
    while skipped < start:
        block = f.read(min(2**20, start - skipped))
        if not block:
            raise DataError(f"a text that should have {stop:,} bytes has {skipped:,}")
        skipped += len(block)
    left, first = stop - start, start > 0
    while left:
        raw = f.read(min(2**20, left))
        if not raw:
            raise DataError(f"a text that should have {stop:,} bytes has {stop - left:,}")
        left -= len(raw)
        yield raw.lstrip(CONTINUE) if first else raw
        first = False
    rest = f.read(3)
    yield rest[:len(rest) - len(rest.lstrip(CONTINUE))]
    yield b""


CONTINUE = bytes(range(0x80, 0xc0))                     # bytes that continue a character


def read_separated(source, field):
    """Documents that <|endoftext|> separates."""
    rest = ""
    for block in blocks_of(source):
        *whole, rest = (rest + block).split(EOT)
        for text in whole:
            yield [text.strip("\n")]
        if len(rest) > MAX_LINE:
            raise DataError(f"{source.path} has no {EOT} in {MAX_LINE >> 20} million characters")
    if rest.strip():
        yield [rest.strip("\n")]


MAX_LINE = 2**26    # bytes of a line of .jsonl: together with its text about half a gigabyte


def read_jsonl(source, field):
    with source.open() as (f, share):
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
            source.done = share()
            yield [text]


def read_parquet(source, field):
    """Documents, one a row."""
    room = source.most
    for text in rows_of(source, field):
        if room <= 0:
            return
        room -= len(text.encode("utf-8", "replace"))
        yield [text]


def read_joined(source, field):
    """One document: all rows of a .parquet one after the other."""
    yield rows_of(source, field)


def rows_of(source, field):
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
                    yield text
    except (pyarrow.ArrowException, ValueError, IndexError, KeyError, OSError) as e:
        raise DataError(f"{source.path} cannot be read as .parquet with a column {field} (--field): {one_line(e)}") from None


READERS = {".txt": read_text, ".txt.gz": read_text, ".jsonl": read_jsonl, ".jsonl.gz": read_jsonl, ".parquet": read_parquet,
           "separated": read_separated, "joined rows": read_joined}
SUFFIXES = tuple(name for name in READERS if name.startswith("."))


def find_sources(paths):
    """Files, and all files under folders that READERS can read, in order of their names. Raises DataError, OSError."""
    sources = {}
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.name.lower().endswith(SUFFIXES) and f.is_file())
            if not files:
                raise DataError(f"{path} has no file that ends with {', '.join(SUFFIXES)}")
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


def split(sources, val=None, test=()):
    """-> {"train": (sources, pick), "val": (sources, pick)}; pick(source, number of the document) says which of theirs count.

    val: the names of sources to validate on. Otherwise it is a tenth, at most VAL_MOST bytes: of a single text its end; of
    several texts whole ones from the end; where files have many documents every tenth of those, the first included. test: the
    names of those kept for a third split, beside val.
    """
    if not sources:
        raise DataError("there is no text in the input")

    def every(source, number):
        return True

    if val is not None:
        rest = [s.name for s in sources if s.name not in val and s.name not in test]
        names = {"train": rest, "val": val, **({"test": test} if test else {})}
        return {name: ([s for s in sources if s.name in some], every) for name, some in names.items()}
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
