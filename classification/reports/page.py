"""The page of a report: one HTML file with all charts, pictures and tables, which loads nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classification.options.config import describe
from classification.reports import charts, sections, vega
from classification.reports.groups import compare_with_controls, find_unfair, group_runs
from classification.reports.images import by_class, image_sections
from classification.reports.network_charts import scatter
from classification.reports.networks import Network, NetworkResults, recorded_networks, run_networks
from classification.reports.packages import check_packages
from classification.reports.records import read_runs

if TYPE_CHECKING:
    from markupsafe import Markup

HERE = Path(__file__).parent
MOST_IMAGES = 5000  # of --data


def make_page(
    runs: Sequence[Path], *, verdict: str | None = None, data: Path | None = None, max_images: int = MOST_IMAGES
) -> str:
    """Return the page about some runs.

    Args:
        runs: their folders.
        verdict: the first line; None to compare distilled runs with runs alone.
        data: a data folder to run the networks on its validation images, or None.
        max_images: largest number of images of it.

    Raises:
        UserError: a folder is not a run, no run has a finished epoch, the images cannot be used, or a package is
            missing.
    """
    check_packages()
    members = group_runs(read_runs(runs))
    results = NetworkResults() if data is None else run_networks(members, data, max_images)
    networks = _merge_networks(recorded_networks(members), results.networks)
    flows = sections.flow_views(members)
    differ, values = sections.differing_options(members)
    shares = sections.choose_runs(members, sections.MOST_SHARES)
    content = {
        "verdict": verdict or compare_with_controls(members),
        "members": members,
        "colours": {member.group: member.colour for member in members},
        "rows": sections.run_rows(members, networks),
        "faults": [(member.run.name, member.run.faults) for member in members if member.run.faults],
        "notes": [*results.faults, *find_unfair(members).values()],
        "costs": _costs(networks),
        "curves": charts.curves(members),
        "most_points": vega.MOST_POINTS,
        "shares": [chart for chart in map(charts.gradient_shares, shares) if chart is not None],
        "advice": [line for member in members for line in sections.advice(member)],
        "flows": flows,
        "matched": bool(flows),
        "more_flows": sum(bool(member.run.matchings) for member in members) - len(flows),
        "galleries": sections.galleries(members, results) if results.networks else [],
        "classes": by_class(networks),
        "tried": results,
        "images": image_sections(results) if results.networks else None,
        "differ": differ,
        "values": values,
        "configuration": sections.configuration(members),
        "made": describe([], {}),
    }
    return _render(content)


def _merge_networks(recorded: Sequence[Network], measured_networks: Sequence[Network]) -> list[Network]:
    """Replace the scores from the run folders by those measured on the images, but keep recorded latencies."""
    measured = {network.name: network for network in measured_networks}
    recorded_by_name = {network.name: network for network in recorded}
    latency = {
        name: network.scores["latency_ms"]
        for name, network in recorded_by_name.items()
        if "latency_ms" in network.scores
    }
    for name, network in measured.items():
        if name in latency:
            measured[name] = network.with_latency(latency[name])
    return [measured.get(name, network) for name, network in {**recorded_by_name, **measured}.items()]


def _costs(networks: Sequence[Network]) -> list[vega.Chart]:
    """Draw accuracy against megabytes (or else parameters), and against latency."""
    megabytes = {n.name: n.megabytes for n in networks if n.megabytes is not None}
    parameters = {n.name: n.parameters / 1e6 for n in networks if n.parameters is not None}
    charts = [scatter(networks, megabytes, "Top-1 and size", "megabytes of weights")]
    if charts == [None]:
        charts = [scatter(networks, parameters, "Top-1 and parameters", "million parameters")]
    for size in sorted({size for network in networks for size in network.latency}):
        latency = {network.name: network.latency[size] for network in networks if size in network.latency}
        charts.append(scatter(networks, latency, f"Top-1 and latency, batch {size}", "milliseconds"))
    return [chart for chart in charts if chart is not None]


def breakable(text: str) -> Markup:
    """Return a name as HTML in which browsers may break lines after `_`, `-`, `/` and `.`."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[_/.-])", text))  # escapes each part


def _render(content: dict[str, Any]) -> str:
    import vl_convert
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # NaN and infinity are not JSON, so charts must not contain them.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["breakable"] = breakable
    style, script = ((HERE / name).read_text() for name in ("page.css", "page.js"))
    library = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    assets = {"style": Markup(style), "script": Markup(script), "library": Markup(library)}
    return environment.get_template("page.html").render(**content, **assets)
