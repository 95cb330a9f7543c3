"""data/download.py against a server of our own: interrupted, refused, stalled, wrong, full, killed."""
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest

from data import download
from data.download import fetch
from data.messages import DataError
from tests import server as faults
from tests.helpers import ROOT, SLOW, mutated, survived
from tests.server import cut, raw, says, serving, stall

BODY = random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "STALL", 0.3)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with serving() as one:
        one.files["/file"] = BODY
        yield one


@pytest.fixture
def path(tmp_path):
    return tmp_path / "in" / "file"


def left(path):
    return sorted(f.name for f in path.parent.iterdir())


def failed(server, path, **known):
    with pytest.raises(DataError) as e:
        fetch(f"{server.address}/file", path, **known)
    assert "\n" not in str(e.value) and not path.exists()
    return str(e.value)


def test_a_file_is_fetched_once_and_pinned(server, path, capsys):
    for _ in range(2):
        assert fetch(f"{server.address}/file", path).read_bytes() == BODY
    assert len(server.asked) == 1 and left(path) == ["file", "file.sha256"]
    assert path.with_name("file.sha256").read_text() == f"{SHA}  file\n"        # what sha256sum --check reads
    assert "the publisher gives none" in capsys.readouterr().out
    path.write_bytes(BODY[:-1] + b"?")
    with pytest.raises(DataError, match="has changed since it was downloaded; delete it"):
        fetch(f"{server.address}/file", path)
    path.unlink()
    server.files["/file"] = BODY[::-1]
    assert "not the file it should be" in (said := failed(server, path)) and "first download" in said
    server.files["/file"] = BODY
    assert fetch(f"{server.address}/file", path).read_bytes() == BODY


@pytest.mark.parametrize("fault", [cut(70_000), stall(70_000, 0.5)], ids=["cut", "stall"])
def test_it_resumes_after_a_break(fault, server, path):
    """Three breaks: each part is sent once."""
    server.faults = [fault, fault, fault]
    assert fetch(f"{server.address}/file", path, len(BODY), SHA).read_bytes() == BODY
    assert server.asked == [("/file", r) for r in (None, "bytes=70000-", "bytes=140000-", "bytes=210000-")]
    assert server.sent == len(BODY)


def test_a_later_call_resumes(server, path):
    server.faults = [cut(100_000)] + [raw(b"")] * 20
    assert "stopped after 100,000 of 300,000 bytes" in (said := failed(server, path)) and "resumes from there" in said
    assert left(path) == [".file.json", ".file.part"]
    server.faults, server.asked[:] = [], []
    assert fetch(f"{server.address}/file", path).read_bytes() == BODY and server.asked == [("/file", "bytes=100000-")]


@pytest.mark.parametrize("tags", [True, False])
def test_ranges_are_refused(tags, server, path):
    """It starts over, and gives up only when nothing new has come several times."""
    server.ranges, server.tags = False, tags
    server.faults = [cut(100_000), cut(120_000)]
    assert fetch(f"{server.address}/file", path).read_bytes() == BODY and len(server.asked) == 3
    path.unlink()
    path.with_name("file.sha256").unlink()
    server.faults, server.asked[:] = [cut(100_000 + i % 2) for i in range(99)], []
    assert "stopped after" in failed(server, path)
    assert len(server.asked) == len(download.PAUSES) + 3


def test_the_file_changes_between_two_parts(server, path):
    """By its ETag; or, where the server hides that, by the checksum."""
    new = BODY[::-1]

    def change(handler, _):
        handler.server.files["/file"] = new
        return cut(100_000)(handler, BODY)

    server.faults = [change]
    assert fetch(f"{server.address}/file", path).read_bytes() == new and server.asked[1] == ("/file", "bytes=100000-")
    path.unlink()
    server.files["/file"], server.faults = new, [cut(100_000), lambda handler, _: cut(len(BODY))(handler, BODY)]
    assert "its sha256 is" in failed(server, path, sha256=hashlib.sha256(new).hexdigest())
    assert left(path) == ["file.sha256"]                # what was wrong is not resumed


@pytest.mark.parametrize("known, fault, message", [
    (dict(size=299_999), None, "it has 300,000 bytes, not 299,999"),
    (dict(size=300_001), None, "it has 300,000 bytes, not 300,001"),
    (dict(sha256="0" * 64), None, "its sha256 is"),
    (dict(size=10), says(200, BODY, -1), "it has more than 10 bytes"),
    (dict(), faults.endless, "it has more than 1,000,000 bytes"),
    (dict(), says(404), "404 Not Found"), (dict(), says(403), "403 Forbidden"), (dict(), says(401), "401"),
    (dict(), says(302, Location="/file2"), "404"), (dict(), says(302, Location="file:///etc/passwd"), "not allowed"),
    (dict(), says(302, Location="ftp://127.0.0.1/x"), "not followed"), (dict(), says(302, Location="http://[/"), "cannot be had"),
    (dict(), says(200, BODY, Content_Encoding="gzip"), "encoding that was not asked for")])
def test_wrong_files_are_refused(known, fault, message, server, path, monkeypatch):
    monkeypatch.setattr(download, "LARGEST", 10**6)
    server.faults = [fault] if fault else []
    assert message in failed(server, path, **known)


