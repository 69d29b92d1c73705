from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from classification import main_mgd
from classification.errors import UserError
from classification.options.config import parse
from classification.options.term_module import term_classes
from mgd import Batch, Outputs
from mgd.losses import LOSSES
from tests.classification.test_main import options, records, without

GAP = """
from dataclasses import dataclass
from typing import Literal, Optional, Tuple

from torch.nn import functional as F

from mgd.losses import LogitTerm


class Gap(LogitTerm):
    @dataclass(frozen=True)
    class Hyper:
        power: Literal["absolute", "squared"] = "squared"
        scale: float = 1.0
        floor: Optional[float] = None
        window: Tuple[int, int] = (0, 9)

    def compare(self, student_logits, teacher_logits, target):
        gap = F.l1_loss if self.hyper.power == "absolute" else F.mse_loss
        return self.hyper.scale * gap(student_logits.float(), teacher_logits.float())


TERMS = {"gap": Gap}
"""


@pytest.fixture(params=["", "from __future__ import annotations\n"])
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "my_terms.py"
    path.write_text(request.param + GAP)
    return path


def test_types_of_hyper_parameters_are_read_however_they_are_written(file: Path) -> None:
    words = ["DIR", "--term-module", str(file), "--distiller", "gap+kd"]
    changes = {"power": "absolute", "scale": "2", "floor": "null", "window": "[1, 2]"}
    given = [word for key, value in changes.items() for word in ("--term", f"gap.{key}={value}")]
    hyper = parse([*words, *given], "main_mgd.py", distillation=True).table["gap"].hyper
    assert (hyper.power, hyper.scale, hyper.floor, hyper.window) == ("absolute", 2.0, None, (1, 2))
    for wrong, message in {
        "power=cubed": "gap.power must be one of absolute, squared; got 'cubed'",
        "scale=much": "gap.scale must be a number; got 'much'",
        "floor=true": "gap.floor must be a number or null; got True",
        "window=[1]": r"gap.window must be a list of 2 whole numbers; got \[1\]",
        "powr=absolute": "term gap has no 'powr': it takes weight.*; close ones are power",
    }.items():
        with pytest.raises(UserError, match=message):
            parse([*words, "--term", f"gap.{wrong}"], "main_mgd.py", distillation=True)


def test_a_term_of_the_file_is_what_it_computes(file: Path) -> None:
    kind = term_classes(str(file))["gap"]
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    expected = 2 * (student - teacher).abs().mean()
    term = kind(power="absolute", scale=2.0)
    torch.testing.assert_close(term(Outputs(student), [Outputs(teacher)], Batch()), expected)
    assert not torch.isclose(expected, 2 * F.mse_loss(student, teacher)) and "gap" not in LOSSES


def test_the_file_of_the_guide_works(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "reference" / "terms.md").read_text()
    (code,) = re.findall(r"```python\n(# my_terms.py.*?)```", guide, flags=re.DOTALL)
    (tmp_path / "my_terms.py").write_text(code)
    words = shlex.split(re.search(r"main_mgd.py (photos .*?)```", guide, flags=re.DOTALL)[1].replace("\\\n", " "))  # type: ignore[index]
    words[words.index("my_terms.py")] = str(tmp_path / "my_terms.py")
    spec = parse(words, "main_mgd.py", distillation=True).table["logit_gap"]
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    value = spec.kind(spec.hyper)(Outputs(student), [Outputs(teacher)], Batch())
    torch.testing.assert_close(value, (student - teacher).abs().mean())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = ", "cannot be run, line 1: SyntaxError"),
        ("1 / 0", "cannot be run: ZeroDivisionError: division by zero"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("", "expected TERMS = {name: term class}; got None"),
        ("TERMS = []", r"expected TERMS = {name: term class}; got \[\]"),
        ("TERMS = {'a b': 1}", "the name of a term must consist of small letters, digits and _; got 'a b'"),
        ("TERMS = {'mine': 1}", "mine must be a class made from mgd.losses.Term; got 1"),
        ("from mgd.losses import KD\nTERMS = {'kd': KD}", "kd is already the name of a term of the library"),
        (GAP.replace("@dataclass(frozen=True)", ""), "Gap.Hyper must be a dataclass"),
        (GAP.replace("scale: float", "scale: 'Unknown'"), "the types of Gap.Hyper cannot be read"),
    ],
)
def test_files_that_make_no_sense_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "my_terms.py").write_text(text)
    with pytest.raises(UserError, match=message):
        term_classes(str(tmp_path / "my_terms.py"))


def test_a_file_that_is_not_there_or_no_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text("TERMS = {}")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        term_classes(str(tmp_path / "none.py"))
    with pytest.raises(UserError, match="expected a Python file"):
        term_classes(str(tmp_path / "terms.txt"))


def test_no_recipe_brings_code_along(file: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"term_module: {file}\n")
    with pytest.raises(UserError, match="unknown key 'term_module'"):
        parse(["DIR", "--config", str(tmp_path / "r.yaml")], "main_mgd.py", distillation=True)


def test_a_run_resumes_only_with_the_same_file(
    distil: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "my_terms.py", Path(distil[-1])
    file.write_text(GAP)
    words = options(without(distil, "--loss-factor"), distiller="gap", epochs="1", term_module=str(file))
    assert main_mgd.main(words) == 0
    assert records(folder)[0]["train_gap"] > 0
    kept = json.loads((folder / "config.json").read_text())["options"]
    assert len(kept["term_digest"]) == 64 and kept["terms"]["gap"]["scale"] == 1.0
    marker = tmp_path / "ran"
    again = ["--resume", str(folder), "--epochs", "2"]
    file.write_text(f"open({str(marker)!r}, 'w')\n{GAP}")
    for more, message in (([], "give that file again with --term-module"), (["--term-module", str(file)], "differs")):
        capsys.readouterr()
        assert main_mgd.main([*again, *more]) == 2
        assert message in capsys.readouterr().err and not marker.exists()
    file.write_text(GAP)
    assert main_mgd.main([*again, "--term-module", str(file)]) == 0 and len(records(folder)) == 2
