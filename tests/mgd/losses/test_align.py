from __future__ import annotations

import numpy as np
import pytest
import torch

from mgd import Outputs, solve_flow
from mgd.losses.align import at_size_of, check_channels, pair, pairs, regressor, same_size, start_from


def test_the_larger_side_is_averaged_per_side() -> None:
    a, b = torch.arange(16.0).reshape(1, 1, 4, 4), torch.zeros(1, 2, 2, 6)
    first, second = same_size(a, b)
    assert first.shape == (1, 1, 2, 4) and second.shape == (1, 2, 2, 4)
    assert torch.equal(first[0, 0], torch.tensor([[2.0, 3.0, 4.0, 5.0], [10.0, 11.0, 12.0, 13.0]]))


def test_equal_sizes_are_returned_unchanged() -> None:
    a, b = torch.zeros(1, 1, 4, 5), torch.zeros(1, 2, 4, 5)
    assert same_size(a, b)[0] is a and same_size(a, b)[1] is b


def test_the_teacher_takes_the_resolution_of_the_student() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    assert at_size_of(student, teacher) is teacher
    large = torch.randn(2, 5, 8, 12, dtype=torch.float64)
    averaged = large.reshape(2, 5, 4, 2, 4, 3).mean((3, 5))
    torch.testing.assert_close(at_size_of(student, large), averaged)
    # Between the centres of 2 pixels, 0 and 8, the centres of 4 lie at 0, a quarter, three quarters and 8.
    ramp = torch.tensor([0.0, 8.0]).expand(1, 1, 2, 2)
    assert at_size_of(student, ramp)[0, 0].tolist() == [[0, 2, 6, 8]] * 4
    # A pixel of 4 covers one and a quarter of 5: the mean of a constant slope is that slope's.
    slope = torch.arange(5.0).expand(1, 1, 5, 5).bfloat16()
    fitted = at_size_of(torch.zeros(1, 1, 5, 4), slope)
    assert fitted.dtype == torch.bfloat16 and fitted.shape == (1, 1, 5, 4)
    assert fitted[0, 0, 0, 1:3].float().tolist() == pytest.approx([1.375, 2.625], abs=0.05)


def test_a_pair_is_float32_of_one_size_without_gradient_to_the_teacher() -> None:
    student = torch.randn(2, 3, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(2, 4, 6, 6, requires_grad=True)
    student_map, teacher_map = pair(student, teacher)
    assert student_map.shape == (2, 3, 3, 3) and teacher_map.shape == (2, 4, 3, 3)
    assert student_map.dtype == teacher_map.dtype == torch.float32
    assert student_map.requires_grad and not teacher_map.requires_grad


def test_pairs_need_as_many_taps_of_both() -> None:
    two, one, none = (Outputs(torch.zeros(2, 3), [torch.zeros(2, 3, 4, 4)] * n) for n in (2, 1, 0))
    assert len(pairs(two, two)) == 2
    for student, teacher in ((two, one), (one, none), (none, none)):
        with pytest.raises(ValueError, match=r"got . of the student, . of the teacher"):
            pairs(student, teacher)


@pytest.mark.parametrize(("student", "teachers"), [([], [[]]), ([3], []), ([3], [[4, 5]]), ([3, 4], [[5, 6], [7]])])
def test_channel_numbers_that_do_not_pair_up_are_refused(student: list[int], teachers: list[list[int]]) -> None:
    check_channels([3, 4], [[5, 6], [7, 8]])
    with pytest.raises(ValueError, match="equally many taps of every network"):
        check_channels(student, teachers)


def test_a_regressor_starts_from_a_flow_where_it_pairs_channels() -> None:
    cost = np.ones((2, 5))
    cost[0, [1, 4]] = cost[1, [0, 2]] = 0
    layer = regressor(2, 5)
    before = layer.get_parameter("0.weight").detach().clone()
    start_from(layer, solve_flow(cost, capacity="truncate"))  # two for each, and channel 3 for none
    rows = layer.get_parameter("0.weight").detach()[:, :, 0, 0]
    assert rows[[0, 1, 2, 4]].tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]
    assert torch.equal(rows[3], before[3, :, 0, 0]) and layer.get_parameter("0.weight").requires_grad
    wide = regressor(4, 2)
    start_from(wide, solve_flow(np.array([[0.0, 1], [1, 0], [1, 0], [0, 1]])))
    assert wide.get_parameter("0.weight").detach()[:, :, 0, 0].tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]]
    with pytest.raises(ValueError, match="between 2 and 5 channels; got one between 2 and 4"):
        start_from(layer, solve_flow(np.zeros((2, 4))))
