from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mgd import Batch, Outputs
from mgd.losses.crd import CRD, candidates, crd
from tests.mgd.losses.ranks import Loss, check_two_ranks
from tests.mgd.nets import built, has_gradient
from tests.reference import other_losses

NUM_IMAGES = 12
INDEX = torch.tensor([3, 0, 7, 11])


def outputs(width: int, seed: int, grad: bool = False) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(4, width, 2, 2, generator=generator).requires_grad_(grad)
    return Outputs(torch.randn(4, 5, generator=generator).requires_grad_(grad), [maps])


def term(*widths: int, **options: Any) -> CRD:
    torch.manual_seed(0)
    options = {"num_negatives": 6, "dimension": 8, "temperature": 0.5, **options}
    return CRD(widths[0], widths[1:], NUM_IMAGES, **options)


def memory_of(loss: CRD) -> Any:
    """The banks and heads for the only teacher."""
    (memory,) = loss.contrasts
    return memory


@pytest.mark.parametrize("num_negatives", [1, 6, 11, 16384])
def test_equals_the_literal_formula_over_two_steps(num_negatives: int) -> None:
    loss = term(3, 4, num_negatives=num_negatives)
    memory = memory_of(loss)
    normalisers: list[float | None] = [None, None]
    for step in range(2):
        student, teacher = outputs(3, 10 + step), outputs(4, 20 + step)
        index = (INDEX + step) % NUM_IMAGES
        drawn = candidates(step, min(num_negatives, 11) + 1, NUM_IMAGES).tolist()
        negatives = [other_losses.crd_negatives(drawn, int(i)) for i in index]
        banks = [memory.student_bank.clone().numpy(), memory.teacher_bank.clone().numpy()]
        embedded = [memory.student_head(student.features[0].mean((2, 3))).detach().numpy()]
        embedded.append(memory.teacher_head(teacher.features[0].mean((2, 3))).detach().numpy())
        expected = 0.0
        for side in (0, 1):
            value, normalisers[side] = other_losses.crd(
                embedded[side], banks[1 - side], index.tolist(), negatives, 0.5, normalisers[side]
            )
            expected += value
        assert loss(student, [teacher], Batch(index=index)).item() == pytest.approx(expected, rel=1e-4)
        assert memory.log_normalisers.exp().tolist() == pytest.approx(normalisers, rel=1e-4)
        for side, bank in enumerate((memory.student_bank, memory.teacher_bank)):
            for row, i in enumerate(index.tolist()):
                banks[side][i] = other_losses.crd_entry(banks[side][i], embedded[side][row], 0.5)
            torch.testing.assert_close(bank, torch.from_numpy(banks[side]))


def test_by_hand() -> None:
    # One negative of two images: h = 1 / (1 + 1/2) for both scores 0, and 2 / (2 + 1/2) for log 2.
    expected = torch.tensor([-math.log(2 / 3) - math.log(1 / 3), -math.log(4 / 5) - math.log(1 / 3)])
    scores = torch.tensor([[0.0, 0.0], [math.log(2), 0.0]])
    torch.testing.assert_close(crd(scores, torch.tensor(0.0), num_images=2), expected)
    torch.testing.assert_close(crd(scores + 200, torch.tensor(200.0), num_images=2), expected)


@pytest.mark.parametrize("num_negatives", [3, 10, 11, 100])
def test_no_image_is_its_own_negative_and_none_comes_twice(num_negatives: int) -> None:
    memory = memory_of(term(3, 4, num_negatives=num_negatives, temperature=1.0))
    index = torch.arange(NUM_IMAGES)
    drawn = candidates(5, memory.num_negatives + 1, NUM_IMAGES)
    # Scores against rows of the identity spell out which rows were taken.
    names = torch.arange(NUM_IMAGES, dtype=torch.float32).repeat(NUM_IMAGES, 1)
    scores = memory._scores(names, torch.eye(NUM_IMAGES), index, drawn)
    assert scores[:, 0].tolist() == index.tolist()
    for own, row in enumerate(scores[:, 1:].long().tolist()):
        assert own not in row and len(set(row)) == len(row) == min(num_negatives, NUM_IMAGES - 1)


def test_draws_go_through_all_images_and_depend_on_nothing_but_the_step() -> None:
    torch.manual_seed(1)
    windows = [candidates(step, 5, 20) for step in range(8)]
    assert sorted(torch.cat(windows[:4]).tolist()) == sorted(torch.cat(windows[4:]).tolist()) == list(range(20))
    assert windows[0].tolist() != windows[4].tolist()
    torch.manual_seed(2)
    assert candidates(6, 5, 20).tolist() == windows[6].tolist()
    counts = torch.cat([candidates(step, 3, 4) for step in range(400)]).bincount(minlength=4)
    assert counts.min() > 260 and counts.max() < 340


