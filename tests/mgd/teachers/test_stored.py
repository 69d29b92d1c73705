"""What is kept of a teacher's probabilities, against numbers worked out by hand."""

from __future__ import annotations

from math import inf, log

import pytest
import torch

from mgd import keep_top, spread_rest
from mgd.losses import kd


def test_a_case_worked_out_by_hand() -> None:
    logs = torch.tensor([[0.1, 0.5, 0.3, 0.05, 0.05], [0.2, 0.2, 0.2, 0.2, 0.2]]).log()
    classes, values, rest = keep_top(logs, 2)
    assert classes.tolist() == [[1, 2], [0, 1]]  # the smaller index first among equals
    torch.testing.assert_close(values, torch.tensor([[log(0.5), log(0.3)], [log(0.2), log(0.2)]]))
    torch.testing.assert_close(rest, torch.tensor([log(0.2), log(0.6)]))
    whole = spread_rest(classes, values, rest, 5)
    each = 0.2 / 3
    torch.testing.assert_close(whole.exp(), torch.tensor([[each, 0.5, 0.3, each, each], [0.2] * 5]))


def test_all_classes_give_the_teacher_at_any_temperature() -> None:
    torch.manual_seed(0)
    teacher, student = 5 * torch.randn(6, 7), torch.randn(6, 7)
    classes, values, rest = keep_top(teacher.log_softmax(1), 7)
    assert rest.tolist() == [-inf] * 6
    whole = spread_rest(classes, values.half(), rest.half(), 7)
    for temperature in (0.5, 1.0, 4.0):
        want = kd(student, teacher, temperature=temperature)
        assert float(kd(student, whole, temperature=temperature)) == pytest.approx(float(want), rel=2e-3)


def test_the_rest_keeps_its_mass_where_it_is_tiny() -> None:
    logs = torch.tensor([[20.0, 0.0, 0.0, -3.0]], dtype=torch.float64).log_softmax(1)
    classes, values, rest = keep_top(logs, 1)
    whole = spread_rest(classes, values.half(), rest.half(), 4).double().exp()
    assert float(whole[0, 1:].sum()) == pytest.approx(float(logs[0, 1:].exp().sum()), rel=0.01)


def test_what_makes_no_sense_is_refused() -> None:
    logs = torch.zeros(2, 3)
    for wrong, top in ((logs, 4), (logs, 0), (logs[0], 1)):
        with pytest.raises(ValueError, match="keep_top needs"):
            keep_top(wrong, top)
    with pytest.raises(ValueError, match="spread_rest needs"):
        spread_rest(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 1), torch.zeros(2), 3)
    with pytest.raises(TypeError, match="must be a tensor"):
        keep_top([[0.0]], 1)  # type: ignore[arg-type]
