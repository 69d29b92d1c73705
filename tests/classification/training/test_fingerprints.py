"""The hash of a teacher's weights: of tensors of every shape and type."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from classification.runs.checkpoint import fingerprints


class Holds(nn.Module):
    """A module whose state dict holds one tensor, and what a module adds to it by itself."""

    def __init__(self, value: Tensor, extra: Any = None) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra


def teachers_hash(*values: Tensor) -> str:
    teachers = []
    for value in values:
        teacher = nn.Module()
        teacher.register_buffer("value", value)
        teachers.append(teacher)
    found: str = fingerprints(teachers, [], ".", [])["teachers"]
    return found


@pytest.mark.parametrize(
    ("value", "content"),
    [
        (torch.tensor(7), b"\7" + bytes(7)),  # as num_batches_tracked
        (torch.tensor(1.0), b"\0\0\x80\x3f"),
        (torch.tensor(True), b"\1"),
        (torch.tensor([True, False]), b"\1\0"),
        (torch.empty(0), b""),
        (torch.empty(3, 0), b""),
        (torch.arange(6, dtype=torch.uint8).reshape(2, 3).T, bytes([0, 3, 1, 4, 2, 5])),
        (torch.arange(6, dtype=torch.uint8)[::2], bytes([0, 2, 4])),
        (torch.tensor([5], dtype=torch.uint8).expand(3), bytes([5, 5, 5])),
        (torch.ones(1, 2, dtype=torch.bfloat16), b"\x80\x3f" * 2),
        (torch.ones((), dtype=torch.float16), b"\0\x3c"),
        (torch.ones(2).to(torch.float8_e4m3fn), b"\x38\x38"),
        (torch.ones(()).to(torch.float8_e5m2), b"\x3c"),
        (torch.tensor([1 + 2j]).conj(), b"\0\0\x80\x3f\0\0\0\xc0"),
        (nn.Parameter(torch.ones(1)), b"\0\0\x80\x3f"),
        (torch.ones(1, 1, 1, 1).to(memory_format=torch.channels_last), b"\0\0\x80\x3f"),
    ],
)
def test_every_tensor_has_the_hash_of_its_bytes(value: Tensor, content: bytes) -> None:
    assert teachers_hash(value) == hashlib.sha256(content).hexdigest()


def test_what_a_module_adds_to_its_state_is_part_of_the_hash() -> None:
    found = {fingerprints([Holds(torch.ones(1), extra)], [], ".", [])["teachers"] for extra in (None, "a", "b")}
    assert len(found) == 3


def test_a_teacher_that_keeps_its_norms_has_one() -> None:
    norm = nn.BatchNorm2d(2)
    assert norm.num_batches_tracked is not None
    teacher = nn.Sequential(norm, nn.Conv2d(2, 2, 1))
    before = fingerprints([teacher], [], ".", [])
    assert fingerprints([teacher], [], ".", []) == before
    norm.num_batches_tracked += 1
    assert fingerprints([teacher], [], ".", []) != before
