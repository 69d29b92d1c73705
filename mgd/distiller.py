"""One student, its teachers and a weighted sum of terms; or several networks that teach each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mgd.losses.mgd import matchings
from mgd.taps import Batch, Outputs, Taps
from mgd.teachers import Frozen

Weight = float | Callable[[int], float]


class Distiller(nn.Module):
    """Compute the loss of a student: the weighted sum of terms over its and its teachers' outputs.

    loss = sum over terms of weight * term(student outputs, teachers' outputs, batch)

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

    def __init__(
        self,
        student: nn.Module,
        teachers: nn.Module | Sequence[nn.Module],
        terms: Mapping[str, tuple[nn.Module, Weight]],
    ) -> None:
        super().__init__()
        self.student = student if isinstance(student, Taps) else Taps(student)
        self.teachers = (teachers,) if isinstance(teachers, nn.Module) else tuple(teachers)
        for teacher in self.teachers:
            if not isinstance(teacher, Frozen):
                raise ValueError(f"a {type(teacher).__name__} is not frozen: pass mgd.freeze(teacher)")
        _check_names(terms)
        self.terms = nn.ModuleDict({name: term for name, (term, _) in terms.items()})
        self._weights = {name: weight for name, (_, weight) in terms.items()}

    def weights(self, epoch: int) -> dict[str, float]:
        """Return the weight of each term in `epoch`, counted from 0."""
        return {name: float(w(epoch) if callable(w) else w) for name, w in self._weights.items()}

    def groups(self) -> list[tuple[nn.Module, list[str]]]:
        """Return the network that trains, and the names of its terms."""
        return [(self.student, list(self._weights))]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Distiller:
        for teacher in self.teachers:
            teacher._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def compile(self, *args: Any, student: bool = True, **options: Any) -> None:
        """Have `torch.compile` translate networks and matching at their first forward, on a GPU into fused kernels.

        Args:
            args: those of `torch.nn.Module.compile`.
            student: whether that is translated too: on a processor some students train slower then.
            options: likewise.
        """
        for module in (*([self.student] if student else []), *self.teachers, *matchings(self.terms)):
            module.compile(*args, **options)

    def forward(
        self,
        images: Tensor,
        target: Tensor | None = None,
        index: Tensor | None = None,
        epoch: int = 0,
        taught: list[Outputs] | None = None,
    ) -> dict[str, Tensor]:
        """Return {"loss": scalar, "logits": (B, K) of the student, name: raw value of each term}.

        Args:
            images: (B, 3, H, W).
            target: (B,) class indices, (B, K) probabilities where images were mixed, or None.
            index: (B,) positions of the images in the data set, for terms with a memory.
            epoch: epoch of training, counted from 0.
            taught: the teachers' outputs for `images`, where they are known already (`Ahead`).
        """
        teachers = [teacher(images) for teacher in self.teachers] if taught is None else taught
        student: Outputs = self.student(images)
        batch = Batch(target, index, epoch)
        values: dict[str, Tensor] = {name: term(student, teachers, batch) for name, term in self.terms.items()}
        weights = self.weights(epoch)
        loss = sum((weights[name] * value for name, value in values.items()), student.logits.new_zeros(()))
        return {"loss": loss, "logits": student.logits, **values}


class Mutual(nn.Module):
    """Several networks that all train, each taught by the others: the sum of each one's weighted terms.

    loss = sum over networks i and terms of weight * term_i(outputs of i, outputs of the others without graph, batch)

    Args:
        networks: at least two, tapped or not; the first is the student.
        terms: for each network its own {name: (term, weight)}, the same names for all.

    Raises:
        ValueError: fewer than two networks, a frozen one, other terms for one than for another.
    """

    def __init__(self, networks: Sequence[nn.Module], terms: Sequence[Mapping[str, tuple[nn.Module, Weight]]]) -> None:
        super().__init__()
        if len(networks) < 2 or len(networks) != len(terms) or len({frozenset(named) for named in terms}) != 1:
            raise ValueError("mutual learning needs two networks or more, and the same names of terms for each")
        if any(isinstance(network, Frozen) for network in networks):
            raise ValueError("mutual learning trains every network: none may be frozen")
        _check_names(terms[0])
        self.networks = nn.ModuleList(n if isinstance(n, Taps) else Taps(n) for n in networks)
        self.terms = nn.ModuleDict()
        self._weights: dict[str, Weight] = {}
        for number, named in enumerate(terms):
            for name, (term, weight) in named.items():
                self.terms[_of_peer(name, number)], self._weights[_of_peer(name, number)] = term, weight
        self._names = list(terms[0])
        if len(self.terms) < sum(map(len, terms)):
            raise ValueError(f"names of terms must not look like those of peers; got {', '.join(self._names)}")

    @property
    def student(self) -> nn.Module:
        """The first network, tapped."""
        return self.networks[0]

    def weights(self, epoch: int) -> dict[str, float]:
        """Return the weight of each term of each network in `epoch`, counted from 0."""
        return {name: float(w(epoch) if callable(w) else w) for name, w in self._weights.items()}

    def groups(self) -> list[tuple[nn.Module, list[str]]]:
        """Return every network, and the names of its terms."""
        return [(net, [_of_peer(name, number) for name in self._names]) for number, net in enumerate(self.networks)]

    def compile(self, *args: Any, **options: Any) -> None:
        """Have `torch.compile` translate each network at its first forward."""
        for network in self.networks:
            network.compile(*args, **options)

    def forward(
        self, images: Tensor, target: Tensor | None = None, index: Tensor | None = None, epoch: int = 0
    ) -> dict[str, Tensor]:
        """Return {"loss": scalar, "logits" of the first, name: raw value}; those of peer n are called name_peern."""
        outputs: list[Outputs] = [network(images) for network in self.networks]
        detached = [Outputs(o.logits.detach(), [f.detach() for f in o.features]) for o in outputs]
        batch, weights = Batch(target, index, epoch), self.weights(epoch)
        values: dict[str, Tensor] = {}
        for number, output in enumerate(outputs):
            others = [other for position, other in enumerate(detached) if position != number]
            for name in self._names:
                values[_of_peer(name, number)] = self.terms[_of_peer(name, number)](output, others, batch)
        loss = sum((weights[name] * value for name, value in values.items()), outputs[0].logits.new_zeros(()))
        return {"loss": loss, "logits": outputs[0].logits, **values}


def _of_peer(name: str, number: int) -> str:
    return name if number == 0 else f"{name}_peer{number}"


def _check_names(terms: Mapping[str, object]) -> None:
    if not terms or {"loss", "logits"} & set(terms):
        raise ValueError('terms must hold at least one term, and none named "loss" or "logits"')
