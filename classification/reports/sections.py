"""The sections of a page that are about training: what its template fills in."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from classification.errors import UserError
from classification.reports import charts
from classification.reports.gallery import StagePictures, draw_gallery
from classification.reports.groups import Member, is_whole, teacher_files
from classification.reports.networks import Network, Tried, checkpoint, open_network
from classification.reports.pictures import cost_matrix
from classification.reports.records import Run, mapping, planned_epochs
from classification.reports.vega import Chart
from classification.runs.balance import balanced
from classification.runs.launch import command
from classification.runs.matchings import Stage, ordered

MOST_FLOWS, MOST_GALLERIES, MOST_SHARES = 4, 2, 6  # runs that are drawn, one of each recipe first
WHOLE_MATRIX, SMALL_MATRIX = (96, 240), (48, 120)  # rows and columns of a picture, of few and of many


def chosen(members: Sequence[Member], most: int) -> list[Member]:
    """Return at most `most` of the runs: the first of every recipe, then the second of each, and so on."""
    count: dict[str, int] = {}
    ranked: list[tuple[int, int, Member]] = []
    for member in members:
        count[member.group] = count.get(member.group, 0) + 1
        ranked.append((count[member.group], len(ranked), member))
    return [member for *_, member in sorted(ranked, key=lambda entry: entry[:2])[:most]]


def run_rows(members: Sequence[Member], networks: Sequence[Network]) -> list[dict[str, Any]]:
    """Return a row per run: what it is, how far it came, how good and how large its network is."""
    by_name = {network.name: network for network in networks}
    rows = []
    for member in members:
        run, network = member.run, by_name[member.run.name]
        best = [value for _, value in run.series("valid_top1")]
        rows.append(
            {
                "member": member,
                "network": network,
                "teachers": ", ".join(str(teacher.get("arch")) for teacher in run.teachers),
                "seed": run.options.get("seed"),
                "done": len(run.epochs),
                "planned": planned_epochs(run.options),
                "last": run.last("valid_top1"),
                "best": max(best, default=None),
                "seconds": sum(value for _, value in run.series("train_seconds")),
            }
        )
    return rows


@dataclass(frozen=True)
class Advice:
    """A term's share of the gradient, and the weight at which all terms of its run would have equal shares."""

    run: str
    term: str
    weight: float
    first: float
    last: float
    equal: float


def advice(member: Member) -> list[Advice]:
    """Return what --calibrate would say of a run, from the shares that it recorded over all its epochs."""
    run = member.run
    shares = {term: [v for _, v in run.series(f"gradient_share_{term}")] for term in run.terms}
    shares = {term: values for term, values in shares.items() if values}
    weights = {term: _weight(run, term) for term in shares}
    known = {term: weight for term, weight in weights.items() if weight is not None}
    if len(known) < 2:
        return []
    equal = balanced(known, {term: float(np.mean(shares[term])) for term in known})
    return [Advice(run.name, t, known[t], shares[t][0], shares[t][-1], equal[t]) for t in known]


def _weight(run: Run, term: str) -> float | None:
    """Return the largest factor that a term had: of its weighted value to its value."""
    raw, weighted = dict(run.series(f"train_{term}")), dict(run.series(f"train_{term}_weighted"))
    return max((weighted[e] / raw[e] for e in raw if e in weighted and raw[e] != 0), default=None)


@dataclass(frozen=True)
class StageView:
    """A stage of a flow: its matrix as a picture where its costs were kept, and what it costs."""

    title: str
    picture: str
    shown: tuple[int, int]
    stage: Stage
    random: float | None


@dataclass(frozen=True)
class FlowView:
    """The flow of a run."""

    member: Member
    charts: list[Chart]
    stages: list[StageView]


