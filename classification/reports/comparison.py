"""A comparison of recipes: which runs it has, what they say together, and the files that keep it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from classification.errors import UserError, quoted
from classification.models.intervals import OPEN
from classification.paths import exists, is_file
from classification.reports.verdict import Design, Verdict, judge
from classification.runs.repeated import Command
from classification.system.new_files import write_whole

ALONE = "alone"
RECIPES = Path(__file__).parents[1] / "recipes"
PLAN, RESULT, TABLE = "plan.json", "comparison.json", "comparison.md"
Pair = tuple[str, str]  # student and recipe


@dataclass(frozen=True)
class Recipe:
    """One way to train a student.

    Args:
        name: as the table calls it.
        script: main_base or main_mgd.
        words: what it adds to the words that all runs share.
    """

    name: str
    script: str
    words: tuple[str, ...] = ()

    @classmethod
    def of(cls, word: str) -> Recipe:
        """Return the recipe that a word stands for: alone, a recipe file, one of ours by name, or a sum of terms.

        Raises:
            UserError: a file that is not there, or a name that is nearly that of a recipe.
        """
        if word == ALONE:
            return cls(ALONE, "main_base")
        own = RECIPES / f"{word}.yaml"
        if is_file(own):
            return cls(word, "main_mgd", ("--config", str(own)))
        if word.endswith((".yaml", ".yml")) or "/" in word:
            if not is_file(word):
                raise UserError(f"--recipes {quoted(word)}: there is no such file")
            return cls(Path(word).stem, "main_mgd", ("--config", word))
        if near := get_close_matches(word, [ALONE, *(path.stem for path in RECIPES.glob("*.yaml"))], n=1, cutoff=0.8):
            raise UserError(f"--recipes {quoted(word)}: there is no such recipe; close is {near[0]}")
        return cls(word, "main_mgd", ("--distiller", word))


@dataclass(frozen=True)
class Plan:
    """What is compared, fixed before the first run.

    Args:
        data: the folder of images.
        students: networks.
        recipes: the control, alone, among them.
        seeds: the most per recipe.
        confidence: of all intervals together.
        margin: points of top-1 that do not matter.
        resolution: points that one image of valid is worth.
        words: what all runs share.
        teacher: the words that name the teacher of a distillation.
        teacher_words: the words that train it; empty where it is given.
        without_teacher: recipes whose networks teach each other.
    """

    data: str
    students: tuple[str, ...]
    recipes: tuple[Recipe, ...]
    seeds: int
    confidence: float
    margin: float
    resolution: float
    words: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    teacher_words: tuple[str, ...] = ()
    without_teacher: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        names = [recipe.name for recipe in self.recipes]
        if ALONE not in names or len(names) < 2:
            raise UserError(
                f"--recipes {' '.join(names)}: expected {ALONE} and at least one other, which is compared with it"
            )
        for what, given in (("--recipes", names), ("--students", list(self.students))):
            if twice := next((name for name in given if given.count(name) > 1), None):
                raise UserError(f"{what} names {twice} twice: give each once")

    @property
    def design(self) -> Design:
        """How sure a verdict must be."""
        number = len(self.students) * (len(self.recipes) - 1)
        return Design(self.seeds, number, self.confidence, self.margin, self.resolution)

    def pairs(self) -> list[Pair]:
        """Return every student with every recipe, the control first."""
        names = sorted((recipe.name for recipe in self.recipes), key=lambda name: name != ALONE)
        return [(student, name) for student in self.students for name in names]

    def words_of(self, pair: Pair) -> tuple[str, tuple[str, ...]]:
        """Return the script and the words of a student's recipe, without seed and folder."""
        student, name = pair
        recipe = next(recipe for recipe in self.recipes if recipe.name == name)
        teacher = self.teacher if recipe.script == "main_mgd" and name not in self.without_teacher else ()
        return recipe.script, (self.data, *self.words, *recipe.words, "-a", student, *teacher)

    def command(self, folder: Path, pair: Pair, seed: int) -> Command:
        """Return the run of a student's recipe with a seed."""
        script, words = self.words_of(pair)
        name = f"{'-'.join(pair)}-{seed}".replace(":", "-").replace("/", "-")
        return Command(script, words, seed, folder / "runs" / name, folder / "logs" / f"{name}.log")

    def teacher_command(self, folder: Path) -> Command:
        """Return the run that trains the teacher."""
        place = folder / "runs" / "teacher", folder / "logs" / "teacher.log"
        return Command("main_base", (self.data, *self.teacher_words), 0, *place)

    def record(self) -> dict[str, Any]:
        """Return the plan as JSON holds it."""
        made: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return made


