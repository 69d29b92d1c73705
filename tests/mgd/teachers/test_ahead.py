from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import mgd
from tests.mgd.nets import TOY_TAPS, toy


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_outputs_are_those_of_the_batch_whatever_it_is() -> None:
    teachers = [mgd.freeze(mgd.Taps(toy(seed=s), TOY_TAPS)) for s in (0, 1)]
    batches = [(torch.randn(4, 3, 6, 6), number) for number in range(5)]
    came = list(mgd.Ahead(teachers, 1)(batches, lambda batch: batch[0]))
    assert [batch[1] for batch, _ in came] == [0, 1, 2, 3, 4]
    for (images, _), known in came:
        for got, teacher in zip(known.result(), teachers, strict=True):
            expected = teacher(images)
            torch.testing.assert_close(
                [got.logits, *got.features], [expected.logits, *expected.features], rtol=1e-5, atol=1e-5
            )
            assert not got.logits.requires_grad
    assert list(mgd.Ahead(teachers, 1)([], lambda batch: batch)) == []


def test_the_next_batch_is_begun_while_the_caller_holds_this_one() -> None:
    begun = [threading.Event() for _ in range(3)]
    seen: list[int] = []

    def images(number: int) -> Tensor:
        seen.append(torch.get_num_threads())
        begun[number].set()
        return torch.zeros(1, 3, 6, 6)

    assert torch.get_num_threads() == 4
    for number, _ in mgd.Ahead([mgd.freeze(toy())], 1)(range(3), images):
        assert number == 2 or begun[number + 1].wait(timeout=20)
        assert number > 0 or not begun[2].is_set()  # one batch ahead, not two
        assert torch.get_num_threads() == 3
    assert seen == [1, 1, 1] and torch.get_num_threads() == 4


def test_whoever_leaves_early_gets_the_threads_back() -> None:
    for _ in mgd.Ahead([mgd.freeze(toy())], 3)([torch.zeros(1, 3, 6, 6)] * 4, lambda batch: batch):
        assert torch.get_num_threads() == 1
        break
    assert torch.get_num_threads() == 4


def test_what_a_teacher_raises_comes_with_its_batch() -> None:
    good, bad = torch.zeros(1, 3, 6, 6), torch.zeros(1, 5, 6, 6)
    (_, first), (_, second) = mgd.Ahead([mgd.freeze(toy())], 1)([good, bad], lambda batch: batch)
    assert len(first.result()) == 1
    with pytest.raises(RuntimeError, match="channels"):
        second.result()


@pytest.mark.parametrize("threads", [0, 4, -1])
def test_somebody_must_be_left_to_train(threads: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 3 of 4 threads; got {threads}"):
        mgd.Ahead([], threads)


def test_a_distiller_takes_what_is_known() -> None:
    student, teacher = toy(seed=1), mgd.freeze(toy())
    distiller = mgd.Distiller(student, teacher, {"kd": (mgd.losses.KD(temperature=4.0), 1.0)}).eval()
    images = torch.randn(4, 3, 6, 6)
    expected = distiller(images)["kd"]
    assert torch.equal(distiller(images, taught=[teacher(images)])["kd"], expected)
    assert not torch.equal(distiller(images, taught=[teacher(-images)])["kd"], expected)


def test_no_more_than_one_batch_is_taken_ahead() -> None:
    taken: list[int] = []

    def batches() -> Iterator[Tensor]:
        for number in range(4):
            taken.append(number)
            yield torch.zeros(1, 3, 6, 6)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for number, _ in enumerate(mgd.Ahead([mgd.freeze(toy())], 1)(batches(), lambda batch: batch)):
            assert len(taken) == min(number + 2, 4)
    finally:
        torch.set_num_threads(before)