def flow_views(members: Sequence[Member]) -> list[FlowView]:
    """Return the flows of some of the runs that have one."""
    found = [member for member in members if member.run.matchings and member.run.matchings[-1].stages]
    size = WHOLE_MATRIX if len(members) <= MOST_FLOWS else SMALL_MATRIX
    views = []
    for member in chosen(found, MOST_FLOWS):
        stages = [_stage_view(stage, size) for stage in member.run.matchings[-1].stages]
        drawn = charts.flow_charts(member.run.matchings, [view.random for view in stages])
        views.append(FlowView(member, drawn, stages))
    return views


def _stage_view(stage: Stage, size: tuple[int, int]) -> StageView:
    if stage.cost is None:
        return StageView(stage.name, "", (0, 0), stage, None)
    finite = stage.cost[np.isfinite(stage.cost)]
    shown = ordered(stage, *size)
    rows, columns = shown.shape
    return StageView(
        stage.name, cost_matrix(shown), (rows, columns), stage, float(finite.mean()) if finite.size else None
    )


@dataclass(frozen=True)
class Gallery:
    """Matched channels of a run, or why there are none."""

    name: str
    stages: list[StagePictures]
    fault: str = ""


def galleries(members: Sequence[Member], tried: Tried) -> list[Gallery]:
    """Draw the matched channels of some of the runs, on images of --data; of several teachers, those of the first."""
    found = []
    for member in chosen([member for member in members if member.run.matchings], MOST_GALLERIES):
        run, own = member.run, checkpoint(member.run)
        spec, guide = next(iter(teacher_files(run)), ({}, None))
        try:
            if own is None or guide is None:
                raise ValueError(f"the {'student' if own is None else 'teacher'} has no file")
            networks = open_network(own, {}), open_network(guide, spec)
            found.append(Gallery(run.name, draw_gallery(run, *networks, tried.paths)))
        except (UserError, ValueError, TypeError, RuntimeError) as error:
            found.append(Gallery(run.name, [], " ".join(str(error).split())))
    return found


def configuration(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Return per run how it was made: command, versions, machine, digests, options."""
    found = []
    for member in members:
        run, config = member.run, member.run.config
        found.append(
            {
                "name": run.name,
                "folder": str(run.folder.resolve()),
                "command": again(run),
                "resume": "" if is_whole(run) else _typed(run, ["--resume", str(run.folder.resolve())]),
                "started": str(config.get("folder", "unknown")),
                "commit": str(config.get("commit") or "unknown"),
                "versions": {str(name): str(value) for name, value in mapping(config.get("versions")).items()},
                "machine": {str(name): str(value) for name, value in mapping(config.get("machine")).items()},
                "digests": run.digests,
                "resumed": len(config["resumed"]) if isinstance(config.get("resumed"), list) else 0,
                "options": json.dumps(dict(run.options), indent=1, default=str),
            }
        )
    return found


def again(run: Run) -> str:
    """Return the command line that started a run, or an empty text where its folder does not say it."""
    words = run.config.get("command")
    return _typed(run, [str(word) for word in words[1:]]) if isinstance(words, list) and words else ""


def _typed(run: Run, words: Sequence[str]) -> str:
    known = run.config.get("command")
    script = str(known[0]) if isinstance(known, list) and known else "main_base.py"
    return command(script, *words) if script.endswith(".py") else shlex.join([*shlex.split(script), *words])


def differing(members: Sequence[Member]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the options in which runs differ that have them: their names, and per run their values."""
    rows = [(member.run.name, _flat(member.run.options)) for member in members]
    names = list(dict.fromkeys(name for _, options in rows for name in options))
    differ = [name for name in names if len({options[name] for _, options in rows if name in options}) > 1]
    return differ, [(name, [options.get(key, "") for key in differ]) for name, options in rows]


def _flat(options: Mapping[str, Any]) -> dict[str, str]:
    left_out = ("terms", "teachers", "output", "term")
    plain = {name: value for name, value in options.items() if name not in left_out}
    for term, entry in mapping(options.get("terms")).items():
        plain |= {f"{term}.{name}": value for name, value in mapping(entry).items()}
    return {name: _short(value) for name, value in plain.items()}


def _short(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."
