"""What terms share that use flows between channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mgd import Outputs, Probe, solve_flow
from mgd.flow import Flow
from mgd.losses.flows import FlowOptions, check_pairs, first_flows, flow_record, say_margins, say_sizes
from tests.mgd.nets import Seen

CPU = torch.device("cpu")
STUDENT, TEACHERS = (3, 2), ((5, 4), (6, 2))


def outputs(channels: tuple[int, ...], seed: int, batch: int, side: int = 4) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(batch, c, side, side, generator=generator) for c in channels]
    return Outputs(torch.zeros(batch, 3), maps)


def batches() -> list[tuple[Outputs, list[Outputs]]]:
    """Two batches, of 3 images and of 5."""
    return [
        (outputs(STUDENT, seed, size), [outputs(widths, 10 * seed + n, size) for n, widths in enumerate(TEACHERS)])
        for seed, size in ((1, 3), (2, 5))
    ]


def literal_cost(student: list[Tensor], teacher: list[Tensor]) -> np.ndarray:
    """The mean over all images of 2 - 2 cos, pair by pair."""
    costs = []
    for a, b in zip(torch.cat(student).double(), torch.cat(teacher).double(), strict=True):
        rows = [x.flatten(1).numpy() for x in (a, b)]
        lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in rows]
        costs.append(2 - 2 * (rows[0] / lengths[0]) @ (rows[1] / lengths[1]).T)
    mean: np.ndarray = np.mean(costs, axis=0)
    return mean


@pytest.mark.parametrize("assignment", ["cheapest", "costliest"])
def test_first_flows_are_those_of_the_cost_of_all_images_for_each_teacher(assignment: str) -> None:
    seen, options = Seen(batches()), FlowOptions(assignment=assignment, max_images=8)  # type: ignore[arg-type]
    flows, (numbers, arrays) = first_flows(STUDENT, TEACHERS, options, seen, CPU)
    assert seen.asked == [8] and [len(stages) for stages in flows] == [2, 2]
    total, position = 0.0, 0
    for teacher in range(2):
        for tap in range(2):
            student_maps = [student.features[tap] for student, _ in seen.batches]
            cost = literal_cost(student_maps, [teachers[teacher].features[tap] for _, teachers in seen.batches])
            expected = solve_flow(cost if assignment == "cheapest" else -cost)
            flow, paid = flows[teacher][tap], (expected.matrix * cost).sum()
            assert (flow.index == expected.index).all() and flow.total_cost == pytest.approx(paid, rel=1e-4)
            np.testing.assert_allclose(arrays[f"cost{position}"], cost, atol=1e-5)
            assert (arrays[f"index{position}"] == expected.index).all()
            total, position = total + paid, position + 1
    assert numbers["flow_cost"] == pytest.approx(total, rel=1e-4) and numbers["match_seconds"] > 0
    assert "flow_changed" not in numbers and "cost4" not in arrays


def test_random_first_flows_follow_the_seed_of_the_run() -> None:
    wide = [(outputs((8,), 0, 3), [outputs((16,), 1, 3)])]

    def drawn(seed: int) -> np.ndarray:
        ((flow,),), _ = first_flows((8,), ((16,),), FlowOptions(assignment="random"), Seen(wide, seed=seed), CPU)
        return flow.index

    assert (drawn(1) == drawn(1)).all() and (drawn(1) != drawn(2)).any()


def test_no_images_are_no_flows() -> None:
    with pytest.raises((RuntimeError, ValueError), match="images"):
        first_flows(STUDENT, TEACHERS, FlowOptions(), Seen([]), CPU)


def probe(channels: tuple[int, ...], side: int = 4, *, paths: tuple[str, ...] = (), frozen: bool = True) -> Probe:
    return Probe(outputs(channels, 0, 1, side), paths=paths, frozen=frozen)


def test_what_cannot_be_matched_is_refused() -> None:
    student = probe((3, 2), frozen=False)
    check_pairs(student, [probe((5, 4)), probe((6, 2))])
    with pytest.raises(ValueError, match="does not work with peers that train"):
        check_pairs(student, [probe((5, 4)), probe((6, 2), frozen=False)])
    with pytest.raises(ValueError, match="needs equally many taps of both networks; got 2 and 1"):
        check_pairs(student, [probe((5, 4)), probe((6,))])


def test_sizes_that_differ_are_said() -> None:
    student = probe((3, 2), frozen=False)
    assert say_sizes(student, probe((5, 4))) == []
    (first, _) = say_sizes(student, probe((5, 4), 8))
    assert first == "the teacher's map at tap number 0, 8 x 8, is averaged to the 4 x 4 of the student's tap number 0"
    named = replace(student, paths=("a", "b"))
    mixed = Probe(Outputs(torch.zeros(1, 3), [torch.zeros(1, 5, 4, 4), torch.zeros(1, 6, 4, 3)]), paths=("c", "d"))
    said = "the teacher's map at tap d, 4 x 3, is interpolated to the 4 x 4 of the student's tap b"
    assert say_sizes(named, mixed) == [said]


def test_first_flows_of_maps_of_other_sizes_are_those_of_the_averaged_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(6, 3, 4, 4, generator=generator), torch.randn(6, 5, 8, 8, generator=generator)
    averaged = theirs.reshape(6, 5, 4, 2, 4, 2).mean((3, 5))

    def solved(maps: torch.Tensor) -> Flow:
        seen = Seen([(Outputs(torch.zeros(6, 2), [ours]), [Outputs(torch.zeros(6, 2), [maps])])])
        ((found,),), _ = first_flows((3,), ((5,),), FlowOptions(), seen, CPU)
        return found

    assert (solved(theirs).index == solved(averaged).index).all()
    assert solved(theirs).total_cost == pytest.approx(solved(averaged).total_cost)


def flow(index: list[list[int]], num_teacher: int, cost: float) -> Flow:
    return Flow(np.array(index), num_teacher, cost, "by hand", 0.0)


def test_the_record_of_flows_by_hand() -> None:
    # 2 of the 4 pairs of the first are kept, and 1 of the 2 of the second: 3 of 6 changed.
    before = [flow([[0, 1], [2, 3]], 4, 1.0), flow([[0, 2]], 3, 1.0)]
    now = [flow([[0, 2], [1, 3]], 4, 2.5), flow([[0, 1]], 3, 0.5)]
    costs = [torch.arange(8.0).reshape(2, 4).double(), torch.ones(2, 3)]
    numbers, arrays = flow_record(now, costs, 1.5, before)
    assert numbers == {"match_seconds": 1.5, "flow_cost": 3.0, "flow_changed": 0.5}
    assert arrays.keys() == {f"{name}{i}" for name in ("cost", "index", "num_teacher", "total_cost") for i in (0, 1)}
    assert arrays["cost0"].dtype == np.float32 and arrays["cost0"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert arrays["index0"].tolist() == [[0, 2], [1, 3]] and arrays["index1"].tolist() == [[0, 1]]
    assert (arrays["num_teacher0"], arrays["num_teacher1"]) == (4, 3)
    assert (arrays["total_cost0"], arrays["total_cost1"]) == (2.5, 0.5)
    assert "flow_changed" not in flow_record(now, costs, 1.5)[0]
    assert flow_record(now, costs, 1.5, now)[0]["flow_changed"] == 0


def test_a_channel_that_is_left_out_is_no_pair() -> None:
    before, now = flow([[0, 1], [2, -1]], 4, 1.0), flow([[0, 1], [2, 3]], 4, 1.0)
    cost = [torch.zeros(2, 4)]
    assert flow_record([now], cost, 0.0, [before])[0]["flow_changed"] == 0  # all three are there still
    assert flow_record([before], cost, 0.0, [now])[0]["flow_changed"] == 0.25


def test_where_margins_come_from_is_said() -> None:
    teacher = Probe(outputs((2, 2), 0, 1), paths=("a", "b"), norms=("bn", None), margins=(torch.zeros(2), None))
    assert say_margins(teacher) == "margins: a norm bn, b measured"
    assert say_margins(teacher, "map") == "margins: a measured, b measured"
    assert say_margins(teacher, "none") == "margins: a none, b none"


@pytest.mark.parametrize("field", ["assignment", "capacity", "solver"])
def test_unknown_words_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"unknown {field} 'best'; choose from"):
        FlowOptions(**{field: "best"})  # type: ignore[arg-type]


def test_at_least_one_image_is_observed() -> None:
    assert FlowOptions(max_images=1).max_images == 1
    with pytest.raises(ValueError, match="max_images must be at least 1; got 0"):
        FlowOptions(max_images=0)
