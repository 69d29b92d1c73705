"""The sections of a page about training: the values for its template."""

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
from classification.reports.groups import Member, is_complete, teacher_files
from classification.reports.networks import Network, NetworkResults, find_checkpoint, open_network
from classification.reports.pictures import cost_matrix
from classification.reports.records import Run, as_mapping, planned_epochs
from classification.reports.vega import Chart
from classification.runs.balance import balanced
from classification.runs.launch import command
from classification.runs.matchings import Stage, ordered

MOST_FLOWS, MOST_GALLERIES, MOST_SHARES = 4, 2, 6  # largest numbers of runs that are drawn
WHOLE_MATRIX, SMALL_MATRIX = (96, 240), (48, 120)  # (rows, columns) of a picture, for few and for many runs


def choose_runs(members: Sequence[Member], max_runs: int) -> list[Member]:
    """Return at most `max_runs` runs: first one of every recipe, then a second one of each, and so on."""
    counts: dict[str, int] = {}
    ranked: list[tuple[int, int, Member]] = []
    for member in members:
        counts[member.group] = counts.get(member.group, 0) + 1
        ranked.append((counts[member.group], len(ranked), member))
    return [member for *_, member in sorted(ranked, key=lambda entry: entry[:2])[:max_runs]]


def run_rows(members: Sequence[Member], networks: Sequence[Network]) -> list[dict[str, Any]]:
    """Return one row per run for the table of runs."""
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
    """A term's first and last share of the gradient, and the weight for equal shares of all terms."""

    run: str
    term: str
    weight: float
    first: float
    last: float
    equal: float


def advice(member: Member) -> list[Advice]:
    """Return the weights that --calibrate would suggest, from the gradient shares that a run recorded."""
    run = member.run
    shares = {term: [v for _, v in run.series(f"gradient_share_{term}")] for term in run.terms}
    shares = {term: values for term, values in shares.items() if values}
    weights = {term: _weight(run, term) for term in shares}
    known_weights = {term: weight for term, weight in weights.items() if weight is not None}
    if len(known_weights) < 2:
        return []
    equal = balanced(known_weights, {term: float(np.mean(shares[term])) for term in known_weights})
    return [Advice(run.name, t, known_weights[t], shares[t][0], shares[t][-1], equal[t]) for t in known_weights]


def _weight(run: Run, term: str) -> float | None:
    """Return the largest weight of a term: its weighted value divided by its value."""
    raw, weighted = dict(run.series(f"train_{term}")), dict(run.series(f"train_{term}_weighted"))
    return max((weighted[e] / raw[e] for e in raw if e in weighted and raw[e] != 0), default=None)


@dataclass(frozen=True)
class StageView:
    """A stage of a flow: a picture of its cost matrix if the costs are known, and the mean cost of random pairs."""

    title: str
    picture: str
    drawn_size: tuple[int, int]
    stage: Stage
    random: float | None


@dataclass(frozen=True)
class FlowView:
    """The flow of a run."""

    member: Member
    charts: list[Chart]
    stages: list[StageView]


def flow_views(members: Sequence[Member]) -> list[FlowView]:
    """Return the flows of some runs."""
    matched = [member for member in members if member.run.matchings and member.run.matchings[-1].stages]
    picture_size = WHOLE_MATRIX if len(members) <= MOST_FLOWS else SMALL_MATRIX
    views = []
    for member in choose_runs(matched, MOST_FLOWS):
        stages = [_stage_view(stage, picture_size) for stage in member.run.matchings[-1].stages]
        drawn = charts.flow_charts(member.run.matchings, [view.random for view in stages])
        views.append(FlowView(member, drawn, stages))
    return views


def _stage_view(stage: Stage, size: tuple[int, int]) -> StageView:
    if stage.cost is None:
        return StageView(stage.name, "", (0, 0), stage, None)
    finite_costs = stage.cost[np.isfinite(stage.cost)]
    drawn = ordered(stage, *size)
    rows, columns = drawn.shape
    return StageView(
        stage.name,
        cost_matrix(drawn),
        (rows, columns),
        stage,
        float(finite_costs.mean()) if finite_costs.size else None,
    )


@dataclass(frozen=True)
class Gallery:
    """Pictures of the matched channels of a run, or why there are none."""

    name: str
    stages: list[StagePictures]
    fault: str = ""


def galleries(members: Sequence[Member], results: NetworkResults) -> list[Gallery]:
    """Draw the matched channels of some runs and their first teachers, on images of --data."""
    pictures = []
    for member in choose_runs([member for member in members if member.run.matchings], MOST_GALLERIES):
        run, student_file = member.run, find_checkpoint(member.run)
        spec, teacher_file = next(iter(teacher_files(run)), ({}, None))
        try:
            if student_file is None or teacher_file is None:
                raise ValueError(f"the {'student' if student_file is None else 'teacher'} has no file")
            networks = open_network(student_file, {}), open_network(teacher_file, spec)
            pictures.append(Gallery(run.name, draw_gallery(run, *networks, results.paths)))
        except (UserError, ValueError, TypeError, RuntimeError) as error:
            pictures.append(Gallery(run.name, [], " ".join(str(error).split())))
    return pictures


def configuration(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Return per run how to repeat it: command, versions, machine, digests, options."""
    rows = []
    for member in members:
        run, config = member.run, member.run.config
        rows.append(
            {
                "name": run.name,
                "folder": str(run.folder.resolve()),
                "command": command_line(run),
                "resume": "" if is_complete(run) else _join_command(run, ["--resume", str(run.folder.resolve())]),
                "started": str(config.get("folder", "unknown")),
                "commit": str(config.get("commit") or "unknown"),
                "versions": {str(name): str(value) for name, value in as_mapping(config.get("versions")).items()},
                "machine": {str(name): str(value) for name, value in as_mapping(config.get("machine")).items()},
                "digests": run.digests,
                "resumed": len(config["resumed"]) if isinstance(config.get("resumed"), list) else 0,
                "options": json.dumps(dict(run.options), indent=1, default=str),
            }
        )
    return rows


def command_line(run: Run) -> str:
    """Return the command line that started a run, or an empty text if it is unknown."""
    words = run.config.get("command")
    return _join_command(run, [str(word) for word in words[1:]]) if isinstance(words, list) and words else ""


def _join_command(run: Run, words: Sequence[str]) -> str:
    words_of_run = run.config.get("command")
    script = str(words_of_run[0]) if isinstance(words_of_run, list) and words_of_run else "main_base.py"
    return command(script, *words) if script.endswith(".py") else shlex.join([*shlex.split(script), *words])


def differing_options(members: Sequence[Member]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the names of options whose values differ between runs, and per run their values."""
    rows = [(member.run.name, _flat_texts(member.run.options)) for member in members]
    names = list(dict.fromkeys(name for _, options in rows for name in options))
    differ = [name for name in names if len({options[name] for _, options in rows if name in options}) > 1]
    return differ, [(name, [options.get(key, "") for key in differ]) for name, options in rows]


def _flat_texts(options: Mapping[str, Any]) -> dict[str, str]:
    left_out = ("terms", "teachers", "output", "term")
    plain = {name: value for name, value in options.items() if name not in left_out}
    for term, entry in as_mapping(options.get("terms")).items():
        plain |= {f"{term}.{name}": value for name, value in as_mapping(entry).items()}
    return {name: _shorten(value) for name, value in plain.items()}


def _shorten(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."
