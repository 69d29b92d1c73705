"""The distiller: a student, its teachers, and the weighted sum of the terms of its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgd.losses.term import Term, Update
from mgd.taps import Batch, Outputs, Taps
from mgd.teachers import Frozen

Weight = float | Callable[[int], float]
Terms = Mapping[str, tuple[nn.Module, Weight]]
# (images, target, index) of each batch; target and index may be missing or None.
Batches = Iterable[Sequence[Any]] | Callable[[int | None], Iterable[Sequence[Any]]]


class Distiller(nn.Module):
    """Compute the loss of a student: the weighted sum of terms over its and its teachers' outputs.

    loss = sum over terms of weight * term(student outputs, teachers' outputs, batch)

    In mutual learning (`Distiller.mutual`) several networks train, each with the detached outputs of the others; the
    loss is the sum over all of them.

    Teachers are not submodules, so their weights are not in `parameters()`, in `state_dict()` or in DDP. `.to()` moves
    them, too.

    Args:
        student: `Taps` around the network to train, or a network without taps.
        teachers: one or several networks that `mgd.freeze` returned.
        terms: {name: (term, weight)}; a term is a module (student, teachers, batch) -> scalar, a weight is a number or
            a function of the epoch (from 0).

    Raises:
        ValueError: a teacher is not frozen, there are no terms, or a term is named "loss" or "logits".
    """

    def __init__(self, student: nn.Module, teachers: nn.Module | Sequence[nn.Module], terms: Terms) -> None:
        super().__init__()
        self.teachers = (teachers,) if isinstance(teachers, nn.Module) else tuple(teachers)
        for teacher in self.teachers:
            if not isinstance(teacher, Frozen):
                raise ValueError(f"a {type(teacher).__name__} is not frozen: pass mgd.freeze(teacher)")
        self._set_networks([student], [terms])

    @classmethod
    def mutual(cls, networks: Sequence[nn.Module], terms: Sequence[Terms]) -> Distiller:
        """Return a distiller of networks that teach each other: the first is the student, the others are its peers.

        Terms of peer n, counted from 1, are named NAME_peern.

        Args:
            networks: at least two, tapped or not.
            terms: {name: (term, weight)} for each network; all have the same names.

        Raises:
            ValueError: there are fewer than two networks, one is frozen, or the names of terms differ.
        """
        if len(networks) < 2 or len(networks) != len(terms) or len({frozenset(named) for named in terms}) != 1:
            raise ValueError("mutual learning needs two networks or more, and the same names of terms for each")
        if any(isinstance(network, Frozen) for network in networks):
            raise ValueError("mutual learning trains every network: none may be frozen")
        distiller = cls(networks[0], [], terms[0])
        distiller._set_networks(networks, terms)
        return distiller

    def _set_networks(self, networks: Sequence[nn.Module], terms: Sequence[Terms]) -> None:
        if not terms[0] or {"loss", "logits"} & set(terms[0]):
            raise ValueError('terms must hold at least one term, and none named "loss" or "logits"')
        student, *peers = (network if isinstance(network, Taps) else Taps(network) for network in networks)
        self.student, self.peers = student, nn.ModuleList(peers)
        self.terms = nn.ModuleDict()
        self._weights: dict[str, Weight] = {}
        for number, named in enumerate(terms):
            for name, (term, weight) in named.items():
                self.terms[_of_peer(name, number)], self._weights[_of_peer(name, number)] = term, weight
        self._names = list(terms[0])
        if len(self.terms) < sum(map(len, terms)):
            raise ValueError(f"names of terms must not look like those of peers; got {', '.join(self._names)}")

    @property
    def networks(self) -> list[nn.Module]:
        """The networks that train: the student, and in mutual learning its peers."""
        return [self.student, *self.peers]

    def weights(self, epoch: int) -> dict[str, float]:
        """Return the weight of each term in `epoch`, counted from 0."""
        return {name: float(w(epoch) if callable(w) else w) for name, w in self._weights.items()}

    def groups(self) -> list[tuple[nn.Module, list[str]]]:
        """Return every network that trains, and the names of its terms."""
        return [(net, [_of_peer(name, number) for name in self._names]) for number, net in enumerate(self.networks)]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Distiller:
        for teacher in self.teachers:
            teacher._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def compile(self, *args: Any, student: bool = True, **options: Any) -> None:
        """Compile the networks, and the terms that gain by it, at their first forward.

        Args:
            args: of `torch.nn.Module.compile`.
            student: whether to compile the student and its peers, too; on a CPU, some train more slowly when compiled.
            options: of `torch.nn.Module.compile`.
        """
        fusing = [term for term in self.terms.modules() if getattr(term, "fuses", False)]
        for module in (*(self.networks if student or self.peers else []), *self.teachers, *fusing):
            module.compile(*args, **options)

    def update(
        self,
        epoch: int,
        batches: Batches,
        *,
        seed: int = 0,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> dict[str, Update]:
        """Update every term from the networks, before an epoch: see `Term.update`.

        Args:
            epoch: counted from 0.
            batches: batches of training images (images, target, index), of which the last two may be missing; or a
                function that returns such batches for a number of images. Of several views, the first is used.
            seed: of the run, equal on all ranks.
            context: context manager for each forward, such as `torch.autocast`.

        Returns:
            {name of the term: (numbers to log, arrays to keep)}.

        Raises:
            TypeError: `batches` is an iterator, which would be empty for the second term that reads images.
        """
        if isinstance(batches, Iterator):
            raise TypeError("batches can be read once only: pass what can be iterated again, or a function")
        updates: dict[str, Update] = {}
        for number, (network, names) in enumerate(self.groups()):
            others = [other for position, other in enumerate(self.networks) if position != number]
            views = _Views(network, self.teachers or others, batches, epoch, seed, context)
            updates |= {n: term.update(epoch, views) for n in names if isinstance(term := self.terms[n], Term)}
        return updates

    def forward(
        self,
        images: Tensor,
        target: Tensor | None = None,
        index: Tensor | None = None,
        epoch: int = 0,
        taught: list[Outputs] | None = None,
        counts: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Return {"loss": scalar, "logits": (B, K) of the student, name: raw value of each term}.

        Args:
            images: (B, 3, H, W), or (B, V, 3, H, W) with V augmented views of each image. The views pass the networks
                one after another; terms and "logits" are of the first, and terms that compare views find the others in
                `Outputs.more`.
            target: (B,) class indices, (B, K) probabilities of mixed images, or None.
            index: (B,) positions of the images in the data set, for terms with a memory.
            epoch: epoch of training, counted from 0.
            taught: the frozen teachers' outputs for `images`, if they are computed already (`Ahead`).
            counts: number of images of this batch on every rank; None for a single rank, or if unknown.
        """
        teachers = _all_outputs(self.teachers, images) if taught is None else taught
        outputs = _all_outputs(self.networks, images)
        constants = [_detached(output) for output in outputs] if len(outputs) > 1 else []
        batch, weights = Batch(target, index, epoch, counts), self.weights(epoch)
        values: dict[str, Tensor] = {}
        for number, (output, (_, names)) in enumerate(zip(outputs, self.groups(), strict=True)):
            others = [constant for position, constant in enumerate(constants) if position != number]
            for name in names:
                values[name] = self.terms[name](output, [*teachers, *others], batch)
        loss = sum((weights[name] * value for name, value in values.items()), outputs[0].logits.new_zeros(()))
        return {"loss": loss, "logits": outputs[0].logits, **values}


def _outputs(network: nn.Module, images: Tensor) -> Outputs:
    """Return the outputs of a network for the first view of each image, those for the other views in `more`."""
    first, *others = images.unbind(1) if images.ndim == 5 else (images,)
    outputs: Outputs = network(first)
    return replace(outputs, more=tuple(network(view) for view in others)) if others else outputs


def _all_outputs(networks: Sequence[nn.Module], images: Tensor) -> list[Outputs]:
    results: list[Outputs] = []
    for number in range(len(networks)):  # taps interrupt torch.compile, which then loses the state of an iterator
        results.append(_outputs(networks[number], images))
    return results


def _of_peer(name: str, number: int) -> str:
    return name if number == 0 else f"{name}_peer{number}"


def _gradients(outputs: Outputs, target: Tensor | None) -> list[Tensor]:
    """Return the gradient of the cross-entropy, summed over images, for each map.

    Without labels, and for negative class indices, the likeliest class is the target. The gradient is 0 for a map that
    the logits do not depend on.
    """
    logits = outputs.logits.float()
    if target is None:
        target = logits.argmax(dim=1)
    elif not target.is_floating_point():
        target = torch.where(target < 0, logits.argmax(dim=1), target)
    loss = F.cross_entropy(logits, target, reduction="sum")
    return list(torch.autograd.grad(loss, outputs.features, materialize_grads=True))


def _detached(outputs: Outputs) -> Outputs:
    more = tuple(_detached(view) for view in outputs.more)
    return Outputs(outputs.logits.detach(), [feature.detach() for feature in outputs.features], more=more)


@dataclass(frozen=True)
class _Views:
    """The outputs of a network and its teachers on training images: see `mgd.losses.Views`."""

    network: nn.Module
    teachers: Sequence[nn.Module]
    batches: Batches
    epoch: int
    seed: int
    context: Callable[[], contextlib.AbstractContextManager[Any]]

    @torch.no_grad()
    def __call__(self, num_images: int | None = None) -> Iterator[tuple[Outputs, list[Outputs], Batch]]:
        for images, batch in self._images(num_images):
            with self.context():
                outputs = [network(images) for network in (self.network, *self.teachers)]
                yield outputs[0], outputs[1:], batch

    def gradients(
        self, num_images: int | None = None
    ) -> Iterator[tuple[Outputs, list[Outputs], Batch, list[list[Tensor]]]]:
        for images, batch in self._images(num_images):
            results = []
            for network in (self.network, *self.teachers):
                with torch.enable_grad(), self.context():
                    inputs = images.detach().requires_grad_()
                    outputs = network.with_graph(inputs) if isinstance(network, Frozen) else network(inputs)
                with torch.enable_grad():
                    gradients = _gradients(outputs, batch.target)
                results.append((_detached(outputs), gradients))
            (student, _), *teachers = results
            yield student, [outputs for outputs, _ in teachers], batch, [gradients for _, gradients in results]

    def _images(self, num_images: int | None) -> Iterator[tuple[Tensor, Batch]]:
        """Yield images and batches; the networks are in eval mode until the iteration ends."""
        networks, done = (self.network, *self.teachers), 0
        modes = {module: module.training for network in networks for module in network.modules()}
        for network in networks:
            network.eval()
        try:
            for images, *more in self.batches(num_images) if callable(self.batches) else self.batches:
                target, index = (*more, None, None)[:2]
                yield images[:, 0] if images.ndim == 5 else images, Batch(target, index, self.epoch)
                done += len(images)
                if num_images is not None and done >= num_images:
                    break
        finally:
            for module, mode in modes.items():
                module.training = mode
