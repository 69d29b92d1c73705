"""Contrastive representation distillation: both networks embed an image alike, and different images apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgd.checks import check_positive, check_tensors
from mgd.losses.gather import gather
from mgd.losses.term import HyperParameters, Term, per_teacher
from mgd.taps import Batch, Outputs, Probe, as_map


def crd(scores: Tensor, log_normaliser: Tensor, *, num_images: int) -> Tensor:
    """Compute -log h_0 - sum over k > 0 of log(1 - h_k), h_k = e_k / (e_k + K / N), e_k = exp(score_k) / Z, per anchor.

    Args:
        scores: (B, 1 + K), inner products over the temperature: the positive first, then the negatives.
        log_normaliser: (), log Z.
        num_images: N.

    Returns:
        (B,) float32.

    Raises:
        ValueError: scores or log_normaliser have another shape, or num_images is not positive.

    Reference: Tian, Krishnan, Isola, 2019, arXiv:1910.10699, section 3.1.
    """
    check_tensors("crd", scores=scores, log_normaliser=log_normaliser)
    check_positive("crd", num_images=num_images)
    if scores.ndim != 2 or scores.shape[1] < 2 or log_normaliser.ndim != 0:
        raise ValueError(
            f"crd needs scores (B, 1 + K) with K >= 1 and a scalar log_normaliser; "
            f"got {tuple(scores.shape)} and {tuple(log_normaliser.shape)}"
        )
    num_negatives = scores.shape[1] - 1
    odds = scores.float() - log_normaliser - math.log(num_negatives / num_images)  # log of e_k / (K / N)
    return F.softplus(-odds[:, 0]) + F.softplus(odds[:, 1:]).sum(dim=1)


@lru_cache(maxsize=1)
def _order(num_images: int, seed: int) -> Tensor:
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))


def candidates(step: int, count: int, num_images: int, seed: int = 0) -> Tensor:
    """Draw `count` different images. The result depends on the arguments only, so it is the same on every rank.

    The images are a window of a random order of all images. Successive steps take successive windows; after the last
    complete window, another order is used.

    Args:
        step: number of the draw, from 0.
        count: number of images to draw, at most `num_images`.
        num_images: number of images to draw from.
        seed: of the first order; the later ones have seed + 1, seed + 2 and so on.

    Returns:
        (count,) int64, on the CPU.

    Raises:
        ValueError: the step is negative, or `count` is outside [1, num_images].
    """
    if step < 0 or not 1 <= count <= num_images:
        raise ValueError(
            f"candidates: step must be at least 0, count in [1, num_images]; got {step=}, {count=}, {num_images=}"
        )
    cycle, window = divmod(step, num_images // count)
    return _order(num_images, seed + cycle)[window * count : (window + 1) * count]


def check_index(index: Tensor, num_images: int, num_all: int) -> None:
    """Check the positions in the data set of a batch's images.

    Args:
        index: expected (B,) int64; its values are checked on the CPU only.
        num_images: B.
        num_all: number of images in the data set.

    Raises:
        ValueError: shape or type are wrong, or a position is outside [0, num_all).
    """
    if index.shape != (num_images,) or index.dtype != torch.int64:
        raise ValueError(
            f"crd needs a position in the data set per image, ({num_images},) int64; "
            f"got {tuple(index.shape)} of {index.dtype}"
        )
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(value) for value in index.aminmax())
        if not 0 <= low <= high < num_all:
            raise ValueError(f"crd was built for {num_all} images; got positions {low} to {high} in the data set")


def _forget_step(contrast: _Contrast, _: object) -> None:
    contrast._known_step = None


class _Contrast(nn.Module):
    """Heads and memory of one pair of networks; the buffers are equal on all ranks."""

    student_bank: Tensor
    teacher_bank: Tensor
    log_normalisers: Tensor
    steps: Tensor

    def __init__(self, num_student: int, num_teacher: int, num_images: int, hyper: CRD.Hyper) -> None:
        super().__init__()
        self.num_images, self.num_negatives = num_images, min(hyper.num_negatives, num_images - 1)
        self.hyper, dimension, seed = hyper, hyper.dimension, hyper.seed
        self.student_head = nn.Linear(num_student, dimension)
        self.teacher_head = nn.Linear(num_teacher, dimension)
        generator = torch.Generator().manual_seed(seed)  # not the default one, which differs between ranks
        for name in ("student_bank", "teacher_bank"):
            bank = F.normalize(torch.randn(num_images, dimension, generator=generator), dim=1)
            self.register_buffer(name, bank)
        self.register_buffer("log_normalisers", torch.full((2,), math.nan))  # NaN: not estimated yet
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._known_step: int | None = None  # a copy of `steps`, because reading that waits for a GPU
        self.register_load_state_dict_post_hook(_forget_step)  # type: ignore[no-untyped-call]

    def _step(self) -> int:
        if self._known_step is None:
            self._known_step = int(self.steps)
        return self._known_step

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        student, teacher = self.student_head(student), self.teacher_head(teacher)
        with torch.autocast(index.device.type, enabled=False):
            return self._contrast(student.float(), teacher.float(), index, counts)

    def _contrast(self, student: Tensor, teacher: Tensor, index: Tensor, counts: Sequence[int] | None) -> Tensor:
        student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        # One more than needed: an anchor that is among them uses the last one instead of itself.
        drawn = candidates(self._step(), self.num_negatives + 1, self.num_images, self.hyper.seed)
        if index.device.type == "cuda":
            drawn = drawn.pin_memory().to(index.device, non_blocking=True)
        scores = [
            self._scores(student, self.teacher_bank, index, drawn),
            self._scores(teacher, self.student_bank, index, drawn),
        ]
        sums = torch.stack([score.detach().logsumexp(dim=1) for score in scores], dim=1)
        gathered = gather(
            torch.cat([student.detach(), teacher.detach(), sums], dim=1), counts
        )  # (B, 2 * dimension + 2)
        estimates = gathered[:, -2:].logsumexp(dim=0) + math.log(self.num_images / (len(gathered) * scores[0].shape[1]))
        logs = torch.where(self.log_normalisers.isnan(), estimates, self.log_normalisers)
        losses = [crd(score, log, num_images=self.num_images) for score, log in zip(scores, logs, strict=True)]
        all_indices = gather(index, counts)
        if self.training:
            self._remember(gathered, all_indices, logs)
        return gather(losses[0] + losses[1], counts).mean()

    def _scores(self, anchors: Tensor, bank: Tensor, index: Tensor, drawn: Tensor) -> Tensor:
        """Return the (B, 1 + K) inner products with the bank, over the temperature."""
        positives = (anchors * bank[index]).sum(dim=1, keepdim=True)
        others = anchors @ bank[drawn].T  # (B, K + 1)
        negatives = torch.where(index[:, None] == drawn[:-1], others[:, -1:], others[:, :-1])
        return torch.cat([positives, negatives], dim=1) / self.hyper.temperature

    @torch.no_grad()
    def _remember(self, embeddings: Tensor, index: Tensor, logs: Tensor) -> None:
        """Move the banks' entries of the global batch towards its embeddings, identically on every rank."""
        # If an image occurs twice, both rows write the result of the first, so the order of writing does not matter.
        first = (index[:, None] == index).int().argmax(dim=1)
        rows = embeddings[first, :-2].chunk(2, dim=1)
        for bank, embedding in zip((self.student_bank, self.teacher_bank), rows, strict=True):
            old = bank[index]
            new = F.normalize(self.hyper.momentum * old + (1 - self.hyper.momentum) * embedding, dim=1)
            bank.index_copy_(0, index, torch.where(new.isfinite().all(dim=1, keepdim=True), new, old))
        self.log_normalisers.copy_(logs)
        self._known_step = self._step() + 1
        self.steps += 1


