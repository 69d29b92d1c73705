from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mgd
from mgd.distiller import Weight
from mgd.losses import CE, KD, Term, Views
from mgd.losses.term import Update
from tests.mgd.nets import TOY_TAPS, Toy, toy

IMAGES, TARGET = torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 0])


def distiller(kd_weight: float = 2.0) -> mgd.Distiller:
    teacher = mgd.freeze(mgd.Taps(toy(8, seed=1), TOY_TAPS))
    matching = mgd.ChannelMatching((4, 4), (8, 8), [None, None])
    terms = {"ce": (CE(), 1.0), "mgd": (matching, 1e-2), "kd": (KD(temperature=1.5), kd_weight)}
    return mgd.Distiller(mgd.Taps(toy(), TOY_TAPS), teacher, terms)


def match(d: mgd.Distiller) -> None:
    matching = d.terms["mgd"]
    assert isinstance(matching, mgd.ChannelMatching)
    matching.observe(mgd.dry_forward(d.student, IMAGES), d.teachers[0](IMAGES))
    matching.rematch()


def test_loss_is_the_weighted_sum_of_raw_values() -> None:
    d = distiller()
    match(d)
    out = d(IMAGES, TARGET)
    assert set(out) == {"loss", "logits", "ce", "mgd", "kd"}
    assert out["ce"].item() == pytest.approx(F.cross_entropy(out["logits"], TARGET).item())
    teacher_logits = d.teachers[0](IMAGES).logits
    assert out["kd"].item() == pytest.approx(mgd.losses.kd(out["logits"], teacher_logits, temperature=1.5).item())
    assert out["loss"].item() == pytest.approx((out["ce"] + 1e-2 * out["mgd"] + 2 * out["kd"]).item(), rel=1e-6)


def test_a_weight_may_follow_the_epoch() -> None:
    terms: dict[str, tuple[nn.Module, Weight]] = {
        "ce": (CE(), lambda epoch: 1 / (1 + epoch)),
        "kd": (KD(temperature=1.0), 2.0),
    }
    d = mgd.Distiller(toy(), mgd.freeze(toy(seed=1)), terms)
    assert d.weights(0) == {"ce": 1.0, "kd": 2.0} and d.weights(3) == {"ce": 0.25, "kd": 2.0}
    out = d.eval()(IMAGES, TARGET, epoch=3)
    assert out["loss"].item() == pytest.approx((out["ce"] / 4 + 2 * out["kd"]).item())


def test_the_teacher_is_no_part_of_what_trains_or_is_saved() -> None:
    d = distiller()
    match(d)
    teacher = {id(p) for p in d.teachers[0].parameters()}
    assert teacher and not teacher & {id(p) for p in d.parameters()}
    assert all(name.startswith(("student.", "terms.")) for name in d.state_dict())
    d.train()
    assert not any(m.training for m in d.teachers[0].get_submodule("taps").modules())
    d(IMAGES, TARGET)["loss"].backward()
    assert all(p.grad is None for p in d.teachers[0].parameters())
    assert all(p.grad is not None for p in d.parameters())


def test_moving_the_distiller_moves_the_teacher() -> None:
    d = distiller().double()
    assert {p.dtype for p in d.teachers[0].parameters()} == {torch.float64}


def test_a_step_lowers_the_matching_loss() -> None:
    d = distiller()
    match(d)
    d.train()
    optimizer = torch.optim.SGD(d.parameters(), 1e-3)
    values = []
    for _ in range(30):
        out = d(IMAGES, TARGET)
        values.append(out["mgd"].item())
        optimizer.zero_grad()
        out["mgd"].backward()
        optimizer.step()
    assert values[-1] < 0.8 * values[0]


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mgd\.freeze"):
        mgd.Distiller(toy(), toy(), {"ce": (CE(), 1.0)})
    with pytest.raises(ValueError, match="at least one term"):
        mgd.Distiller(toy(), [], {})
    with pytest.raises(ValueError, match="none named"):
        mgd.Distiller(toy(), [], {"loss": (CE(), 1.0)})
    with pytest.raises(ValueError, match="needs labels"):
        mgd.Distiller(toy(), [], {"ce": (CE(), 1.0)})(IMAGES)


def test_a_plain_module_serves_as_a_term() -> None:
    class Mean(nn.Module):
        def forward(self, student: mgd.Outputs, teachers: list[mgd.Outputs], batch: mgd.Batch) -> torch.Tensor:
            assert batch.epoch == 7 and not teachers
            return student.logits.mean()

    out = mgd.Distiller(toy(), [], {"mean": (Mean(), 3.0)})(IMAGES, epoch=7)
    assert out["loss"].item() == pytest.approx(3 * out["logits"].mean().item())


