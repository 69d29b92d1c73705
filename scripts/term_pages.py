"""Make docs/reference/terms/NAME.md, a page per term, from docstrings, recipes and results; make_tables.py calls it.

What a formula means is the text of the docstring up to its arguments, the source its reference, the defaults the fields
of the term's hyper-parameters. Only the formula in LaTeX and when to use the term stand in scripts/terms.yaml.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from cells import ROOT, count, differences, read_quality, spread
from results_table import TableError

from mgd.losses import LOSSES, Term

FOLDER = ROOT / "docs" / "reference" / "terms"
WRITTEN = ROOT / "scripts" / "terms.yaml"
RECIPES = ROOT / "classification" / "recipes"
GROUPS = ("main", "terms", "muon", "few", "photographs")  # of the rows that a page shows
SECTION = re.compile(r"\n\n(?=(?:Args|Returns|Raises|Reference|Use):)")
NEEDS = {
    "frozen": "frozen teachers",
    "index": "the position of each image in the data set",
    "labels": "logits and labels",
    "maps": "maps of both networks",
    "views": "logits of two augmented views of each image",
}


def term_pages() -> dict[Path, str]:
    """Return the page of every term by its path."""
    written = yaml.safe_load(WRITTEN.read_text())
    if set(written) != set(LOSSES):
        raise TableError(f"{WRITTEN} must name every term, and no other; look at {set(written) ^ set(LOSSES)}")
    return {FOLDER / f"{name}.md": _page(name, kind, **written[name]) for name, kind in LOSSES.items()}


def _page(name: str, kind: type[Term], formula: str, when: str) -> str:
    module = inspect.getmodule(kind)
    title = (module.__doc__ or "").strip().rstrip(".")
    meaning, source = _docs(name, kind)
    lines = [
        f"# {name}",
        "",
        f"{title}.",
        "",
        f"**When to use it:** {when}",
        "",
        f"**Default weight:** {default_weight(kind)}. **Reads:** {_reads(kind)}.",
        "",
        "## Formula",
        "",
        "$$",
        formula,
        "$$",
        "",
        "In the words of the code:",
        "",
        "```text",
        *meaning,
        "```",
        "",
        "## Source",
        "",
        source or "Standard; no publication is followed.",
        "",
        "## Options",
        "",
        *_options(name, kind),
        "",
        "## Measured",
        "",
        *_measured(name),
        "",
        f"Code: `{(module.__name__ if module else '').replace('.', '/')}.py`. [All terms](../terms.md)",
        "",
    ]
    return "\n".join(lines)


def default_weight(kind: type[Term]) -> str:
    """Return the weight of a term; `mgd` has another one in its default form."""
    published = getattr(kind.Hyper, "loss_factor", None)
    return f"{kind.weight:g}" if published is None else f"{1 / published:g} (other forms than `sum`: {kind.weight:g})"


def _docs(name: str, kind: type[Term]) -> tuple[list[str], str]:
    """Return the text that holds the formula, and the source, of the function of a term or else of its class."""
    texts = [inspect.cleandoc(kind.__doc__ or "")]
    function = getattr(inspect.getmodule(kind), name, None)
    if inspect.isfunction(function):
        texts.insert(0, inspect.cleandoc(function.__doc__ or ""))
    found = (re.search(r"Reference: (.*?)(?:\n\n|$)", text, re.DOTALL) for text in texts)
    source = next((" ".join(match[1].split()) for match in found if match), "")
    formula = [SECTION.split(text)[0].splitlines() for text in texts]
    both = formula[0] if len(formula) == 1 or len(formula[1]) < 3 else [*formula[0], "", "As a term:", *formula[1]]
    return [line.replace("`", "") for line in both], _linked(source)


def _linked(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _reads(kind: type[Term]) -> str:
    known = {"maps": "maps (logits where there are no taps)", "labels": "logits, and labels where there are any"}
    words = [NEEDS[what] for what in sorted(kind.needs)] + [known[what] for what in sorted(kind.uses)]
    after = "; maps are compared after the ReLU" if kind.rectified else ""
    return f"{' and '.join(words) or 'logits'}{after}"


def _options(name: str, kind: type[Term]) -> list[str]:
    """Describe the hyper-parameters, with the words of the dataclasses that declare them."""
    about: dict[str, str] = {}
    for base in reversed(kind.Hyper.__mro__):
        _, _, args = inspect.cleandoc(base.__doc__ or "").partition("\n\nArgs:\n")
        args = SECTION.split(f"\n\n{args}")[0]
        for match in re.finditer(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", args, re.DOTALL | re.MULTILINE):
            about[match[1]] = " ".join(match[2].split())
    fields = dataclasses.fields(kind.Hyper)
    if not fields:
        return ["None except the weight and its schedule."]
    lines = [f"Set them with `--term {name}.KEY=VALUE`, or as keys of the term in a recipe.", ""]
    lines += ["| key | default | meaning |", "|---|---|---|"]
    for field in fields:
        said = about.get(field.name, "").replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{field.default}` | {said} |")
    return lines


def _terms_of(cell: dict[str, Any]) -> set[str]:
    """Return the terms of a cell of scripts/quality.yaml beside the labels."""
    if cell.get("script", "main_mgd") != "main_mgd":
        return set()
    words = shlex.split(cell.get("options", ""))
    named = words[words.index("--distiller") + 1] if "--distiller" in words else "mgd"
    return {*named.split("+"), *(["kd"] if "--mgd-with-kd" in words else [])}


def _measured(name: str) -> list[str]:
    """Show the rows whose only term it is, and then those of its sums, the best first."""
    cells, results = read_quality()
    rows = [n for n, cell in cells.items() if cell["group"] in GROUPS and name in _terms_of(cell) and results[n]]
    rows.sort(key=lambda n: (len(_terms_of(cells[n])), -mean(r.last_top1 for r in results[n].values())))
    lines = ["| | data | top-1 %, last epoch | n | difference, paired by seed |", "|---|---|---|---|---|"]
    for row in rows:
        found, cell = results[row], cells[row]
        other = cell.get("against", "")
        shared = sorted(set(found) & set(results[other])) if other else []
        gain = differences([found[s].last_top1 - results[other][s].last_top1 for s in shared]) if shared else ""
        gain += f" against {cells[other]['row']}" if gain else ""
        data = "photographs" if cell["group"] == "photographs" else "CIFAR-10"
        top1 = spread([r.last_top1 for r in found.values()])
        lines.append(f"| {cell['row']} | {data} | {top1} | {count(found)} | {gain} |")
    if not rows:
        lines = ["Not measured by this project yet." if name != "ce" else "All rows of the other terms include it."]
    else:
        lines += ["", "[How to read this](../../results/quality.md)."]
    used = sorted(path.stem for path in RECIPES.glob("*.yaml") if _in_recipe(name, yaml.safe_load(path.read_text())))
    if used and name != "ce":
        lines += ["", f"Recipes: {', '.join(f'`{stem}`' for stem in used)}."]
    return lines


def _in_recipe(name: str, recipe: dict[str, Any]) -> bool:
    return name in (recipe.get("terms") or {}) or name in str(recipe.get("distiller", "")).split("+")
