"""The site: it builds without a warning, loads nothing from elsewhere, is searchable, and its pages keep their word."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from classification.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CONCEPTS = sorted((DOCS / "concepts").glob("*.md"))
LOADS = {"script": "src", "img": "src", "source": "src", "iframe": "src", "link": "href"}


class Loads(HTMLParser):
    """Collects the addresses that a page loads by itself, not those that a reader may follow."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if value and LOADS.get(tag) == name]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr  # a broken link or anchor is a warning, and a warning is an error
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        parser = Loads()
        parser.feed(page.read_text())
        assert not [address for address in parser.found if re.match(r"(https?:)?//", address)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text()), style


def test_formulas_are_drawn_by_the_browser_itself(site: Path) -> None:
    page = (site / "concepts" / "cost.html").read_text()
    assert "<mfrac>" in page and "$$" not in page and not re.search("<script[^>]*(mathjax|katex)", page, re.IGNORECASE)


def test_search_finds_taps(site: Path) -> None:
    index = (site / "searchindex.js").read_text()
    assert re.search(r'"tap":\[?\d', index) and "concepts/taps" in index


def test_the_api_is_made_of_docstrings(site: Path) -> None:
    page = (site / "reference" / "api.html").read_text()
    for name in ("mgd.channel_cost", "mgd.Distiller", "mgd.losses.kd", "mgd.huggingface.DistillationTrainer"):
        assert f'id="{name}"' in page, name


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page: language and content."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", CONCEPTS, ids=lambda page: page.stem)
def test_programs_of_the_concepts_print_what_the_page_says(page: Path) -> None:
    scope: dict[str, Any] = {}
    found = [block for block in blocks(page) if block[0] in ("python", "text")]
    if page.stem not in ("index", "glossary"):
        assert [language for language, _ in found] == ["python", "text"]
    for (_, code), (_, expected) in zip(found[::2], found[1::2], strict=True):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(code, str(page), "exec"), scope)
        assert said.getvalue() == expected


@cache
def options(module: str, before: tuple[str, ...]) -> str:
    """Return all help of a command."""
    main = importlib.import_module(f"classification.{module}").main
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main([*before, "--help-all" if module.startswith("main_") else "--help"])
    return said.getvalue()


def commands(text: str) -> list[tuple[str, tuple[str, ...], str]]:
    """Return the commands of shell blocks: script, words in front, and the rest of the line."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = []
    for line in (line.split(" #")[0] for line in lines):
        if match := re.match(r"mgd (\w+)\b(.*)", line):
            word = COMMANDS[match[1]]
            if word.translate is None:
                found.append((word.module, word.before, match[2]))
        elif match := re.match(
            r"(?:python|torchrun) (?:.*/)?(main_base|main_mgd|predict|export|report|prepare)\.py(.*)", line
        ):
            found.append((match[1], (), match[2]))
    return found


def test_options_in_the_commands_of_all_pages_exist() -> None:
    seen = 0
    for page in PAGES:
        for module, before, rest in (c for lang, text in blocks(page) if lang == "sh" for c in commands(text)):
            known = options(module, before)
            if module == "compare":  # takes the options of training, too
                known += options("main_base", ())
            for option in re.findall(r"(?<!\S)--?[a-z][a-z0-9-]*", rest):
                seen += 1
                assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", known), f"{page}: {module} {option}"
    assert seen > 60


def test_every_word_of_the_method_has_an_entry_in_the_glossary() -> None:
    words = set(re.findall(r"^## (.*)", (DOCS / "concepts" / "glossary.md").read_text(), flags=re.MULTILINE))
    assert {"Teacher", "Student", "Tap", "Map", "Cost", "Flow", "Reducer", "AMP", "Margin", "Term", "Stage"} <= words
    assert sorted(words, key=str.lower) == re.findall(
        r"^## (.*)", (DOCS / "concepts" / "glossary.md").read_text(), flags=re.MULTILINE
    )
