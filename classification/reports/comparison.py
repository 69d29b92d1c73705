"""A comparison of recipes: its plan, its runs, its verdicts, and its files."""

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
from classification.models.intervals import UNDECIDED
from classification.paths import exists, is_file
from classification.reports.verdict import Design, Verdict, judge
from classification.runs.repeated import Command
from classification.system.new_files import write_whole

ALONE = "alone"
RECIPES = Path(__file__).parents[1] / "recipes"
PLAN, RESULT, TABLE = "plan.json", "comparison.json", "comparison.md"
Pair = tuple[str, str]  # (student, recipe)


@dataclass(frozen=True)
class Recipe:
    """A way to train a student.

    Args:
        name: its name in the table.
        script: main_base or main_mgd.
        words: its arguments, in addition to those of all runs.
    """

    name: str
    script: str
    words: tuple[str, ...] = ()

    @classmethod
    def of(cls, word: str) -> Recipe:
        """Return the recipe for a word: `alone`, the name of one of our recipes, a recipe file, or a sum of terms.

        Raises:
            UserError: the file does not exist, or the word looks like a misspelt recipe.
        """
        if word == ALONE:
            return cls(ALONE, "main_base")
        our_file = RECIPES / f"{word}.yaml"
        if is_file(our_file):
            return cls(word, "main_mgd", ("--config", str(our_file)))
        if word.endswith((".yaml", ".yml")) or "/" in word:
            if not is_file(word):
                raise UserError(f"--recipes {quoted(word)}: there is no such file")
            return cls(Path(word).stem, "main_mgd", ("--config", word))
        if close := get_close_matches(word, [ALONE, *(path.stem for path in RECIPES.glob("*.yaml"))], n=1, cutoff=0.8):
            raise UserError(f"--recipes {quoted(word)}: there is no such recipe; close is {close[0]}")
        return cls(word, "main_mgd", ("--distiller", word))


