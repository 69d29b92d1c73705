"""The site: `make docs`, or python -m sphinx -W -b html docs build/site.

Pages are Markdown that also reads well without the site. Nothing is loaded from elsewhere: formulas become MathML when
the site is built, which browsers draw by themselves; search is Sphinx's own.
"""

from __future__ import annotations

import re
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.application import Sphinx

project = "Matching guided distillation"
author = "the contributors"
html_title = "Matching guided distillation"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_math_renderer = "mathml"
html_show_sourcelink = False
html_show_copyright = False
html_copy_source = False
html_static_path = ["site"]
html_css_files = ["site.css"]
exclude_patterns = ["site"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
pygments_style = "tango"
pygments_dark_style = "monokai"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
suppress_warnings = ["ref.python"]  # several terms have a class Hyper, and types name it by that
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_rtype = False
maximum_signature_line_length = 100


def plain_text(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Take docstrings as plain text: only `names` are marked, and |x|, a * b and x_ mean themselves."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]+`)", line)
        lines[number] = "".join(
            f"`{part}`" if part[:1] == "`" else re.sub(r"([|*\\]|_(?!\w))", r"\\\1", part) for part in parts
        )


def render(text: str, display: str) -> str:
    """Return a formula as MathML."""
    return convert(text, display=display)


def inline_math(translator: Any, node: Any) -> None:
    """Write a formula within a line."""
    translator.body.append(render(node.astext(), "inline"))
    raise SkipNode


def block_math(translator: Any, node: Any) -> None:
    """Write a formula of its own."""
    translator.body.append(f'<div class="math">{render(node.astext(), "block")}</div>')
    raise SkipNode


def setup(app: Sphinx) -> None:
    """Add what the pages need beside the extensions."""
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("autodoc-process-docstring", plain_text, priority=400)  # before napoleon
