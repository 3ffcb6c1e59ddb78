"""Both hubs on 127.0.0.1, as far as their clients' downloads ask, with faults on request."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


@dataclass
class Hub:
    """What the server has, what it was asked, and what it does wrong."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)  # by repository/path
    gets: list[tuple[str, str | None]] = field(default_factory=list)  # file and Range of each GET
    sha256: str | None = None  # what it publishes as the hash of every file
    status: int | None = None  # answer everything with this
    cut_at: int | None = None  # break off the next answer after so many bytes ...
    down: bool = False  # ... and from then on every connection
    cut_each: int | None = None  # break off every answer after so many bytes
    busy: int = 0  # answer so often that it has too much to do, ...
    pause: str = "1"  # ... and when to come again
    endless: bool = False  # say nothing of how long an answer is, and never end it
    trickle: bool = False  # one byte every tenth of a second


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            self.close_connection = True
            name = file_name(self.path)
            content, wanted = hub.files.get(name), self.headers.get("Range")
            if with_body and content is not None:
                hub.gets.append((name, wanted))
            if hub.down:
                return
            if hub.status is not None or content is None:
                self.send_response(hub.status or 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if hub.busy:
                hub.busy -= 1
                self.send_response(429)
                self.send_header("Retry-After", hub.pause)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206 if wanted else 200)
            if not (with_body and hub.endless):
                self.send_header("Content-Length", str(len(content) - start))
            if wanted:
                last = len(content) - 1
                self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
            self.send_header("ETag", '"made-up"')
            if hub.sha256 is not None:
                self.send_header("X-Linked-ETag", f'"{hub.sha256}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if with_body:
                end = len(content) if hub.cut_at is None else hub.cut_at
                hub.down, hub.cut_at = hub.cut_at is not None, None
                if hub.cut_each is not None:
                    end = start + hub.cut_each
                if hub.endless or hub.trickle:
                    self.send_on(content[start:end])
                else:
                    self.wfile.write(content[start:end])

        def send_on(self, content: bytes) -> None:
            with suppress(OSError):  # nobody listens any more
                while hub.endless:
                    self.wfile.write(content)
                for byte in content:
                    if not hub.trickle:
                        return
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.1)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield hub
        hub.endless = hub.trickle = False
        server.shutdown()
        thread.join()


def file_name(path: str) -> str:
    """The repository and the path in it that ModelScope's or Hugging Face's address means."""
    parts = urlsplit(path)
    if parts.path.startswith("/api/v1/models/"):
        repository = parts.path.removeprefix("/api/v1/models/").removesuffix("/repo")
        return f"{repository}/{parse_qs(parts.query).get('FilePath', [''])[0]}"
    repository, _, rest = parts.path.removeprefix("/").partition("/resolve/")
    return f"{repository}/{rest.partition('/')[2]}"
