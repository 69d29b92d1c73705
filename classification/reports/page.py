"""The page of a report: one HTML file that holds its charts, pictures and tables, and loads nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classification.options.config import describe
from classification.reports import charts, sections, vega
from classification.reports.groups import group_runs, unlike, verdict_of
from classification.reports.images import by_class, image_sections
from classification.reports.network_charts import scatter
from classification.reports.networks import Network, Tried, known_networks, try_networks
from classification.reports.packages import check_packages
from classification.reports.records import read_runs

if TYPE_CHECKING:
    from markupsafe import Markup

HERE = Path(__file__).parent
MOST_IMAGES = 5000  # of --data


def make_page(
    runs: Sequence[Path], *, verdict: str | None = None, data: Path | None = None, most: int = MOST_IMAGES
) -> str:
    """Return the page about some runs.

    Args:
        runs: their folders.
        verdict: the first line; None to compare the distilled runs with those alone.
        data: a data folder, on whose validation images the networks are tried, or None.
        most: images of it at most.

    Raises:
        UserError: a folder that is no run, no finished epoch in any, unusable images, or a package that is missing.
    """
    check_packages()
    members = group_runs(read_runs(runs))
    tried = Tried() if data is None else try_networks(members, data, most)
    networks = _joined(known_networks(members), tried.networks)
    flows = sections.flow_views(members)
    differ, values = sections.differing(members)
    shares = sections.chosen(members, sections.MOST_SHARES)
    content = {
        "verdict": verdict or verdict_of(members),
        "members": members,
        "colours": {member.group: member.colour for member in members},
        "rows": sections.run_rows(members, networks),
        "faults": [(member.run.name, member.run.faults) for member in members if member.run.faults],
        "notes": [*tried.faults, *unlike(members).values()],
        "costs": _costs(networks),
        "curves": charts.curves(members),
        "most_points": vega.MOST_POINTS,
        "shares": [chart for chart in map(charts.gradient_shares, shares) if chart is not None],
        "advice": [line for member in members for line in sections.advice(member)],
        "flows": flows,
        "matched": bool(flows),
        "more_flows": sum(bool(member.run.matchings) for member in members) - len(flows),
        "galleries": sections.galleries(members, tried) if tried.networks else [],
        "classes": by_class(networks),
        "tried": tried,
        "images": image_sections(tried) if tried.networks else None,
        "differ": differ,
        "values": values,
        "configuration": sections.configuration(members),
        "made": describe([], {}),
    }
    return _render(content)


def _joined(known: Sequence[Network], tried: Sequence[Network]) -> list[Network]:
    """Take what was measured on the images in the place of what the folders say."""
    measured = {network.name: network for network in tried}
    rest = {network.name: network for network in known}
    latency = {name: network.scores["latency_ms"] for name, network in rest.items() if "latency_ms" in network.scores}
    for name, network in measured.items():
        if name in latency:
            measured[name] = network.with_latency(latency[name])
    return [measured.get(name, network) for name, network in {**rest, **measured}.items()]


def _costs(networks: Sequence[Network]) -> list[vega.Chart]:
    """Return the charts of accuracy against bytes, parameters where those are not known, and latency."""
    megabytes = {n.name: n.megabytes for n in networks if n.megabytes is not None}
    parameters = {n.name: n.parameters / 1e6 for n in networks if n.parameters is not None}
    found = [scatter(networks, megabytes, "Top-1 and size", "megabytes of weights")]
    if found == [None]:
        found = [scatter(networks, parameters, "Top-1 and parameters", "million parameters")]
    for size in sorted({size for network in networks for size in network.latency}):
        latency = {network.name: network.latency[size] for network in networks if size in network.latency}
        found.append(scatter(networks, latency, f"Top-1 and latency, batch {size}", "milliseconds"))
    return [chart for chart in found if chart is not None]


def breakable(text: str) -> Markup:
    """Return a name as HTML that may be broken after `_`, `-`, `/` and `.`, as browsers do not do by themselves."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[_/.-])", text))  # escapes each part


def _render(content: dict[str, Any]) -> str:
    import vl_convert
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    room = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # Not even what is no number of JSON gets into a chart.
    room.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    room.filters["breakable"] = breakable
    style, script = ((HERE / name).read_text() for name in ("page.css", "page.js"))
    library = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    own = {"style": Markup(style), "script": Markup(script), "library": Markup(library)}
    return room.get_template("page.html").render(**content, **own)