def peers(num: int) -> mgd.Distiller:
    terms = [{"ce": (CE(), 1.0), "kd": (KD(temperature=1.0), 2.0)} for _ in range(num)]
    return mgd.Distiller.mutual([toy(seed=seed) for seed in range(num)], terms)


def test_each_network_learns_from_the_others_only_through_its_own_loss() -> None:
    for num in (2, 3):
        m = peers(num).eval()
        out = m(IMAGES, TARGET)
        logits = [network(IMAGES).logits for network in m.networks]
        total = 0.0
        for number, own in enumerate(logits):
            others = [other for position, other in enumerate(logits) if position != number]
            kd = torch.stack([mgd.losses.kd(own, other, temperature=1.0) for other in others]).mean()
            suffix = f"_peer{number}" if number else ""
            assert out[f"kd{suffix}"].item() == pytest.approx(kd.item(), rel=1e-5)
            total += F.cross_entropy(own, TARGET).item() + 2 * kd.item()
        assert out["loss"].item() == pytest.approx(total, rel=1e-5)
        out["kd"].backward()
        assert all(p.grad is None for network in list(m.networks)[1:] for p in network.parameters())
        assert all(p.grad is not None for p in m.networks[0].parameters())


def test_mutual_learning_refuses_what_makes_no_sense() -> None:
    terms = {"ce": (CE(), 1.0)}
    with pytest.raises(ValueError, match="two networks or more"):
        mgd.Distiller.mutual([toy()], [terms])
    with pytest.raises(ValueError, match="none may be frozen"):
        mgd.Distiller.mutual([toy(), mgd.freeze(toy())], [terms, terms])
    with pytest.raises(ValueError, match="the same names"):
        mgd.Distiller.mutual([toy(), toy()], [terms, {"kd": (KD(), 1.0)}])


class Naive(nn.Module):
    """A term that detaches nothing by itself."""

    def forward(self, student: mgd.Outputs, teachers: list[mgd.Outputs], batch: mgd.Batch) -> torch.Tensor:
        gaps = [(student.logits - t.logits).square().mean() for t in teachers]
        maps = [(a - b).square().mean() for t in teachers for a, b in zip(student.features, t.features, strict=True)]
        return torch.stack(gaps + maps).sum()


def test_what_a_network_learns_of_its_peers_does_not_teach_them() -> None:
    networks = [mgd.Taps(toy(seed=seed), TOY_TAPS) for seed in range(2)]
    mutual = mgd.Distiller.mutual(networks, [{"naive": (Naive(), float(1 - number))} for number in range(2)])
    mutual(IMAGES, TARGET)["loss"].backward()  # the second has weight 0
    assert any(p.grad is not None and p.grad.any() for p in networks[0].parameters())
    assert not any(p.grad is not None and p.grad.any() for p in networks[1].parameters())


def test_names_that_would_collide_with_those_of_peers_are_refused() -> None:
    terms = {"kd": (KD(), 1.0), "kd_peer1": (KD(), 1.0)}
    with pytest.raises(ValueError, match="must not look like those of peers"):
        mgd.Distiller.mutual([toy(), toy()], [terms, terms])
    swapped = dict(reversed({"kd": (KD(), 1.0), "dml": (KD(), 2.0)}.items()))
    mutual = mgd.Distiller.mutual([toy(), toy()], [{"kd": (KD(), 1.0), "dml": (KD(), 2.0)}, swapped])  # in any order
    assert mutual.weights(0) == {"kd": 1.0, "dml": 2.0, "dml_peer1": 2.0, "kd_peer1": 1.0}
    assert mutual.groups()[1][1] == ["kd_peer1", "dml_peer1"]


class Told(nn.Module):
    """A term that keeps what it was told."""

    def forward(self, student: mgd.Outputs, teachers: list[mgd.Outputs], batch: mgd.Batch) -> Tensor:
        self.batch = batch
        return student.logits.mean()


def test_terms_are_told_labels_index_and_epoch() -> None:
    index = torch.arange(4)
    makes: tuple[Callable[[Told], mgd.Distiller], ...] = (
        lambda term: mgd.Distiller(toy(), [], {"told": (term, float)}),
        lambda term: mgd.Distiller.mutual([toy(), toy()], [{"told": (term, float)}, {"told": (Told(), float)}]),
    )
    for make in makes:
        term = Told()
        out = make(term)(IMAGES, TARGET, index, epoch=7)
        assert term.batch.target is TARGET and term.batch.index is index and term.batch.epoch == 7
        total = sum(value for name, value in out.items() if name.startswith("told"))
        torch.testing.assert_close(out["loss"], 7 * total)
        with pytest.raises(FrozenInstanceError):
            term.batch.epoch = 8  # type: ignore[misc]
        make(term)(IMAGES)
        assert term.batch == mgd.Batch(None, None, 0)  # the first epoch, unless another is said


