"""Small official archives for tests, and a server on this machine that sends them whole or in many broken ways."""

import gzip
import io
import struct
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from residuum.data.archives import ARCHIVES, File, Source

COUNTS = (20, 10)


@dataclass
class Small:
    """An archive as small as it gets: its source, its files, and what they hold."""

    source: Source
    contents: dict[str, bytes]
    images: list[np.ndarray]
    labels: list[np.ndarray]

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.contents.items():
            (folder / name).write_bytes(content)
        return folder

    def at(self, url: str) -> Source:
        """The source with its files at another place."""
        return replace(self.source, files=tuple(replace(f, url=f"{url}/{f.name}") for f in self.source.files))

    def holding(self, name: str, content: bytes) -> "Small":
        """The same with another file, which is taken to be the official one."""
        contents = self.contents | {name: content}
        return replace(self, contents=contents, source=replace(self.source, files=_files(self.source, contents)))


def small(name: str) -> Small:
    source = next(source for source in ARCHIVES if source.name == name)
    draw = np.random.default_rng(sum(name.encode()))
    images = [draw.integers(0, 256, (n, *source.shape), dtype=np.uint8) for n in COUNTS]
    labels = [draw.integers(0, source.classes, n, dtype=np.uint8) for n in COUNTS]
    if name.startswith("cifar"):
        contents = {source.files[0].name: tar(cifar_members(name, images, labels, source.classes))}
    else:
        arrays = [a for x, y in zip(images, labels, strict=True) for a in (x[:, 0], y)]
        contents = {file.name: gzip.compress(idx(a), mtime=0) for file, a in zip(source.files, arrays, strict=True)}
    source = replace(source, counts=COUNTS)
    return Small(replace(source, files=_files(source, contents)), contents, images, labels)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def cifar_members(
    name: str, images: Sequence[np.ndarray], labels: Sequence[np.ndarray], classes: int
) -> dict[str, bytes]:
    """Files of a binary CIFAR archive; the coarse labels are the fine ones modulo 20."""
    rows = [
        [
            (bytes([y]) if name == "cifar10" else bytes([y % 20, y])) + pixels.tobytes()
            for pixels, y in zip(x, ys, strict=True)
        ]
        for x, ys in zip(images, labels, strict=True)
    ]
    names = "".join(f"class {i}\n" for i in range(classes)).encode()
    if name == "cifar100":
        parts = {"train.bin": b"".join(rows[0]), "test.bin": b"".join(rows[1]), "fine_label_names.txt": names}
        return {f"cifar-100-binary/{k}": v for k, v in ({"coarse_label_names.txt": b"x\n"} | parts).items()}
    size = len(rows[0]) // 5
    parts = {f"data_batch_{i + 1}.bin": b"".join(rows[0][i * size : (i + 1) * size]) for i in range(5)}
    parts |= {"test_batch.bin": b"".join(rows[1]), "batches.meta.txt": names + b"\n", "readme.html": b"x"}
    return {f"cifar-10-batches-bin/{k}": v for k, v in parts.items()}


def tar(members: dict[str, bytes], *, links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return gzip.compress(buffer.getvalue(), mtime=0)


def _files(source: Source, contents: dict[str, bytes]) -> tuple[File, ...]:
    held = [(file.url, contents[file.name]) for file in source.files]
    return tuple(File(url, md5(content).hexdigest(), len(content)) for url, content in held)


@dataclass
class Server:
    """A server that has been started.

    A path is MANNER/FILE. Manners: whole; short (ends well, half of the file); wrong (one byte changed); longer (one
    byte more); breaks (says the full length, sends half and hangs up); stalls (likewise, but never hangs up).
    Everything else does not exist.
    """

    url: str
    asked: list[str] = field(default_factory=list)
    half_sent: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving(contents: dict[str, bytes]) -> Iterator[Server]:
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append(self.path)
            manner, _, name = self.path.lstrip("/").partition("/")
            whole = contents.get(name, b"")
            half = whole[: len(whole) // 2]
            changed = half + bytes([whole[len(half)] ^ 1]) + whole[len(half) + 1 :] if whole else b""
            bodies = {"whole": whole, "short": half, "wrong": changed, "longer": whole + b"x"}
            body = bodies.get(manner, half if manner in ("breaks", "stalls") else None)
            if body is None or not whole:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole) if manner in ("breaks", "stalls") else len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
            server.half_sent.set()
            if manner == "stalls":
                stop.wait(60)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    machine = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{machine.server_port}")
    thread = threading.Thread(target=machine.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        machine.shutdown()
        thread.join()
        machine.server_close()
