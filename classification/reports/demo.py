"""A static page that classifies pictures in the browser: the files of its folder."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.paths import is_file
from classification.reports.groups import teacher_files
from classification.reports.records import read_runs
from classification.system.npm import Package

HERE = Path(__file__).parent
RUNTIME = Package(
    "onnxruntime-web",
    "1.30.0",
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
)
CODE, LOADER, PROGRAM = (
    f"dist/{name}" for name in ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
)
MEMBERS = (CODE, LOADER, PROGRAM)  # of the package


@dataclass(frozen=True)
class Shown:
    """A network of the page.

    Args:
        role: its heading, as "Student".
        arch: its name.
        classes: names in order of index, or None.
        preprocessing: what it sees of an image.
        content: an ONNX file that takes bytes.
    """

    role: str
    arch: str
    classes: Sequence[str] | None
    preprocessing: Preprocessing
    content: bytes

    @property
    def facts(self) -> str:
        """Its name and size in a line."""
        return f"{self.arch}, {len(self.content) / 1e6:.2f} MB"


def recorded_teacher(checkpoint: Path) -> tuple[Path, str | None] | None:
    """Return file and network of the first teacher that the run of a checkpoint names and that is still there."""
    try:
        (run,) = read_runs([checkpoint.parent])
    except UserError:  # it is of no run
        return None
    files = ((path, spec.get("arch")) for spec, path in teacher_files(run) if path is not None and is_file(path))
    return next(files, None)


def demo_files(networks: Sequence[Shown], runtime: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files of the page by name; `index.html` is the page.

    Args:
        networks: side by side, in this order.
        runtime: `MEMBERS` of onnxruntime-web.
    """
    packed = {"mjs": _text(runtime[LOADER]), "wasm": _text(runtime[PROGRAM])}
    files = {"runtime.js": runtime[CODE] + f"\n;const RUNTIME = {json.dumps(packed)};\nconst MODELS = [];\n".encode()}
    for shown in networks:
        files[f"{shown.role.lower()}.js"] = f"MODELS.push({json.dumps(_text(shown.content))});\n".encode()
    return {"index.html": _page(networks).encode(), **files}


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _page(networks: Sequence[Shown]) -> str:
    described = [
        {"role": n.role, "facts": n.facts, "classes": list(n.classes or ()), "seen": n.preprocessing.describe()}
        for n in networks
    ]
    several = len(networks) > 1
    names = " and ".join(f"{shown.role.lower()} {shown.arch}" for shown in networks)
    parts = {
        "title": "What is on the picture?",
        "about": html.escape(f"The {names} classify it side by side." if several else f"The {names} classifies it."),
        "style": (HERE / "demo.css").read_text(),
        # A name of a class may hold what ends a script.
        "content": json.dumps({"networks": described}).replace("<", "\\u003c"),
        "scripts": "\n".join(f'<script src="{shown.role.lower()}.js"></script>' for shown in networks),
        "script": (HERE / "demo.js").read_text(),
    }
    head, *rest = (HERE / "demo.html").read_text().split("[[")
    return head + "".join(parts[name] + text for name, _, text in (part.partition("]]") for part in rest))
