"""A small HTTP server in a thread for the tests, which serves files well or in every wrong way."""
import contextlib
import hashlib
import http.server
import json
import threading
import time


class Server(http.server.ThreadingHTTPServer):
    """files: {path: bytes}. faults: one function per request to come, fault(handler, body) -> whether it has answered.

    asked: (path, Range or None) of each request. ranges: whether it knows them. sent: bytes of bodies.
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked, self.ranges, self.sent, self.tags = {}, [], [], True, 0, True

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, address):
        """A client that has gone is no error here."""

    def hub(self, repository, folder, files):
        """Serve files as the Hugging Face hub does: a listing with sizes and checksums, and a redirect to each."""
        listing = []
        for name, body in files.items():
            path = f"{folder}/{name}".lstrip("/")
            self.files[f"/store/{name}"] = body
            self.files[f"/datasets/{repository}/resolve/main/{path}"] = f"/store/{name}"
            listing.append({"type": "file", "path": path, "size": len(body), "lfs": {"oid": hashlib.sha256(body).hexdigest()}})
        self.files[f"/api/datasets/{repository}/tree/main/{folder}".rstrip("/")] = json.dumps(listing).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append((self.path, asked))
        body = server.files.get(self.path)
        if server.faults and server.faults.pop(0)(self, body):
            self.close_connection = True
            return
        if body is None:
            self.send_error(404)
        elif isinstance(body, str):
            self.answer(302, b"", Location=body)
        else:
            tag, start = f'"{hashlib.md5(body).hexdigest()}"', 0
            if asked and server.ranges and self.headers.get("If-Range") in (None, tag):
                start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(body) > 0:
                self.answer(416, b"")
                return
            more = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
            self.answer(206 if start else 200, body[start:], **({"ETag": tag} if server.tags else {}), **more)

    def answer(self, status, body, length=None, **headers):
        """Send status, headers and body. length: what Content-Length says, if it is not the body's; -1: none."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if length != -1:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.server.sent += len(body)
        with contextlib.suppress(OSError):
            self.wfile.write(body)


@contextlib.contextmanager
def serving():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------------------------------------------------ faults

def cut(n):
    """The connection ends after n bytes of the body that was asked for."""
    def fault(handler, body):
        start = int((handler.headers.get("Range") or "bytes=0-")[6:-1]) if handler.server.ranges else 0
        rest, tag = body[start:], f'"{hashlib.md5(body).hexdigest()}"'
        more = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        handler.answer(206 if start else 200, rest[:n], len(rest), ETag=tag, **more)
        return True
    return fault


def stall(n, seconds):
    """Nothing comes for some seconds after n bytes."""
    def fault(handler, body):
        cut(n)(handler, body)
        handler.wfile.flush()
        time.sleep(seconds)
        return True
    return fault


def says(status, body=b"", length=None, **headers):
    def fault(handler, _):
        handler.answer(status, body, length, **{name.replace("_", "-"): value for name, value in headers.items()})
        return True
    return fault


def raw(words):
    """Bytes that need not be HTTP."""
    def fault(handler, _):
        with contextlib.suppress(OSError):
            handler.wfile.write(words)
        return True
    return fault


def endless(handler, _):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(10000):
            handler.wfile.write(b"10000\r\n" + b"x" * 2**16 + b"\r\n")
    return True