def test_the_order_of_the_images_changes_nothing() -> None:
    student, teacher = outputs(3, 1), outputs(4, 2)
    turned = [Outputs(o.logits, [o.features[0].flip(0)]) for o in (student, teacher)]
    expected = term(3, 4)(student, [teacher], Batch(index=INDEX))
    torch.testing.assert_close(term(3, 4)(turned[0], turned[1:], Batch(index=INDEX.flip(0))), expected)


def test_evaluation_leaves_the_memory_alone() -> None:
    loss = term(3, 4).eval()
    before = copy.deepcopy(loss.state_dict())
    loss(outputs(3, 1), [outputs(4, 2)], Batch(index=INDEX))
    for name, value in loss.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True)


def test_an_image_that_comes_twice_is_remembered_by_its_first_row() -> None:
    student, teacher, index = outputs(3, 1), outputs(4, 2), torch.tensor([3, 0, 3, 11])
    loss, other = term(3, 4), term(3, 4)
    loss(student, [teacher], Batch(index=index))
    first = [Outputs(o.logits[:1], [o.features[0][:1]]) for o in (student, teacher)]
    other(first[0], first[1:], Batch(index=index[:1]))
    torch.testing.assert_close(memory_of(loss).student_bank[3], memory_of(other).student_bank[3])


def test_a_saved_term_continues_as_if_never_stopped() -> None:
    loss, batch = term(3, 4), Batch(index=INDEX)
    loss(outputs(3, 1), [outputs(4, 2)], batch)
    resumed = term(3, 4, seed=0)
    resumed.load_state_dict(loss.state_dict())
    for step in range(2):
        student, teacher = outputs(3, 30 + step), outputs(4, 40 + step)
        assert torch.equal(resumed(student, [teacher], batch), loss(student, [teacher], batch))


def test_learning_brings_an_image_of_both_networks_together() -> None:
    loss, student, teacher = term(3, 4), outputs(3, 1), outputs(4, 2)
    optimizer = torch.optim.SGD(loss.parameters(), 0.1)
    for _ in range(30):
        optimizer.zero_grad()
        loss(student, [teacher], Batch(index=INDEX)).backward()
        optimizer.step()
    memory = memory_of(loss)
    cosines = memory.student_bank[INDEX] @ memory.teacher_bank[INDEX].T
    assert (cosines.argmax(1) == torch.arange(4)).all()


def test_gradient_reaches_the_student_and_both_heads_but_not_the_teacher() -> None:
    student, teacher = outputs(3, 1, grad=True), outputs(4, 2, grad=True)
    loss = term(3, 4)
    loss(student, [teacher], Batch(index=INDEX)).backward()
    assert has_gradient(student.features[0]) and student.logits.grad is None
    assert teacher.features[0].grad is None and teacher.logits.grad is None
    assert all(has_gradient(p) for p in loss.parameters())


def test_without_taps_the_logits_are_contrasted() -> None:
    student, teacher = Outputs(torch.randn(4, 5, requires_grad=True)), Outputs(torch.randn(4, 5))
    loss = built(CRD, student, [teacher], NUM_IMAGES, num_negatives=6)
    loss(student, [teacher], Batch(index=INDEX)).backward()
    assert has_gradient(student.logits) and memory_of(loss).student_bank.shape == (NUM_IMAGES, 128)


def test_bf16_gives_a_float32_value_near_the_float32_one() -> None:
    student, teacher = outputs(3, 1), outputs(4, 2)
    expected = term(3, 4)(student, [teacher], Batch(index=INDEX))
    half = [Outputs(o.logits, [o.features[0].bfloat16()]) for o in (student, teacher)]
    with torch.autocast("cpu", torch.bfloat16):
        value = term(3, 4)(half[0], half[1:], Batch(index=INDEX))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.02, atol=0)


def test_a_sharp_temperature_stays_finite() -> None:
    loss = term(3, 4, temperature=0.005)
    assert loss(outputs(3, 1), [outputs(4, 2)], Batch(index=INDEX)).isfinite()


def test_each_teacher_has_a_memory_of_its_own_and_the_term_averages() -> None:
    student, teachers, batch = outputs(3, 1), [outputs(4, 2), outputs(5, 3)], Batch(index=INDEX)
    loss = term(3, 4, 5, teacher_weights=[3.0, 1.0]).eval()
    parts = [loss.against(n, student, teacher, batch) for n, teacher in enumerate(teachers)]
    torch.testing.assert_close(loss(student, teachers, batch), 0.75 * parts[0] + 0.25 * parts[1])


