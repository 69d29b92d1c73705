"""Matching where the teacher's maps are of another resolution than the student's."""

from __future__ import annotations

import pytest
import torch

from mgd import ChannelMatching, Outputs


def outputs(channels: tuple[int, ...], seed: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(5, c, side, side, generator=generator) for c, side in zip(channels, (6, 3), strict=True)]
    return Outputs(torch.zeros(5, 3), maps)


def test_a_teacher_of_other_resolution_is_brought_to_the_students() -> None:
    student, teacher = outputs((4, 6), 0), outputs((8, 15), 1)
    doubled = Outputs(teacher.logits, [m.repeat_interleave(2, 2).repeat_interleave(2, 3) for m in teacher.features])
    terms = [ChannelMatching((4, 6), (8, 15), [-torch.ones(8), -torch.ones(15)]) for _ in range(2)]
    for term, maps in zip(terms, (teacher, doubled), strict=True):
        term.observe(student, maps)
        term.rematch()
    for one, other in zip(terms[0].costs, terms[1].costs, strict=True):
        torch.testing.assert_close(one, other)
    assert [(f.index == g.index).all() for f, g in zip(terms[0].flows, terms[1].flows, strict=True)] == [True, True]
    torch.testing.assert_close(terms[1](student, [doubled]), terms[0](student, [teacher]))
    assert terms[0](student, [teacher]).item() == pytest.approx(terms[1](student, [teacher]).item())