def _vector(outputs: Outputs) -> Tensor:
    """Return the input of a head, (B, C) float32: the pooled last map, or the logits without taps."""
    if outputs.features:
        return as_map(outputs.features[-1]).float().mean(dim=(2, 3))
    return outputs.logits.float()


class CRD(Term):
    """Contrast each image's embedding of one network with the other network's memory of it and of K other images.

    loss = mean over the images of crd(student against the teacher's bank) + crd(teacher against the student's bank)

    A linear head and L2 normalisation embed each network's last tapped map, averaged over its pixels, or its logits
    if it has no taps. A bank keeps an embedding of every image. The positive is the bank's entry of the image
    itself, as in published code. The negatives are the entries of K other images of any label, drawn without
    replacement; one draw serves the whole batch. After the loss, in training mode only, the entries of the batch become
    normalise(momentum * entry + (1 - momentum) * embedding). Z of each direction is N * mean of exp(score) over the
    first batch, and is fixed then.

    With several ranks the loss is that of the whole batch, and banks, draws and Z are the same on all of them. The
    banks take 8 * N * dimension bytes per teacher, also in the state_dict. The term does not work with DataParallel,
    which discards the changes of its replicas.

    Args:
        student_channels: length of the student's vector.
        teacher_channels: length of every teacher's vector.
        num_images: N, number of training images; `Batch.index` is in [0, N).
        hyper: the hyper-parameters, see `Term`.
        teacher_weights: see `Term`.
        values: the hyper-parameters by name.

    Raises:
        ValueError: there are fewer than two images.

    Reference: Tian, Krishnan, Isola, 2019, arXiv:1910.10699, section 3.1; Z after Wu et al., 2018, arXiv:1805.01978.
    """

    needs = frozenset({"index"})
    uses = frozenset({"maps"})
    rectified = True
    paired = False
    remembers = True
    weight = 0.8

    @dataclass(frozen=True, kw_only=True)
    class Hyper(HyperParameters):
        """Hyper-parameters of `CRD`.

        Args:
            num_negatives: K, at most N - 1.
            dimension: length of an embedding.
            temperature: divides the scores, > 0.
            momentum: share of a bank's old entry, in [0, 1).
            seed: for the first content of the banks, and for the draws.

        Raises:
            ValueError: a value is outside its range.
        """

        num_negatives: int = 16384
        dimension: int = 128
        temperature: float = 0.07
        momentum: float = 0.5
        seed: int = 0

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.num_negatives < 1 or self.dimension < 1:
                raise ValueError(
                    f"num_negatives and dimension must be at least 1; got {self.num_negatives} and {self.dimension}"
                )
            check_positive("crd", temperature=self.temperature)
            if not 0 <= self.momentum < 1:
                raise ValueError(f"momentum is the share of the old entry, in [0, 1); got {self.momentum}")

    hyper: Hyper

    def __init__(
        self,
        student_channels: int,
        teacher_channels: Sequence[int],
        num_images: int,
        hyper: Hyper | None = None,
        *,
        teacher_weights: Sequence[float] | None = None,
        **values: Any,
    ) -> None:
        super().__init__(hyper, teacher_weights=per_teacher(teacher_weights, teacher_channels), **values)
        if num_images < 2:
            raise ValueError(f"contrast needs at least two training images; got {num_images}")
        self.contrasts = nn.ModuleList(
            _Contrast(student_channels, channels, num_images, self.hyper) for channels in teacher_channels
        )

    @classmethod
    def make(cls, student: Probe, teachers: Sequence[Probe], num_images: int, hyper: Any) -> CRD:
        widths = [_vector(network.outputs).shape[1] for network in (student, *teachers)]
        return cls(widths[0], widths[1:], num_images, hyper)

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        assert batch.index is not None
        contrast = self.contrasts[number]
        assert isinstance(contrast, _Contrast)
        check_index(batch.index, len(student.logits), contrast.num_images)
        loss: Tensor = contrast(_vector(student), _vector(teacher).detach(), batch.index, batch.counts)
        return loss
