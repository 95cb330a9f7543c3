"""Fetch a file over HTTP: in pieces, from where an earlier call stopped, checked before it gets its name.

While it is incomplete it is .NAME.part, with what is known of it in .NAME.json beside it. When it has its size and its checksum
it becomes NAME, and NAME.sha256 keeps the checksum: the publisher's, or that of the first download, which later ones must equal.
"""
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request

from data.messages import DataError, one_line, printable
from data.token_files import file_hash, write_json

try:
    import fcntl
except ImportError:                                     # locks on files are for Unix
    fcntl = None

BLOCK, STALL = 2**20, 30        # bytes read at once, seconds without any after which a connection is given up
PAUSES = 1, 2, 4, 8, 16         # seconds before trying again; after so many tries without anything new it is given up
LARGEST = 2**36                 # bytes of a file whose size no one says
AGENT = {"User-Agent": "fmem", "Accept-Encoding": "identity"}


class Broken(Exception):
    """A connection that ended, or a server that is busy: the next try may do better."""


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to something else."""

    def redirect_request(self, asked, answer, code, message, headers, url):
        if not url.startswith("https:" if asked.type == "https" else ("http:", "https:")):
            raise DataError(f"{asked.full_url} redirects to {url[:100]}, which is not followed")
        return super().redirect_request(asked, answer, code, message, headers, url)


@contextlib.contextmanager
def locked(path):
    """Only one process at a time gets in here with the same path. Raises DataError in the others."""
    with open(path, "w") as lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DataError(f"{path} is held by another process that makes the same; wait for it") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def request(url, headers=()):
    """The server's answer, one that says 416 (nothing there in this range) included. Raises Broken, DataError."""
    if not url.startswith(("http://", "https://")):
        raise DataError(f"{url} is no address of http or https")
    opener = urllib.request.build_opener(Redirects)
    try:
        return opener.open(urllib.request.Request(url, headers={**AGENT, **dict(headers)}), timeout=STALL)
    except urllib.error.HTTPError as e:
        if e.code == 416:
            return e
        why = f"{e.code} {one_line(e.reason)}"
        if e.code == 429 or e.code >= 500:
            raise Broken(why) from None
        raise DataError(f"{url} cannot be had: {why}") from None
    except (OSError, http.client.HTTPException) as e:
        why = getattr(e, "reason", e)
        if isinstance(why, socket.gaierror):            # waiting does not bring back a network, or mend a name
            raise DataError(f"{url} cannot be had: {one_line(why)}; is there a network?") from None
        raise Broken(one_line(why)) from None
    except DataError:
        raise
    except ValueError as e:
        raise DataError(f"{url} cannot be had: {one_line(e)}") from None


def received(answer):
    """The body of an answer, in pieces. Raises Broken."""
    try:
        while block := answer.read1(BLOCK):
            yield block
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise Broken(one_line(e)) from None


def fetch_json(url, most=2**24):
    """What a server answers, as JSON of at most so many bytes. Raises DataError."""
    raw = b""
    try:
        with request(url) as answer:
            for block in received(answer):
                raw += block
                if len(raw) > most:
                    raise ValueError("it is too long")
        return json.loads(raw)
    except DataError:
        raise
    except (Broken, ValueError, RecursionError) as e:
        raise DataError(f"{url} cannot be had: {one_line(e)}") from None


