from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mgd import Batch, Outputs
from mgd.losses.similarity import Similarity, similarity
from tests.mgd.losses.ranks import Loss, check_two_ranks
from tests.mgd.nets import has_gradient


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def literal(student: np.ndarray, teacher: np.ndarray, power: int = 2) -> float:
    """The formula, pair by pair; `power` is that of the norm of a row."""
    grams = []
    for maps in (student, teacher):
        gram = [[sum(a * b for a, b in zip(x.flat, y.flat, strict=True)) for y in maps] for x in maps]
        lengths = [sum(abs(g) ** power for g in row) ** (1 / power) for row in gram]
        grams.append([[g / length for g in row] for row, length in zip(gram, lengths, strict=True)])
    pairs = [(i, j) for i in range(len(student)) for j in range(len(student))]
    value: float = sum((grams[0][i][j] - grams[1][i][j]) ** 2 for i, j in pairs) / len(pairs)
    return value


def test_equals_the_literal_formula() -> None:
    student, teacher = randn(5, 3, 4, 4), randn(5, 7, 2, 3, seed=1)
    assert similarity(student, teacher).item() == pytest.approx(literal(student.numpy(), teacher.numpy()), rel=1e-5)


def test_by_hand() -> None:
    # Q Q^T = ((1, 1), (1, 2)) and ((1, 0), (0, 1))
    student, teacher = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.eye(2)
    first = (1 / math.sqrt(2) - 1) ** 2 + 1 / 2
    second = 1 / 5 + (2 / math.sqrt(5) - 1) ** 2
    shape = (2, 1, 1, 2)
    assert similarity(student.view(shape), teacher.view(shape)).item() == pytest.approx((first + second) / 4)


def test_a_rotation_of_the_channels_and_the_scale_change_nothing() -> None:
    student, teacher = randn(5, 3, 4, 4), randn(5, 7, 2, 2, seed=1)
    turn = torch.linalg.qr(randn(3, 3, seed=2)).Q
    turned = 4 * torch.einsum("cd,bdhw->bchw", turn, student)
    torch.testing.assert_close(similarity(turned, teacher), similarity(student, teacher))
    assert similarity(student, student.flip(0)).item() > 1e-3 > similarity(student, turned).item()


def test_gradient_reaches_the_student_only_also_from_bf16() -> None:
    student, teacher = (Outputs(torch.zeros(4, 2), [randn(4, 3, 2, 2, seed=s).bfloat16()]) for s in (0, 1))
    for outputs in (student, teacher):
        outputs.features[0].requires_grad_()
    loss = Similarity()(student, [teacher], Batch())
    loss.backward()
    assert loss.dtype == torch.float32 and has_gradient(student.features[0]) and teacher.features[0].grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    student, teacher = 30 * randn(4, 64, 4, 4), 30 * randn(4, 128, 4, 4, seed=1)  # |Q|^2 of a million
    assert (student[0] ** 2).sum() > torch.finfo(torch.float16).max
    with torch.autocast("cpu", dtype):
        value = similarity(student, teacher)
    assert value.item() == similarity(student, teacher).item() > 0


def test_the_term_takes_the_last_map_and_averages_over_teachers() -> None:
    maps = [randn(4, 3, 2, 2, seed=s) for s in range(4)]
    student, teachers = Outputs(torch.zeros(4, 2), maps[:2]), [Outputs(torch.zeros(4, 2), [m]) for m in maps[2:]]
    each = [similarity(maps[1], m) for m in maps[2:]]
    term = Similarity(teacher_weights=[3, 1])
    torch.testing.assert_close(term(student, teachers, Batch()), (3 * each[0] + each[1]) / 4)


def test_torchdistill_takes_another_norm() -> None:
    """Its rows have absolute values that sum to 1, where the paper's have length 1: nothing else differs."""
    theirs = pytest.importorskip("torchdistill.losses.mid_level").SPKDLoss
    student, teacher = randn(5, 3, 4, 4), randn(5, 7, 2, 3, seed=1)
    value = theirs("m", "m", "batchmean")({"m": {"output": student}}, {"m": {"output": teacher}})
    assert value.item() == pytest.approx(literal(student.numpy(), teacher.numpy(), power=1), rel=1e-5)


def make() -> tuple[nn.Module, Loss]:
    images, maps = randn(8, 4), randn(8, 6, 2, 2, seed=1)
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(randn(3, 4, seed=2))
        layer.bias.zero_()

    def loss(module: nn.Module, part: slice) -> Tensor:
        student = Outputs(torch.zeros(8, 2)[part], [module(images[part])[:, :, None, None]])
        value: Tensor = Similarity()(student, [Outputs(torch.zeros(0), [maps[part]])], Batch())
        return value

    return layer, loss


def test_two_ranks_compute_the_loss_and_gradients_of_one() -> None:
    check_two_ranks(make)