@pytest.mark.parametrize("fault", [says(500), says(503), says(429), raw(b""), raw(b"\0\xff nonsense\r\n\r\n"),
                                   raw(b"HTTP/1.1 200\r\n"), says(200, BODY, -1), says(206, b"abc"),
                                   raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"),
                                   raw(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n")])
def test_what_may_pass_is_tried_again(fault, server, path):
    server.faults = [fault, fault]
    assert fetch(f"{server.address}/file", path).read_bytes() == BODY and len(server.asked) == 3
    path.unlink()
    server.faults = [fault] * 50
    assert "stopped after" in failed(server, path)


def test_redirects_are_followed_but_not_into_the_open(server, path):
    server.files.update({"/a": "/b", "/b": f"{server.address}/file", "/loop": "/loop"})
    assert fetch(f"{server.address}/a", path, sha256=SHA).read_bytes() == BODY
    with pytest.raises(DataError, match="cannot be had: 302"):
        fetch(f"{server.address}/loop", path.with_name("loop"))
    asked = download.urllib.request.Request("https://example.org/a")
    with pytest.raises(DataError, match="not followed"):
        download.Redirects().redirect_request(asked, None, 302, "", {}, "http://example.org/b")
    assert download.Redirects().redirect_request(asked, None, 302, "", {}, "https://example.org/b").type == "https"
    for address in ("file:///etc/passwd", "nonsense", "", "http://", "http://[x", "http://a b/"):
        with pytest.raises(DataError):
            fetch(address, path.with_name("other"), pauses=())
    assert left(path) == ["file", "file.sha256"]


def test_progress_with_the_time_left(server, path, monkeypatch, capsys):
    """A line for every ten seconds, here of a clock of our own: a second for each look."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(download.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(download, "BLOCK", 10_000)
    server.files["/file"] = BODY
    fetch(f"{server.address}/file", path)
    left = re.findall(r"data: file 0 of 0 MB, (\d+) s left, [\d.]+ MB/s", capsys.readouterr().out)
    assert len(left) >= 2 and list(map(int, left)) == sorted(map(int, left), reverse=True)


def test_too_little_room(server, path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(1000))
    assert "0.00 GB free" in failed(server, path) and server.sent <= len(BODY)


def child(server, path, limit=None):
    """fetch in a process of its own, which cannot write files beyond `limit` bytes."""
    code = f"""
import resource, signal, sys
from pathlib import Path
from data import download
if {limit}:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    download.fetch(sys.argv[1], Path(sys.argv[2]))
except download.DataError as e:
    sys.exit(str(e))
"""
    return subprocess.Popen([sys.executable, "-c", code, f"{server.address}/file", str(path)], cwd=ROOT, stderr=subprocess.PIPE,
                            stdout=subprocess.DEVNULL, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="limits on the size of files are for Unix")
def test_a_disk_that_fills(server, path):
    server.files["/file"] = body = BODY * 20
    process = child(server, path, limit=2**21)
    assert "cannot be written: File too large; what has come is kept" in process.communicate()[1] and process.returncode == 1
    kept = path.with_name(".file.part").stat().st_size
    assert 2**20 <= kept <= 2**21 and not path.exists()
    assert fetch(f"{server.address}/file", path).read_bytes() == body and server.asked[-1] == ("/file", f"bytes={kept}-")


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is for Unix")
def test_a_killed_download_resumes(server, path):
    server.faults = [stall(200_000, 20)]
    process = child(server, path)
    part, end = path.with_name(".file.part"), time.perf_counter() + 60
    while not (part.exists() and part.stat().st_size) and process.poll() is None and time.perf_counter() < end:
        os.sched_yield()
    process.kill()
    process.communicate()
    assert not path.exists() and path.with_name(".file.lock").exists()          # a lock that no one holds is no hindrance
    assert fetch(f"{server.address}/file", path).read_bytes() == BODY and left(path) == ["file", "file.sha256"]


def test_two_downloads_of_one_file_do_not_mix(server, path):
    pytest.importorskip("fcntl", reason="locks on files are for Unix")
    path.parent.mkdir()
    with download.locked(path.with_name(".file.lock")):
        assert "another process" in failed(server, path)


@pytest.mark.slow
def test_any_answer_at_all(server, path, monkeypatch):
    """Random answers, notes and parts: it is the right file, or one line says why not, and nothing wrong has its name."""
    monkeypatch.setattr(download, "PAUSES", (0, 0))
    g, n, fine, said = random.Random(0), 2000 if SLOW else 150, 0, []
    whole = f"HTTP/1.1 200 OK\r\nContent-Length: {len(BODY)}\r\nETag: \"x\"\r\n\r\n".encode() + BODY
    kinds = (lambda: cut(g.randrange(len(BODY))), lambda: raw(mutated(whole[:g.randrange(200, 2000)], g)[1]),
             lambda: says(g.choice([200, 204, 206, 301, 304, 307, 416, 418, 451, 500]), BODY[:g.randrange(99)],
                          g.choice([None, -1, 7]), ETag=g.choice(['"x"', "W/x", ""]),
                          Location=g.choice(["/file", "/loop", "//x", "\x7f"]),
                          Content_Range=g.choice(["bytes 0-1/2", "bytes 9999999999999999999-", "x"])),
             lambda: raw(mutated(whole, g)[1]), lambda: lambda handler, body: False)
    for _ in range(n):
        server.faults = [g.choice(kinds)() for _ in range(g.randrange(1, 9))]
        if g.random() < 0.3 and (part := path.with_name(".file.part")).exists():
            note = part.with_name(".file.json")
            for file in (part, note):
                if file.exists() and file.stat().st_size:
                    file.write_bytes(mutated(file.read_bytes(), g)[1])
        try:
            assert fetch(f"{server.address}/file", path, g.choice([len(BODY), None]), SHA).read_bytes() == BODY
            path.unlink()
            fine += 1
        except DataError as e:
            said.append(str(e))
            assert not path.exists()
    assert all(line.isprintable() and len(line) < 600 for line in said)
    assert 0.2 * n < fine < n
    survived("downloads", answers=n, fetched=fine)
