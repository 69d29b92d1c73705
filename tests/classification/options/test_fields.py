"""Options declared as fields: spelling, order, kinds, and what else stands beside them."""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import dataclass

import pytest

from classification.options.fields import count, declared, number, option, positive, switch
from classification.options.options import all_options, names_where


@dataclass(frozen=True)
class Toy:
    folder: str | None = option(None, positional=True, help="")
    batch_size: int = option(8, "-b", "--batch-size", kind=count, help="", free=True)
    some_rate: float = option(0.5, kind=positive, help="")
    names: tuple[str, ...] = option((), help="")
    epochs: tuple[int, ...] = option((3, 5), kind=count, nargs="+", help="")
    quiet: bool = option(False, help="")
    fast: int = switch(0, help="")
    found: int = 7  # no option


def test_fields_declare_options_in_order() -> None:
    found = list(declared(Toy))
    assert [entry.name for entry in found] == [
        "folder", "batch_size", "some_rate", "names", "epochs", "quiet", "fast",
    ]  # fmt: skip
    assert [entry.flags for entry in found[:3]] == [(), ("-b", "--batch-size"), ("--some-rate",)]
    assert [entry.name for entry in found if entry.is_flag] == ["quiet"]
    assert [entry.name for entry in found if entry.repeats] == ["names"]
    assert [entry.name for entry in found if entry.free] == ["batch_size"]
    assert found[6].choices == (0, 1)


@pytest.mark.parametrize("text", ["1", "2.5", "nan", "inf", "x", "0", "11"])
def test_numbers_outside_their_bounds_are_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="expected a whole number at least 2, at most 10; got"):
        number(int, 2, 10)(text)
    assert number(int, 2, 10)("10") == 10


def test_no_name_or_flag_is_declared_twice_and_main_base_has_fewer() -> None:
    names = [entry.name for entry in all_options()]
    flags = [flag for entry in all_options() for flag in entry.flags]
    assert len(set(names)) == len(names) and len(set(flags)) == len(flags)
    base = {entry.name for entry in all_options(distillation=False)}
    assert set(names) - base >= {"distiller", "term", "mgd_reducer", "taps", "teacher_dtype"}
    assert base >= {"data", "lr", "teacher_resume", "label_smoothing"}


def test_what_changes_a_result_is_not_free() -> None:
    free = names_where("free")
    assert not free & {"lr", "batch_size", "distiller", "arch", "amp", "img_size", "seed", "mgd_reducer", "sync_bn"}
    assert free >= {"data", "device", "workers", "output", "teacher_resume", "term_module"}
    assert names_where("place") - {"pile_list", "pile_root", "teacher_cache"} == {"data", "train_list", "valid_list"}
    assert names_where("place") & names_where("reading") == {"data", "train_list", "valid_list"}
