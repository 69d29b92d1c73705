"""An archive of the npm registry is taken from an address or a file, and another one is refused."""

from __future__ import annotations

import base64
import hashlib
import io
import socket
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from classification.errors import UserError
from classification.system.npm import Package


def pack(path: Path, files: dict[str, bytes]) -> Package:
    """Write an archive as npm does, and return its description."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            about = tarfile.TarInfo(f"package/{name}")
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return Package("runs-networks", "1.2.3", f"sha512-{digest}")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of the folder on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_files_come_from_an_address_or_a_file(tmp_path: Path, served: str) -> None:
    package = pack(tmp_path / "a.tgz", {"dist/a.js": b"one", "dist/b.wasm": b"two", "README.md": b"three"})
    for place in (str(tmp_path / "a.tgz"), f"{served}/a.tgz"):
        assert package.read(["dist/b.wasm", "dist/a.js"], place) == {"dist/b.wasm": b"two", "dist/a.js": b"one"}
    assert package.address == "https://registry.npmjs.org/runs-networks/-/runs-networks-1.2.3.tgz"


def test_another_archive_is_refused(tmp_path: Path, served: str) -> None:
    package = pack(tmp_path / "a.tgz", {"a.js": b"one"})
    pack(tmp_path / "b.tgz", {"a.js": b"other"})
    for place in (str(tmp_path / "b.tgz"), f"{served}/b.tgz"):
        with pytest.raises(UserError, match=rf"--runtime {place} is not runs-networks 1.2.3: its sha512 hash differs"):
            package.read(["a.js"], place)


def test_without_a_network_it_says_what_to_type(tmp_path: Path, served: str) -> None:
    package = pack(tmp_path / "a.tgz", {})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/a.tgz"
    for place in (nobody, f"{served}/none.tgz"):
        with pytest.raises(UserError) as caught:
            package.read([], place)
        said = str(caught.value)
        assert said.startswith(f"{place} cannot be downloaded (") and "\n" not in said
        assert "type `npm pack runs-networks@1.2.3`" in said and said.endswith("give the file by --runtime FILE")
    with pytest.raises(UserError, match=r"--runtime .*none.tgz cannot be read \(No such file or directory\)"):
        package.read([], str(tmp_path / "none.tgz"))
