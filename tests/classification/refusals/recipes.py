"""Recipes that are no YAML, more than YAML, or no recipes."""

from __future__ import annotations

from typing import Any

from classification import main_base, main_mgd
from tests.classification.refusals import Case, Place

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def recipe(content: str | bytes, *, process: bool = False) -> dict[str, Any]:
    """The rest of a case: a distillation by a recipe of this content."""

    def words(place: Place) -> list[str]:
        data, *options = place.distil()
        return [data, "--config", place.write("recipe.yaml", content), *options]

    return {"words": words, "script": main_mgd, "process": process}


CASES = [
    Case("a recipe that is not there", lambda p: p.base("--config", "gone.yaml")),
    Case("a recipe that does not end", lambda p: p.base("--config", "/dev/zero")),
    Case("a checkpoint given as a recipe", lambda p: p.base("--config", str(p.teacher))),
    Case("a recipe in another encoding", **recipe("output: Größe\n".encode("latin-1"))),
    Case("a list in the place of the mapping", **recipe("- epochs: 3\n")),
    Case("YAML that breaks off", **recipe("arch: [resnet18,\n")),
    Case("a tag that would run a program", **recipe("arch: !!python/object/apply:os.mkdir [was_run]\n", process=True)),
    Case("ten lines of aliases that mean a billion words", **recipe(BOMB, process=True)),
    Case("five thousand brackets", **recipe("epochs: " + "[" * 5000)),
    Case("a key given twice", **recipe("epochs: 3\nlr: 0.1\nepochs: 30\n")),
    Case("one option under two names", **recipe("lr: 0.1\nlearning_rate: 0.2\n")),
    Case("a key with a typing mistake", **recipe("epoch: 3\n")),
    Case("a word where a number belongs", **recipe("epochs: many\n")),
    Case("two values where one belongs", **recipe("epochs: [3, 30]\n")),
    Case("a number of 5,000 digits", **recipe("warmup_epochs: 0x" + "f" * 5000 + "\n")),
    Case("a weight that is not finite", **recipe("terms: {ce: , kd: {weight: .inf}}\n")),
    Case("a value that looks like an option", **recipe("device: --evaluate\n")),
    Case("a network named in two places", **recipe("student: {arch: resnet18}\narch: resnet34\n")),
    Case("a key of a recipe that has no effect", **recipe("mgd_reducer: sp\ndistiller: kd\n")),
    Case("a term that is a number", **recipe("terms: {1: {weight: 2}}\n")),
    Case("label smoothing above 1", **recipe("terms: {ce: {label_smoothing: 5}, kd: }\n")),
    Case("a teacher's mean of two numbers", **recipe("teachers: [{arch: resnet18, mean: [0.5, 0.5]}]\n")),
    Case("a switch that is a word", **recipe("teachers: [{arch: resnet18, frozen: 'no'}]\n")),
    Case("a run folder with a NUL in its name", words=lambda p: [
        str(p.photos), "-a", "cifar_resnet8", "--img-size", "16", "--config", p.write("r.yaml", 'output: "a\\0b"\n')
    ], script=main_base),
]  # fmt: skip