@dataclass(frozen=True)
class Plan:
    """The plan of a comparison, fixed before the first run.

    Args:
        data: the data folder.
        students: names of the networks.
        recipes: the recipes, including the control, alone.
        seeds: largest number of seeds per recipe.
        confidence: of all intervals together.
        margin: differences in top-1 up to this many points do not matter.
        resolution: change in top-1, in points, by one image of valid.
        words: arguments of all runs.
        teacher: arguments that name the teacher of a distillation.
        teacher_words: arguments to train the teacher; empty if it exists already.
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
        for option, words in (("--recipes", names), ("--students", list(self.students))):
            if repeated := next((word for word in words if words.count(word) > 1), None):
                raise UserError(f"{option} names {repeated} twice: give each once")

    @property
    def design(self) -> Design:
        """The statistical design."""
        number = len(self.students) * (len(self.recipes) - 1)
        return Design(self.seeds, number, self.confidence, self.margin, self.resolution)

    def pairs(self) -> list[Pair]:
        """Return every (student, recipe), with the control first for each student."""
        names = sorted((recipe.name for recipe in self.recipes), key=lambda name: name != ALONE)
        return [(student, name) for student in self.students for name in names]

    def words_of(self, pair: Pair) -> tuple[str, tuple[str, ...]]:
        """Return the script and its arguments for a student's recipe, without seed and folder."""
        student, name = pair
        recipe = next(recipe for recipe in self.recipes if recipe.name == name)
        teacher = self.teacher if recipe.script == "main_mgd" and name not in self.without_teacher else ()
        return recipe.script, (self.data, *self.words, *recipe.words, "-a", student, *teacher)

    def command(self, folder: Path, pair: Pair, seed: int) -> Command:
        """Return the command that trains a student by a recipe with a seed."""
        script, words = self.words_of(pair)
        name = f"{'-'.join(pair)}-{seed}".replace(":", "-").replace("/", "-")
        return Command(script, words, seed, folder / "runs" / name, folder / "logs" / f"{name}.log")

    def teacher_command(self, folder: Path) -> Command:
        """Return the command that trains the teacher."""
        paths = folder / "runs" / "teacher", folder / "logs" / "teacher.log"
        return Command("main_base", (self.data, *self.teacher_words), 0, *paths)

    def record(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


def save_plan(plan: Plan, folder: Path) -> bool:
    """Write the plan into a folder; return whether the folder had it already.

    Raises:
        UserError: the folder has another plan, or a damaged one.
    """
    path = folder / PLAN
    if exists(path):
        try:
            old = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged: give another --output") from error
        new = plan.record()
        if differences := [key for key in new if not isinstance(old, dict) or old.get(key) != new[key]]:
            names = ["options of training" if key == "words" else key for key in differences]
            raise UserError(
                f"{folder} holds a comparison with other {', '.join(names)}: type the line that began it, or give "
                "another --output"
            )
        return True
    write_whole(path, (json.dumps(plan.record(), indent=1) + "\n").encode())
    return False


Accuracies = Mapping[Pair, Mapping[int, float]]  # {(student, recipe): {seed: top-1 in percent}}


def judge_all(plan: Plan, accuracies: Accuracies) -> dict[Pair, Verdict]:
    """Return the verdict on every recipe against the control of its student, by the seeds that both have."""
    verdicts = {}
    for student, name in plan.pairs():
        of_recipe, of_control = accuracies.get((student, name), {}), accuracies.get((student, ALONE), {})
        differences = [of_recipe[seed] - of_control[seed] for seed in sorted(of_recipe) if seed in of_control]
        if differences and name != ALONE:
            verdicts[student, name] = judge(differences, plan.design)
    return verdicts


def undecided_pairs(plan: Plan, verdicts: Mapping[Pair, Verdict]) -> list[Pair]:
    """Return the pairs to run with the next seed: recipes that are not decided, and the controls of their students."""
    undecided = [p for p in plan.pairs() if p[1] != ALONE and not (p in verdicts and verdicts[p].decided)]
    students = {student for student, _ in undecided}
    return [pair for pair in plan.pairs() if pair in undecided or (pair[1] == ALONE and pair[0] in students)]


def describe_verdict(verdict: Verdict, pair: Pair, confidence: float) -> str:
    """Describe a verdict in one line."""
    seeds = f"{verdict.seeds} seeds" if verdict.seeds > 1 else "1 seed"
    return (
        f"{verdict.word}: {pair[1]} with {pair[0]}: {verdict.difference:+.2f} points of top-1 against {ALONE} "
        f"({100 * confidence:g} % interval {_format_interval(verdict)}, {seeds})"
    )


def _format_interval(verdict: Verdict) -> str:
    low, high = verdict.interval
    return f"{low:+.2f} to {high:+.2f}" if math.isfinite(low) else "unknown"


def table(plan: Plan, accuracies: Accuracies, verdicts: Mapping[Pair, Verdict]) -> str:
    """Return the comparison as a Markdown table."""
    lines = ["| student | recipe | top-1 %, last epoch | seeds | against alone, paired | interval | verdict |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for pair in plan.pairs():
        values = list(accuracies.get(pair, {}).values())
        mean = f"{statistics.mean(values):.2f}" if values else ""
        mean += f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        verdict = verdicts.get(pair)
        verdict_cells = (
            [f"{verdict.difference:+.2f}", _format_interval(verdict), verdict.word] if verdict else ["", "", ""]
        )
        lines.append("| " + " | ".join([*pair, mean, str(len(values)), *verdict_cells]) + " |")
    return "\n".join(lines)


def save_comparison(plan: Plan, accuracies: Accuracies, verdicts: Mapping[Pair, Verdict], folder: Path) -> None:
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
            for pair in plan.pairs() for seed, top1 in sorted(accuracies.get(pair, {}).items())
        ],
        "comparisons": [
            {"student": pair[0], "recipe": pair[1], "against": ALONE, "verdict": verdict.word,
             "difference": verdict.difference, "seeds": verdict.seeds,
             "interval": list(verdict.interval) if math.isfinite(verdict.interval[0]) else None}
            for pair, verdict in verdicts.items()
        ],
    }  # fmt: skip
    write_whole(folder / RESULT, (json.dumps(content, indent=1) + "\n").encode())
    footnote = (
        f"Top-1 of the last epoch. Intervals hold at {100 * plan.confidence:g} % together, over all comparisons and "
        f"all looks; differences up to {plan.margin:g} points count as none. {UNDECIDED}: these seeds do not tell."
    )
    write_whole(folder / TABLE, f"{table(plan, accuracies, verdicts)}\n\n{footnote}\n".encode())


def seeds_of(plan: Plan) -> Sequence[int]:
    """Return the seeds in the order in which they are run."""
    return range(plan.seeds)
