"""A package of the npm registry, whose files a user asks for: read from an address or a file, and checked."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from classification.errors import UserError

REGISTRY = "https://registry.npmjs.org"
SECONDS = 60  # that a server may be silent
LARGEST = 200_000_000  # bytes of an archive


@dataclass(frozen=True)
class Package:
    """A version of a package.

    Args:
        name: of the registry.
        version: one that is published.
        integrity: "sha512-" and the digest of its archive in base64, as the registry states it.
    """

    name: str
    version: str
    integrity: str

    @property
    def address(self) -> str:
        """Its archive in the registry."""
        return f"{REGISTRY}/{self.name}/-/{self.name}-{self.version}.tgz"

    def read(self, names: Sequence[str], place: str | None = None, option: str = "--runtime") -> dict[str, bytes]:
        """Return files of the package by name.

        Args:
            names: their paths inside of it.
            place: address or file of the archive; None for that of the registry.
            option: that names it, for the messages.

        Raises:
            UserError: the archive cannot be had, or is another one.
        """
        place = place or self.address
        content = self._download(place, option) if place.startswith(("http://", "https://")) else _file(place, option)
        kind, _, digest = self.integrity.partition("-")
        if base64.b64encode(hashlib.new(kind, content).digest()).decode() != digest:
            raise UserError(
                f"{option} {place} is not {self.name} {self.version}: its {kind} hash differs from the known one; give "
                f"the file that `npm pack {self.name}@{self.version}` writes"
            )
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            files = (archive.extractfile(f"package/{name}") for name in names)
            return {name: file.read() for name, file in zip(names, files, strict=True) if file is not None}

    def _download(self, address: str, option: str) -> bytes:
        try:
            with urllib.request.urlopen(address, timeout=SECONDS) as answer:
                content: bytes = answer.read(LARGEST)
                return content
        except (OSError, HTTPException, ValueError) as error:
            cause = getattr(error, "reason", None) or error
            raise UserError(
                f"{address} cannot be downloaded ({cause}): where there is a network, type `npm pack "
                f"{self.name}@{self.version}` or download {self.address}, and give the file by {option} FILE"
            ) from error


def _file(path: str, option: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{option} {path} cannot be read ({cause}): give an address or a file") from error
