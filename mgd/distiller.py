"""Networks that learn, who teaches them, and the weighted sum of their terms."""

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
Batches = (
    Iterable[Sequence[Any]] | Callable[[int | None], Iterable[Sequence[Any]]]
)  # tensors, or None where there are none


class Distiller(nn.Module):
    """Compute the loss of a student: the weighted sum of terms over its and its teachers' outputs.

    loss = sum over terms of weight * term(student outputs, teachers' outputs, batch)

    In mutual learning (`Distiller.mutual`) several networks learn, each from the outputs of the others, taken as
    constants; the loss is the sum over all of them.

    Teachers are not submodules: their weights stay out of `parameters()`, of `state_dict()` and of whatever wraps the
    distiller; `.to()` moves them along.

    Args:
        student: `Taps` around the network to train, or a network without taps.
        teachers: one or several of what `mgd.freeze` returns.
        terms: {name: (term, weight)}; a term is a module (student, teachers, batch) -> scalar, a weight a number or a
            function of the epoch (from 0).

    Raises:
        ValueError: a teacher that was not frozen; no terms; a term named "loss" or "logits".
    """

    def __init__(self, student: nn.Module, teachers: nn.Module | Sequence[nn.Module], terms: Terms) -> None:
        super().__init__()
        self.teachers = (teachers,) if isinstance(teachers, nn.Module) else tuple(teachers)
        for teacher in self.teachers:
            if not isinstance(teacher, Frozen):
                raise ValueError(f"a {type(teacher).__name__} is not frozen: pass mgd.freeze(teacher)")
        self._learn([student], [terms])

    @classmethod
    def mutual(cls, networks: Sequence[nn.Module], terms: Sequence[Terms]) -> Distiller:
        """Return a distiller of networks that teach each other: the first is the student, the others are its peers.

        Terms of peer n, counted from 1, are called name_peern.

        Args:
            networks: at least two, tapped or not.
            terms: for each network its own {name: (term, weight)}, the same names for all.

        Raises:
            ValueError: fewer than two networks, a frozen one, other terms for one than for another.
        """
        if len(networks) < 2 or len(networks) != len(terms) or len({frozenset(named) for named in terms}) != 1:
            raise ValueError("mutual learning needs two networks or more, and the same names of terms for each")
        if any(isinstance(network, Frozen) for network in networks):
            raise ValueError("mutual learning trains every network: none may be frozen")
        found = cls(networks[0], [], terms[0])
        found._learn(networks, terms)
        return found

    def _learn(self, networks: Sequence[nn.Module], terms: Sequence[Terms]) -> None:
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
        """The networks that learn: the student, and in mutual learning its peers."""
        return [self.student, *self.peers]

    def weights(self, epoch: int) -> dict[str, float]:
        """Return the weight of each term in `epoch`, counted from 0."""
        return {name: float(w(epoch) if callable(w) else w) for name, w in self._weights.items()}

    def groups(self) -> list[tuple[nn.Module, list[str]]]:
        """Return every network that learns, and the names of its terms."""
        return [(net, [_of_peer(name, number) for name in self._names]) for number, net in enumerate(self.networks)]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Distiller:
        for teacher in self.teachers:
            teacher._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def compile(self, *args: Any, student: bool = True, **options: Any) -> None:
        """Have `torch.compile` translate networks and the terms that gain by it at their first forward.

        Args:
            args: those of `torch.nn.Module.compile`.
            student: whether the networks that learn are translated too: on a processor some train slower then.
            options: likewise.
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
        """Have every term renew what it takes from the networks, before an epoch: see `Term.update`.

        Args:
            epoch: counted from 0.
            batches: batches of training images (images, target, index), the last two where there are some, or a
                function of a number of images that returns so many. Of several views the first is taken.
            seed: of the run, equal on all ranks.
            context: around each forward, as `torch.autocast`.

        Returns:
            {name of the term: (numbers to log, arrays to keep)}.

        Raises:
            TypeError: an iterator, which the second term that looks at images would find empty.
        """
        if isinstance(batches, Iterator):
            raise TypeError("batches can be read once only: pass what can be iterated again, or a function")
        found: dict[str, Update] = {}
        for number, (network, names) in enumerate(self.groups()):
            others = [other for position, other in enumerate(self.networks) if position != number]
            views = _Views(network, self.teachers or others, batches, epoch, seed, context)
            found |= {n: term.update(epoch, views) for n in names if isinstance(term := self.terms[n], Term)}
        return found

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
            images: (B, 3, H, W), or (B, V, 3, H, W) with V augmented views of each image. Every network sees one view
                after another; terms and "logits" are of the first, and terms that compare views find the others in
                `Outputs.more`.
            target: (B,) class indices, (B, K) probabilities where images were mixed, or None.
            index: (B,) positions of the images in the data set, for terms with a memory.
            epoch: epoch of training, counted from 0.
            taught: the frozen teachers' outputs for `images`, where they are there already (`Ahead`).
            counts: images of this batch on every rank; None where there is one, or that is not known.
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
    found: list[Outputs] = []
    for number in range(len(networks)):  # torch.compile, which is interrupted by taps, loses its place in an iterator
        found.append(_outputs(networks[number], images))
    return found


def _of_peer(name: str, number: int) -> str:
    return name if number == 0 else f"{name}_peer{number}"


def _gradients(outputs: Outputs, target: Tensor | None) -> list[Tensor]:
    """Return the gradient of the cross-entropy, summed over images, for each map.

    Without labels, or where a class index is negative, it is that of the likeliest class. It is 0 for a map that the
    logits do not depend on.
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
    """Images as a learner and its teachers see them: `mgd.losses.Views`."""

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
            found = []
            for network in (self.network, *self.teachers):
                with torch.enable_grad(), self.context():
                    given = images.detach().requires_grad_()
                    outputs = network.with_graph(given) if isinstance(network, Frozen) else network(given)
                with torch.enable_grad():
                    gradients = _gradients(outputs, batch.target)
                found.append((_detached(outputs), gradients))
            (student, _), *teachers = found
            yield student, [outputs for outputs, _ in teachers], batch, [gradients for _, gradients in found]

    def _images(self, num_images: int | None) -> Iterator[tuple[Tensor, Batch]]:
        """Yield images, as long as the networks are in eval mode."""
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