def keep_plan(plan: Plan, folder: Path) -> bool:
    """Write the plan into a new folder; return whether it was there already.

    Raises:
        UserError: the folder holds something else, or another plan.
    """
    path = folder / PLAN
    if exists(path):
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged: give another --output") from error
        now = plan.record()
        if differing := [key for key in now if not isinstance(before, dict) or before.get(key) != now[key]]:
            names = ["options of training" if key == "words" else key for key in differing]
            raise UserError(
                f"{folder} holds a comparison with other {', '.join(names)}: type the line that began it, or give "
                "another --output"
            )
        return True
    write_whole(path, (json.dumps(plan.record(), indent=1) + "\n").encode())
    return False


Found = Mapping[Pair, Mapping[int, float]]  # top-1 in percent, by student and recipe, by seed


def judged(plan: Plan, found: Found) -> dict[Pair, Verdict]:
    """Return the verdict of every recipe against the control of its student, by the seeds that both have."""
    verdicts = {}
    for student, name in plan.pairs():
        own, control = found.get((student, name), {}), found.get((student, ALONE), {})
        if differences := [own[seed] - control[seed] for seed in sorted(own) if seed in control]:
            verdicts[student, name] = judge(differences, plan.design)
    return {pair: verdict for pair, verdict in verdicts.items() if pair[1] != ALONE}


def due(plan: Plan, verdicts: Mapping[Pair, Verdict]) -> list[Pair]:
    """Return the pairs that the next seed needs: undecided recipes, and the control of their students."""
    undecided = [p for p in plan.pairs() if p[1] != ALONE and not (p in verdicts and verdicts[p].decided)]
    students = {student for student, _ in undecided}
    return [pair for pair in plan.pairs() if pair in undecided or (pair[1] == ALONE and pair[0] in students)]


def said(verdict: Verdict, pair: Pair, confidence: float) -> str:
    """Return a verdict as a line."""
    seeds = f"{verdict.seeds} seeds" if verdict.seeds > 1 else "1 seed"
    return (
        f"{verdict.word}: {pair[1]} with {pair[0]}: {verdict.difference:+.2f} points of top-1 against {ALONE} "
        f"({100 * confidence:g} % interval {_interval(verdict)}, {seeds})"
    )


def _interval(verdict: Verdict) -> str:
    low, high = verdict.interval
    return f"{low:+.2f} to {high:+.2f}" if math.isfinite(low) else "unknown"


def table(plan: Plan, found: Found, verdicts: Mapping[Pair, Verdict]) -> str:
    """Return the comparison as a Markdown table."""
    lines = ["| student | recipe | top-1 %, last epoch | seeds | against alone, paired | interval | verdict |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for pair in plan.pairs():
        values = list(found.get(pair, {}).values())
        mean = f"{statistics.mean(values):.2f}" if values else ""
        mean += f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        verdict = verdicts.get(pair)
        last = [f"{verdict.difference:+.2f}", _interval(verdict), verdict.word] if verdict else ["", "", ""]
        lines.append("| " + " | ".join([*pair, mean, str(len(values)), *last]) + " |")
    return "\n".join(lines)


def keep(plan: Plan, found: Found, verdicts: Mapping[Pair, Verdict], folder: Path) -> None:
    """Write comparison.json and comparison.md.

    Raises:
        UserError: the folder cannot be written to.
    """
    content = {
        "version": 1,
        "plan": plan.record(),
        "runs": [
            {"student": pair[0], "recipe": pair[1], "seed": seed, "top1": top1,
             "folder": str(plan.command(folder, pair, seed).folder.relative_to(folder))}
            for pair in plan.pairs() for seed, top1 in sorted(found.get(pair, {}).items())
        ],
        "comparisons": [
            {"student": pair[0], "recipe": pair[1], "against": ALONE, "verdict": verdict.word,
             "difference": verdict.difference, "seeds": verdict.seeds,
             "interval": list(verdict.interval) if math.isfinite(verdict.interval[0]) else None}
            for pair, verdict in verdicts.items()
        ],
    }  # fmt: skip
    write_whole(folder / RESULT, (json.dumps(content, indent=1) + "\n").encode())
    rule = (
        f"Top-1 of the last epoch. Intervals hold at {100 * plan.confidence:g} % together, over all comparisons and "
        f"all looks; differences up to {plan.margin:g} points count as none. {OPEN}: these seeds do not tell."
    )
    write_whole(folder / TABLE, f"{table(plan, found, verdicts)}\n\n{rule}\n".encode())


def seeds_of(plan: Plan) -> Sequence[int]:
    """Return the seeds in the order in which they run."""
    return range(plan.seeds)
