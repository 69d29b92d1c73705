from __future__ import annotations

import pytest
import torch

from mgd import Batch, Outputs
from mgd.losses import LOSSES, UDML, dml, map_l2
from tests.mgd.nets import built, has_gradient


def outputs(seed: int, grad: bool = False, channels: int = 3) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(4, c, s, s, generator=generator).requires_grad_(grad) for c, s in ((2, 4), (channels, 2))]
    return Outputs((3 * torch.randn(4, 5, generator=generator)).requires_grad_(grad), maps)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("map_weight", [0.0, 1.0, 7.0])
def test_it_is_dml_and_the_weighted_distance_of_the_maps(map_weight: float, symmetric: bool) -> None:
    student, peers = outputs(0), [outputs(1), outputs(2)]
    term = built(UDML, student, peers, map_weight=map_weight, symmetric=symmetric)
    each = [
        dml(student.logits, p.logits, symmetric=symmetric) + map_weight * map_l2(student.features[-1], p.features[-1])
        for p in peers
    ]
    torch.testing.assert_close(term(student, peers, Batch()), (each[0] + each[1]) / 2)


def test_peers_count_by_their_weights() -> None:
    student, peers = outputs(0), [outputs(1), outputs(2)]
    term = built(UDML, student, peers, teacher_weights=[3.0, 1.0])
    each = [dml(student.logits, p.logits) + map_l2(student.features[-1], p.features[-1]) for p in peers]
    torch.testing.assert_close(term(student, peers, Batch()), 0.75 * each[0] + 0.25 * each[1])


def test_the_tap_is_the_one_that_was_chosen() -> None:
    student, peer = outputs(0), outputs(1)
    expected = dml(student.logits, peer.logits) + map_l2(student.features[0], peer.features[0])
    torch.testing.assert_close(built(UDML, student, [peer], tap=0)(student, [peer], Batch()), expected)


def test_maps_of_other_width_pass_a_layer_that_learns() -> None:
    student, peer = outputs(0, grad=True), outputs(1, grad=True, channels=6)
    term = built(UDML, student, [peer])
    expected = dml(student.logits, peer.logits) + map_l2(term.adapters[0](student.features[-1]), peer.features[-1])
    loss = term(student, [peer], Batch())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert has_gradient(student.logits) and has_gradient(student.features[-1])
    assert peer.logits.grad is None and peer.features[-1].grad is None
    assert all(has_gradient(p) for p in term.parameters())


def test_a_network_that_equals_its_peer_has_nothing_to_learn() -> None:
    student = outputs(0)
    assert built(UDML, student, [student])(student, [student], Batch()).item() == pytest.approx(0, abs=1e-6)


def test_wrong_use_is_refused() -> None:
    for value in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"udml: map_weight must be at least 0; got {value}"):
            UDML.Hyper(map_weight=value)
    with pytest.raises(ValueError, match="tap both networks"):
        built(UDML, Outputs(torch.zeros(4, 5)), [outputs(1)])
    with pytest.raises(ValueError, match="tap 2 was asked for"):
        built(UDML, outputs(0), [outputs(1)], tap=2)
    assert LOSSES["udml"] is UDML and UDML.mutual and UDML.weight == 1