def fetch(url, path, size=None, sha256=None, pauses=PAUSES):
    """Make sure that the file `path` is what `url` gives; returns path. size in bytes and sha256, where they are known.
    pauses: seconds before each further try, as long as nothing comes.

    Raises DataError, one line, if it cannot be had or is not what it should be; OSError for a full disk. What has come so far is
    kept then, and the next call resumes from it, if the server knows ranges and still has the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        pin = path.with_name(f"{path.name}.sha256")
        pinned = pin.read_text(errors="replace").split()[:1] if pin.is_file() else []
        wanted = sha256 or (pinned or [None])[0]
        if path.is_file() and (size is None or path.stat().st_size == size) and wanted == file_hash(path):
            return path
        if path.exists() and pinned:
            raise DataError(f"{path} has changed since it was downloaded; delete it and run the same command again")
        part = Part(url, path, size)
        part.complete(pauses)
        if wanted and part.sha256 != wanted:
            part.remove()
            raise DataError(f"{url} is not the file it should be: its sha256 is {part.sha256}, not {wanted}" +
                            ("" if sha256 else f", that of the first download; delete {pin} if the change is meant"))
        print(printable(f"data: {path.name} is here, {part.have:,} bytes, sha256 {part.sha256[:16]}... " +
                        ("as the publisher says" if sha256 else "as before" if pinned else
                         "(the publisher gives none: kept, to compare later downloads with)")), flush=True)
        pin.write_text(f"{part.sha256}  {path.name}\n")
        os.replace(part.file, path)
        part.remove()
        return path


class Part:
    """The part of a file that is here already: `have` bytes of `size` (None: not known), and the sha256 of them."""

    def __init__(self, url, path, size):
        self.url, self.name, self.size, self.given = url, path.name, size, size
        self.file, self.note = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.json")
        self.total, self.have, self.version = hashlib.sha256(), 0, None
        try:
            known = json.loads(self.note.read_text())
            whole = type(known["version"]) is str and known["url"] == url and self.file.is_file()
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if whole:
            self.version = known["version"]
            with open(self.file, "rb") as f:
                while block := f.read(BLOCK):
                    self.add(block)
        self.begun, self.start = self.have, time.perf_counter()
        self.last = self.start

    @property
    def sha256(self):
        return self.total.hexdigest()

    def add(self, block):
        self.total.update(block)
        self.have += len(block)

    def again(self):
        """Forget what is here: it is of another version of the file, or the server sends it from its start."""
        self.total, self.have, self.begun, self.version = hashlib.sha256(), 0, 0, None

    def remove(self):
        for file in (self.file, self.note):
            file.unlink(missing_ok=True)

    def complete(self, pauses):
        """Fetch the rest, as often as it takes, as long as something comes. Raises DataError."""
        most, vain = self.have, 0
        while True:
            why = "the connection ended"
            try:
                if self.receive():
                    return
            except Broken as e:
                why = str(e)
            most, vain = max(most, self.have), 0 if self.have > most else vain + 1
            if vain > len(pauses):
                at = f"after {self.have:,}{f' of {self.size:,}' if self.size else ''} bytes"
                raise DataError(f"{self.url} stopped {at}: {why}; the same command resumes from there")
            pause = pauses[max(vain - 1, 0)] if pauses else 0
            print(printable(f"data: {self.name}: {why}; once more in {pause} s"), file=sys.stderr, flush=True)
            time.sleep(pause)

    def receive(self):
        """One request for what is missing. -> whether the file is complete. Raises Broken, DataError."""
        if self.size is not None and self.have == self.size:
            return True
        ranged = {"Range": f"bytes={self.have}-", "If-Range": self.version} if self.have and self.version else {}
        if not ranged:
            self.again()
        with request(self.url, ranged) as answer:       # an http.client.HTTPResponse
            start = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range") or "")
            if answer.status == 416 or (answer.status == 206 and not (start and int(start[1]) == self.have)):
                self.again()                            # not the rest of what is here
                raise Broken(f"the server answers {answer.status} to a request for the rest")
            if answer.status == 200:                    # it does not know ranges, or has another version
                self.again()
            elif answer.status != 206 or not ranged:
                raise Broken(f"the server answers {answer.status}")
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise DataError(f"{self.url} comes in an encoding that was not asked for")
            length = answer.headers.get("Content-Length") or ""
            says = self.have + int(length) if re.fullmatch("[0-9]{1,18}", length) else None
            if None not in (self.given, says) and says != self.given:
                raise DataError(f"{self.url} is not the file it should be: it has {says:,} bytes, not {self.given:,}")
            self.size = self.given if says is None else says
            if self.size is None and not answer.chunked:        # half of it would look like the whole
                raise Broken("the server does not say how long the file is")
            self.version = self.version or strong(answer.headers)
            try:
                self.keep(answer)
            except OSError as e:
                raise DataError(f"{self.file} cannot be written: {e.strerror or one_line(e)}; what has come is kept, the same "
                                f"command resumes from there") from None
        return self.size is None or self.have == self.size

    def keep(self, answer):
        """Append what comes to the file. Raises Broken, DataError, OSError."""
        free, most = shutil.disk_usage(self.file.parent).free, LARGEST if self.size is None else self.size
        if self.size is not None and self.size - self.have > free:
            raise DataError(f"{self.name} needs {(self.size - self.have) / 1e9:.2f} GB more, {self.file.parent} has "
                            f"{free / 1e9:.2f} GB free")
        write_json(self.note, {"url": self.url, "version": self.version})
        with open(self.file, "ab" if self.have else "wb") as f:
            for block in received(answer):
                if self.have + len(block) > most:
                    raise DataError(f"{self.url} is not the file it should be: it has more than {most:,} bytes")
                f.write(block)
                self.add(block)
                self.progress()
            f.flush()
            os.fsync(f.fileno())

    def progress(self):
        """A line every ten seconds."""
        now = time.perf_counter()
        if now - self.last >= 10:
            speed = (self.have - self.begun) / (now - self.start)
            left = f" of {self.size / 1e6:,.0f} MB, {(self.size - self.have) / max(speed, 1):,.0f} s left" if self.size else " MB"
            print(f"data: {self.name} {self.have / 1e6:,.0f}{left}, {speed / 1e6:.1f} MB/s", flush=True)
            self.last = now


def strong(headers):
    """What tells two versions of a file apart: a strong ETag, else the time of its change; None if the server says neither."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")
