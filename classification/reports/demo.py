"""The files of a static page that classifies pictures in the browser."""

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
MEMBERS = (CODE, LOADER, PROGRAM)  # files of the package that the page needs


@dataclass(frozen=True)
class DemoNetwork:
    """A network of the page.

    Args:
        role: its heading, such as "Student".
        arch: its name.
        classes: class names in order of index, or None.
        preprocessing: of its images.
        content: an ONNX file that takes bytes.
    """

    role: str
    arch: str
    classes: Sequence[str] | None
    preprocessing: Preprocessing
    content: bytes

    @property
    def facts(self) -> str:
        """Its name and size, in one line."""
        return f"{self.arch}, {len(self.content) / 1e6:.2f} MB"


def recorded_teacher(checkpoint: Path) -> tuple[Path, str | None] | None:
    """Return (file, architecture) of the first teacher of a checkpoint's run whose file still exists, or None."""
    try:
        (run,) = read_runs([checkpoint.parent])
    except UserError:  # the checkpoint is not in a run folder
        return None
    files = ((path, spec.get("arch")) for spec, path in teacher_files(run) if path is not None and is_file(path))
    return next(files, None)


def demo_files(networks: Sequence[DemoNetwork], runtime: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return {name: content} of the files; `index.html` is the page.

    Args:
        networks: shown side by side in this order.
        runtime: the files `MEMBERS` of onnxruntime-web.
    """
    encoded = {"mjs": _text(runtime[LOADER]), "wasm": _text(runtime[PROGRAM])}
    files = {"runtime.js": runtime[CODE] + f"\n;const RUNTIME = {json.dumps(encoded)};\nconst MODELS = [];\n".encode()}
    for network in networks:
        files[f"{network.role.lower()}.js"] = f"MODELS.push({json.dumps(_text(network.content))});\n".encode()
    return {"index.html": _page(networks).encode(), **files}


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _page(networks: Sequence[DemoNetwork]) -> str:
    descriptions = [
        {"role": n.role, "facts": n.facts, "classes": list(n.classes or ()), "seen": n.preprocessing.describe()}
        for n in networks
    ]
    are_several = len(networks) > 1
    names = " and ".join(f"{network.role.lower()} {network.arch}" for network in networks)
    parts = {
        "title": "What is on the picture?",
        "about": html.escape(
            f"The {names} classify it side by side." if are_several else f"The {names} classifies it."
        ),
        "style": (HERE / "demo.css").read_text(),
        # The name of a class may contain </script>.
        "content": json.dumps({"networks": descriptions}).replace("<", "\\u003c"),
        "scripts": "\n".join(f'<script src="{network.role.lower()}.js"></script>' for network in networks),
        "script": (HERE / "demo.js").read_text(),
    }
    head, *rest = (HERE / "demo.html").read_text().split("[[")
    return head + "".join(parts[name] + text for name, _, text in (part.partition("]]") for part in rest))