def test_the_first_network_is_the_student() -> None:
    networks = [toy(seed=seed).eval() for seed in (0, 1)]
    mutual = mgd.Distiller.mutual(networks, [{"ce": (CE(), 1.0)}] * 2)
    assert mutual.student.model is networks[0]
    torch.testing.assert_close(mutual(IMAGES, TARGET)["logits"], networks[0](IMAGES))
    assert [net.model for net, _ in mutual.groups()] == networks


def test_the_group_of_a_distiller_names_its_terms() -> None:
    whole = mgd.Distiller(toy(), mgd.freeze(toy()), {"ce": (CE(), 1.0), "kd": (KD(), 1.0)})
    ((network, names),) = whole.groups()
    assert network is whole.student and names == ["ce", "kd"]


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[nn.Module, dict[str, Any]]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    teacher = mgd.freeze(mgd.Taps(toy(8), TOY_TAPS))
    matching = mgd.ChannelMatching((4, 4), (8, 8), [None, None])
    whole = mgd.Distiller(mgd.Taps(toy(), TOY_TAPS), teacher, {"ce": (CE(), 1.0), "mgd": (matching, 1.0)})
    whole.compile(mode="x")
    assert compiled == [(m, {"mode": "x"}) for m in (whole.student, teacher, matching)]
    compiled.clear()
    whole.compile(student=False)
    assert [m for m, _ in compiled] == [teacher, matching]
    compiled.clear()
    mutual = mgd.Distiller.mutual([toy(), toy()], [{"ce": (CE(), 1.0)}] * 2)
    mutual.compile()
    assert [m for m, _ in compiled] == list(mutual.networks)


def test_moving_the_distiller_moves_all_of_it() -> None:
    whole = mgd.Distiller(toy(), mgd.freeze(toy()), {"fit": (mgd.losses.FitNet([4], [[4]]), 1.0)}).double()
    for module in (whole, whole.teachers[0]):
        assert {p.dtype for p in module.parameters()} == {torch.float64}


def test_terms_for_each_network_and_none_named_as_the_results() -> None:
    terms = {"ce": (CE(), 1.0)}
    for count in (1, 3):
        with pytest.raises(ValueError, match="for each"):
            mgd.Distiller.mutual([toy(), toy()], [terms] * count)
    for name in ("loss", "logits"):
        with pytest.raises(ValueError, match="none named"):
            mgd.Distiller(toy(), [], {name: (CE(), 1.0)})
        with pytest.raises(ValueError, match="none named"):
            mgd.Distiller.mutual([toy(), toy()], [{name: (CE(), 1.0)}] * 2)


class Watch(Term):
    """A term that keeps what an update shows it, and how the networks stand meanwhile."""

    def __init__(self, networks: Sequence[nn.Module], num_images: int | None = None) -> None:
        super().__init__()
        self.networks, self.num_images = list(networks), num_images  # a list: they are no parts of the term
        self.seen: list[tuple[mgd.Outputs, list[mgd.Outputs], mgd.Batch]] = []
        self.modes: set[bool] = set()
        self.told: tuple[int, int] | None = None

    def update(self, epoch: int, views: Views) -> Update:
        self.seen, self.told = [], (epoch, views.seed)
        for student, teachers, batch in views(self.num_images):
            self.modes |= {module.training for network in self.networks for module in network.modules()}
            self.seen.append((student, teachers, batch))
        return {"batches": float(len(self.seen))}, {}

    def against(self, number: int, student: mgd.Outputs, teacher: mgd.Outputs, batch: mgd.Batch) -> Tensor:
        return student.logits.mean()


def watched(num_images: int | None = None) -> tuple[mgd.Distiller, Watch]:
    student = mgd.Taps(toy(), TOY_TAPS)
    watch = Watch([student], num_images)
    return mgd.Distiller(student, mgd.freeze(mgd.Taps(toy(8, seed=1), TOY_TAPS)), {"watch": (watch, 1.0)}), watch


