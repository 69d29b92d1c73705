"""Mutual learning of probabilities and maps: `dml` and `map_l2` in one term."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mgd.checks import check_at_least_0
from mgd.losses.dml import dml
from mgd.losses.map_l2 import MapL2
from mgd.taps import Batch, Outputs


class UDML(MapL2):
    """U-DML: dml + map_weight * map_l2, against every peer.

    Args:
        student_channels: width of the network's map.
        teacher_channels: width of the map of every peer.
        hyper: the hyper-parameters, see `Term`.
        teacher_weights: see `Term`.
        values: the hyper-parameters by name.

    Reference: Du et al., 2021, arXiv:2109.03144, section 2.2.
    """

    mutual = True

    @dataclass(frozen=True, kw_only=True)
    class Hyper(MapL2.Hyper):
        """Hyper-parameters of `UDML`.

        Args:
            symmetric: whether `dml` takes half the sum of KL in both directions.
            map_weight: factor of `map_l2`, at least 0.
            tap: number of the tap, in every network; -1 is the last.
        """

        symmetric: bool = False
        map_weight: float = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            check_at_least_0("udml", map_weight=self.map_weight)

    hyper: Hyper

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        logits = dml(student.logits, teacher.logits, symmetric=self.hyper.symmetric)
        return logits + self.hyper.map_weight * super().against(number, student, teacher, batch)
