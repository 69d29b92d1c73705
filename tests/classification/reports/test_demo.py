"""The page that classifies pictures in the browser: what it shows, and that networks see what they see here."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from classification.data import read_image
from classification.data.images import to_bytes
from classification.data.preprocessing import Preprocessing
from classification.export import export_demo, main, missing_packages, parse
from classification.models.trained import open_trained
from classification.reports.demo import CODE, LOADER, MEMBERS, PROGRAM, DemoNetwork, demo_files, recorded_teacher
from tests.classification.conftest import CLASSES, STUDENT, TEACHER
from tests.classification.system.test_npm import pack

# In the place of onnxruntime-web: the bytes of a "network" are its logits, and what it is given is kept.
STUB = b"""
const given = [];
const ort = {
  env: { wasm: {} },
  Tensor: class { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } },
  InferenceSession: { create: async (content) => ({ run: async ({ images }) => {
    given.push([images.type, images.dims, Array.from(images.data)]);
    return { logits: { data: Float32Array.from(content) } };
  } }) },
};
"""
FILES = {CODE: STUB, LOADER: b"export default 1;", PROGRAM: b"\0asm"}
NAMES = ["<script>document.title = 'hit'</script>", "b & c", "d"]
needs_onnx = pytest.mark.skipif(bool(missing_packages("onnx")), reason="needs the packages of the extra [export]")


def opened(browser: Any, folder: Path, networks: list[DemoNetwork], width: int = 1280, theme: str = "light") -> None:
    """Write the page, and open it as from a disk."""
    for name, content in demo_files(networks, FILES).items():
        (folder / name).write_bytes(content)
    show(browser, folder, width, theme)


def show(browser: Any, folder: Path, width: int = 1280, theme: str = "light") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((folder / "index.html").as_uri())
    assert wait(browser, "return document.documentElement.dataset.ready") == "yes"


def choose(browser: Any, path: Path) -> str:
    """Choose a picture; return what the page says."""
    browser.execute_script("document.getElementById('verdict').textContent = ''")
    browser.find_element("id", "file").send_keys(str(path))
    return str(wait(browser, "return document.getElementById('verdict').textContent"))


def wait(browser: Any, script: str) -> Any:
    """Return what a script returns, once that is something."""
    until = time.monotonic() + 30
    while not (found := browser.execute_script(script)) and time.monotonic() < until:
        time.sleep(0.02)
    return found


def noise(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8), mode).save(path)
    return path


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_two_networks_side_by_side(browser: Any, tmp_path: Path, width: int, theme: str) -> None:
    seen = Preprocessing.of(8)
    networks = [
        DemoNetwork("Student", "small", NAMES, seen, bytes([1, 5, 2])),
        DemoNetwork("Teacher", "x", None, seen, bytes([9, 0, 7])),
    ]
    opened(browser, tmp_path, networks, width, theme)
    assert choose(browser, noise(tmp_path / "a.png", 30, 20)) == "The student says: b & c. The teacher says: class 0"
    lines = [line.text.split("\n") for line in browser.find_elements("css selector", "section li")]
    # e^5 / (e^1 + e^5 + e^2) = 0.9362, e^2 / ... = 0.0466, e^1 / ... = 0.0171; e^9 / (e^9 + 1 + e^7) = 0.8807
    assert lines[:3] == [["b & c", "93.6 %"], ["d", "4.7 %"], [NAMES[0], "1.7 %"]] and lines[3] == ["class 0", "88.1 %"]
    assert choose(browser, noise(tmp_path / "a.bmp", 3, 4)).startswith("The student says")
    (tmp_path / "text.png").write_text("no picture")
    assert choose(browser, tmp_path / "text.png").startswith("text.png is no picture that this browser can read")
    assert browser.get_log("browser") == [] and browser.title == "What is on the picture?"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    tops = [part.location["y"] for part in browser.find_elements("tag name", "section")]
    assert tops[0] == tops[1]
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (theme == "light")


SEEN = [
    Preprocessing(16, 18, "center", "bilinear"),
    Preprocessing(8, 9, "squash", "bicubic"),
    Preprocessing(12, 12, "center", "nearest"),
    Preprocessing(60, 64, "center", "bicubic"),
]


@pytest.mark.parametrize(("width", "height", "mode"), [(41, 30, "RGB"), (17, 18, "RGB"), (18, 33, "RGBA")])
def test_a_network_sees_the_pixels_that_it_sees_here(
    browser: Any, tmp_path: Path, width: int, height: int, mode: str
) -> None:
    path = noise(tmp_path / "a.png", width, height, mode)
    opened(browser, tmp_path, [DemoNetwork(f"N{i}", "x", NAMES, seen, bytes([1, 2])) for i, seen in enumerate(SEEN)])
    browser.execute_script("given.length = 0")
    choose(browser, path)
    given = json.loads(browser.execute_script("return JSON.stringify(given)"))
    assert [(kind, dims) for kind, dims, _ in given] == [
        ("uint8", [1, 3, seen.img_size, seen.img_size]) for seen in SEEN
    ]
    for seen, (_, dims, data) in zip(SEEN, given, strict=True):
        expected = seen.transform()(to_bytes(read_image(str(path))).permute(2, 0, 1))
        gap = (torch.tensor(data).view(dims[1:]) - expected.int()).abs()
        assert gap.max() <= 2 and gap.float().mean() < 0.1, seen  # torch rounds its weights, too


@needs_onnx
def test_the_command_writes_the_folder(
    short_run: Path, teacher: Path, photos: Path, tmp_path: Path, capsys: Any
) -> None:
    package = pack(tmp_path / "a.tgz", FILES)
    words = [
        str(short_run),
        "--demo",
        str(tmp_path / "page"),
        "--runtime",
        str(tmp_path / "a.tgz"),
        "--data",
        str(photos),
    ]
    assert recorded_teacher(short_run / "best.pth") == (teacher, TEACHER)
    export_demo(parse(words), package)
    said = capsys.readouterr().out
    assert "=> student: " in said and "=> teacher: " in said and "of 15 images" in said
    names = ["index.html", "runtime.js", "student.js", "teacher.js"]
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == names
    page = (tmp_path / "page" / "index.html").read_text()
    assert f"student {STUDENT} and teacher {TEACHER}" in page and json.dumps(list(CLASSES)) in page
    assert oct((tmp_path / "page").stat().st_mode)[-2:] == "55"  # a web server may read it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tgz", "page"]
    assert main(words) == 2 and "exists already and is not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--demo", "new", "--to", "onnx"], "--to has no effect on --demo, which writes a whole folder: leave it out"),
        (["--demo", "new", "--force"], "--force has no effect on --demo"),
        (["--demo", "none/new"], "the folder none does not exist: make it first"),
        (["--demo", "new", "--runtime", "none.tgz"], "--runtime none.tgz cannot be read (No such file or directory)"),
        (["--to", "onnx", "--output", "a.onnx", "--teacher", "b.pth"], "--teacher works only with --demo FOLDER"),
        (["--to", "onnx"], "the following arguments are required: --output; or --demo FOLDER"),
    ],
)
@needs_onnx
def test_mistakes_are_one_sentence(teacher: Path, words: list[str], message: str, capsys: Any) -> None:
    assert main([str(teacher), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@needs_onnx
def test_the_real_runtime_says_what_the_network_says(
    short_run: Path, photos: Path, browser: Any, tmp_path: Path, capsys: Any
) -> None:
    archive = os.environ.get("ONNXRUNTIME_WEB")
    if archive is None:
        pytest.skip("needs the archive of onnxruntime-web: name the file in ONNXRUNTIME_WEB")
    assert main([str(short_run), "--demo", str(tmp_path / "page"), "--runtime", archive]) == 0, capsys.readouterr().err
    assert all((tmp_path / "page" / "runtime.js").stat().st_size > 10 * len(name) for name in MEMBERS)
    path = next((photos / "valid").rglob("*.png"))
    show(browser, tmp_path / "page")
    choose(browser, path)
    trained = open_trained(short_run / "best.pth")
    pixels = trained.preprocessing.transform()(to_bytes(read_image(str(path))).permute(2, 0, 1))
    with torch.no_grad():
        expected = trained.network(trained.preprocessing.normalise(pixels.permute(1, 2, 0)[None]))[0].softmax(0)
    first = browser.find_element("css selector", "section li").text.split("\n")
    assert first == [CLASSES[int(expected.argmax())], f"{100 * float(expected.max()):.1f} %"]
    assert browser.get_log("browser") == []