def test_an_update_shows_the_networks_in_eval_mode_without_a_graph_and_leaves_them_as_they_were() -> None:
    whole, watch = watched()
    whole.train()
    net = whole.student.model
    assert isinstance(net, Toy)
    net.bn1.eval()
    before = {name: module.training for name, module in whole.named_modules()}
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    index = torch.arange(4)
    record = whole.update(7, [(IMAGES, TARGET, index), (IMAGES + 1, TARGET), (IMAGES + 2,)], seed=5)
    assert record == {"watch": ({"batches": 3.0}, {})} and watch.told == (7, 5) and watch.modes == {False}
    assert {name: module.training for name, module in whole.named_modules()} == before and not before[
        "student.model.bn1"
    ]
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    assert torch.is_grad_enabled()
    for number, (student, (teacher,), batch) in enumerate(watch.seen):
        assert not any(x.requires_grad for o in (student, teacher) for x in (o.logits, *o.features))
        assert batch.epoch == 7 and (batch.target is TARGET) == (number < 2) and (batch.index is index) == (number < 1)
        assert batch.target is None or batch.target is TARGET
        torch.testing.assert_close(student.logits, mgd.dry_forward(whole.student, IMAGES + number).logits)
        torch.testing.assert_close(teacher.features[1], whole.teachers[0](IMAGES + number).features[1])


def test_modes_are_restored_where_an_update_fails() -> None:
    whole, _ = watched()
    whole.train()

    def batches() -> Iterator[tuple[Tensor]]:
        yield (IMAGES,)
        raise OSError("a file is gone")

    with pytest.raises(OSError, match="gone"):
        whole.update(0, lambda _: batches())
    assert all(module.training for module in whole.modules())


def test_batches_that_can_be_read_once_only_are_refused() -> None:
    whole, _ = watched()
    with pytest.raises(TypeError, match="batches can be read once only"):
        whole.update(0, iter([(IMAGES,)]))


@pytest.mark.parametrize(("num_images", "sizes"), [(None, [4, 3, 2]), (1, [4]), (4, [4]), (5, [4, 3]), (99, [4, 3, 2])])
def test_a_pass_ends_once_it_has_as_many_images_as_were_asked_for(num_images: int | None, sizes: list[int]) -> None:
    whole, watch = watched(num_images)
    asked: list[int | None] = []
    parts = [(IMAGES[:size],) for size in (4, 3, 2)]

    def batches(number: int | None) -> list[tuple[Tensor]]:
        asked.append(number)
        return parts

    for given in (parts, batches):
        whole.update(0, given)
        assert [len(student.logits) for student, _, _ in watch.seen] == sizes
    assert asked == [num_images]


def test_forwards_of_an_update_run_in_the_context_that_is_given() -> None:
    whole, watch = watched()
    whole.update(0, [(IMAGES,)], context=lambda: torch.autocast("cpu", torch.bfloat16))
    ((student, (teacher,), _),) = watch.seen
    assert student.logits.dtype == torch.bfloat16 and teacher.logits.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_every_term_is_renewed_and_a_plain_module_is_left_out() -> None:
    student = mgd.Taps(toy(), TOY_TAPS)
    teacher = mgd.freeze(mgd.Taps(toy(8, seed=1), TOY_TAPS))
    matching = mgd.ChannelMatching((4, 4), (8, 8), [None, None])
    whole = mgd.Distiller(student, teacher, {"kd": (KD(), 1.0), "mgd": (matching, 1.0), "naive": (Naive(), 1.0)})
    found = whole.update(0, [(IMAGES, TARGET)])
    assert found.keys() == {"kd", "mgd"} and found["kd"] == ({}, {}) and matching.matched
    assert found["mgd"][0]["flow_cost"] > 0 and found["mgd"][1]["index0"].shape == (2, 4)


def test_in_mutual_learning_each_network_is_shown_with_its_peers() -> None:
    networks = [mgd.Taps(toy(4 + seed, seed=seed), TOY_TAPS) for seed in range(3)]
    watches = [Watch(networks) for _ in networks]
    whole = mgd.Distiller.mutual(networks, [{"watch": (watch, 1.0)} for watch in watches]).train()
    found = whole.update(1, [(IMAGES, TARGET)])
    assert found.keys() == {"watch", "watch_peer1", "watch_peer2"}
    logits = [mgd.dry_forward(network, IMAGES).logits for network in networks]
    for number, watch in enumerate(watches):
        ((student, peers, _),) = watch.seen
        torch.testing.assert_close(student.logits, logits[number])
        others = [other for position, other in enumerate(logits) if position != number]
        torch.testing.assert_close([peer.logits for peer in peers], others)
        assert watch.modes == {False} and not any(o.logits.requires_grad for o in (student, *peers))
    assert all(module.training for module in whole.modules())
