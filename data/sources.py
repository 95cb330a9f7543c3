"""Where text comes from: files of several kinds, read in pieces, and which of their documents validate."""
import codecs
import gzip
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from data.messages import DataError, one_line


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
        """The suffix of READERS that its name has; "" for a single text."""
        return next((suffix for suffix in READERS if self.path and self.path.name.lower().endswith(suffix)), "")

    @property
    def is_text(self):
        """Whether all of it is one document."""
        return self.kind in ("", ".txt")

    @property
    def size(self):
        """In bytes, on the disk."""
        return self.path.stat().st_size if self.path else len(self.text.encode("utf-8", "replace"))

    def identity(self):
        """Changes when the source does: its name, size, time of change and part, or the hash of its text."""
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