def test_wrong_use_is_refused() -> None:
    wrong = ({"temperature": 0.0}, {"momentum": 1.0}, {"num_negatives": 0}, {"dimension": 0})
    for options in wrong:
        with pytest.raises(ValueError, match=next(iter(options))):
            term(3, 4, **options)
    with pytest.raises(ValueError, match="two training images"):
        CRD(3, [4], 1)
    with pytest.raises(ValueError, match="pass index"):
        term(3, 4)(outputs(3, 1), [outputs(4, 2)], Batch())


def make() -> tuple[nn.Module, Loss]:
    generator = torch.Generator().manual_seed(0)
    images, teachers = torch.randn(2, 8, 4, generator=generator), torch.randn(2, 8, 5, generator=generator)
    index = torch.randperm(20, generator=generator)[:16].reshape(2, 8)
    index[1, 2:5] = index[0, 3:6]  # so that the second step reads what the first one wrote
    torch.manual_seed(0)
    crd = CRD(3, [5], 20, num_negatives=6, dimension=4, temperature=0.5)
    both = nn.ModuleDict({"net": nn.Linear(4, 3), "crd": crd})

    def loss(module: nn.Module, part: slice) -> Tensor:
        assert isinstance(module, nn.ModuleDict) and isinstance(module["crd"], CRD)
        total = torch.zeros(())
        for step in range(2):
            student, teacher = Outputs(module["net"](images[step, part])), Outputs(teachers[step, part])
            total = total + module["crd"](student, [teacher], Batch(index=index[step, part]))
        out: Tensor = total + 0.1 * memory_of(module["crd"]).student_bank.cumsum(0).sum()
        return out

    return both, loss


def test_two_ranks_compute_the_loss_gradients_and_memory_of_one() -> None:
    check_two_ranks(make)


def test_the_seed_of_crd_is_that_of_its_banks_and_draws() -> None:
    student, teacher, index = torch.randn(4, 3), torch.randn(4, 3), INDEX
    terms = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        terms.append(CRD(3, [3], 12, num_negatives=4, dimension=8, seed=seed))
    values = [term(Outputs(student), [Outputs(teacher)], Batch(index=index)).item() for term in terms]
    assert values[0] == values[1] != values[2]
    assert not torch.equal(memory_of(terms[0]).student_bank, memory_of(terms[2]).student_bank)
    memory_of(terms[2]).load_state_dict(memory_of(terms[0]).state_dict())  # the same banks: other draws
    values = [term(Outputs(student), [Outputs(teacher)], Batch(index=index)).item() for term in (terms[0], terms[2])]
    assert values[0] != values[1]


def test_an_embedding_that_is_not_finite_leaves_the_memory_alone() -> None:
    torch.manual_seed(0)
    term, index = CRD(3, [3], 12, num_negatives=4, dimension=8), torch.tensor([3, 0])
    before = memory_of(term).student_bank.clone()
    bad = torch.randn(2, 3)
    bad[0] = torch.nan
    term(Outputs(bad), [Outputs(torch.randn(2, 3))], Batch(index=index))
    after = memory_of(term).student_bank
    assert torch.equal(after[3], before[3]) and not torch.equal(after[0], before[0])


def test_defaults_and_momentum_of_crd() -> None:
    memory = memory_of(CRD(3, [3], 20000))
    assert (memory.num_negatives, memory.hyper.temperature, memory.hyper.momentum) == (16384, 0.07, 0.5)
    for momentum in (-0.1, 1.0):
        with pytest.raises(ValueError, match="momentum"):
            CRD(3, [3], 12, momentum=momentum)


def test_the_momentum_is_the_share_of_the_old_entry() -> None:
    memory = CRD(2, [2], 5, num_negatives=2, dimension=2, momentum=0.75).train()
    state = memory.state_dict()
    for side in ("student", "teacher"):
        state[f"contrasts.0.{side}_head.weight"] = torch.eye(2)
        state[f"contrasts.0.{side}_head.bias"] = torch.zeros(2)
        state[f"contrasts.0.{side}_bank"][3] = torch.tensor([1.0, 0.0])
    memory.load_state_dict(state)
    # The student embeds the image as (0, 1), the teacher as (0.6, 0.8).
    memory(Outputs(torch.tensor([[0.0, 2.0]])), [Outputs(torch.tensor([[3.0, 4.0]]))], Batch(index=torch.tensor([3])))
    kept = memory.state_dict()
    for side, (x, y) in {"student": (0.75, 0.25), "teacher": (0.9, 0.2)}.items():
        length = (x * x + y * y) ** 0.5
        torch.testing.assert_close(kept[f"contrasts.0.{side}_bank"][3], torch.tensor([x / length, y / length]))
