"""The teachers that options and a recipe name: one description each, with the files split at commas."""

from __future__ import annotations

from typing import Any

from classification.errors import UserError
from classification.options.names import DEFAULT_TEACHER
from classification.options.options import Options
from classification.options.terms import mutual
from classification.paths import is_file


def describe_teachers(options: Options, recipe: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one dict per teacher: arch, resume, frozen, and a recipe's weights, weight, img_size, mean, std.

    With --teacher-cache there is none.
    """
    if options.networks.teacher_cache and not options.run.evaluate:
        return []  # its outputs are stored
    peers = bool(mutual(options.table))
    if recipe:
        files = split_files(options.networks.teacher_resume, len(recipe)) if options.networks.teacher_resume else []
        if files and len(files) != len(recipe):
            raise UserError(_unequal(files, f"{len(recipe)} of the recipe"))
        return [{**teacher, "resume": file} for teacher, file in zip(recipe, files, strict=True)] if files else recipe
    archs: list[str | None] = list(options.networks.teacher_arch.split(",")) if options.networks.teacher_arch else []
    files = split_files(options.networks.teacher_resume, len(archs)) if options.networks.teacher_resume else []
    if not archs and not files and options.networks.arch:
        archs = [options.networks.arch if peers else DEFAULT_TEACHER.get(options.networks.arch, "resnet50")]
    archs = archs or [None] * max(1, len(files))  # which their files say
    files = files or [""] * len(archs)
    if len(files) != len(archs):
        raise UserError(_unequal(files, f"{len(archs)} ({', '.join(map(str, archs))})"))
    return [{"arch": arch, "resume": file, "frozen": not peers} for arch, file in zip(archs, files, strict=True)]


def _unequal(files: list[str], teachers: str) -> str:
    return (
        f"--teacher-resume needs as many files as there are teachers, {teachers}, separated by commas; got {len(files)}"
    )


def split_files(text: str, number: int) -> list[str]:
    """Split names of files at commas, except those within a name of a file that is there.

    Args:
        text: the names.
        number: how many there should be; 0 for any number.
    """
    parts = text.split(",")
    found: list[list[str]] = [[]]  # the ways to divide what was read, the fewest files first
    ways: list[list[list[str]]] = [found]
    for end in range(1, len(parts) + 1):
        ways.append(
            [
                [*way, name]
                for start in range(end)
                for name in [",".join(parts[start:end])]
                if is_file(name)
                for way in ways[start]
            ][:100]
        )
    fitting = [way for way in ways[-1] if len(way) == number] or ways[-1]
    return min(fitting, key=len) if fitting else parts
