"""Probes: the facts about a network that terms are built from, found by one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mgd.taps.kept import left_as_it_was
from mgd.taps.layout import as_map
from mgd.taps.norms import bn_margin, norms_before
from mgd.taps.taps import Images, Outputs, Taps, dry_forward


@dataclass(frozen=True)
class Probe:
    """The facts about a network that a term is built from.

    Args:
        outputs: of one forward in eval mode, of any batch size.
        paths: of the taps, if known.
        norms: name of the batch normalisation before each tap, see `norms_before`, or None.
        margins: (C,) of each tap from its norm, or None to measure it on the map, as for networks that train.
        weight: of this teacher among several, > 0.
        frozen: whether the network is a frozen teacher, not a peer that trains.
        before_relu: whether the taps lie before a ReLU; then terms whose source reads maps after the ReLU apply one.
        classifier: (K, D), the weight of the linear layer that returns the logits, or None if there is none.
    """

    outputs: Outputs
    paths: Sequence[str] = ()
    norms: Sequence[str | None] = ()
    margins: Sequence[Tensor | None] = ()
    weight: float = 1.0
    frozen: bool = True
    before_relu: bool = False
    classifier: Tensor | None = None

    @property
    def channels(self) -> list[int]:
        """The width of the map at every tap.

        Raises:
            ValueError: a tapped tensor is not a map.
        """
        return [as_map(feature).shape[1] for feature in self.outputs.features]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of the map at every tap."""
        return [(feature.shape[2], feature.shape[3]) for feature in map(as_map, self.outputs.features)]

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.outputs.logits.shape[1]


def probe(
    network: nn.Module, images: Images, *, weight: float = 1.0, frozen: bool = True, before_relu: bool = False
) -> Probe:
    """Run a network in eval mode without gradients, and return the facts that terms are built from.

    Call it before norms are folded, because margins come from them.

    Args:
        network: `Taps`, or a network without taps.
        images: (B, 3, H, W) or a list, of the size for this network, any content; one image is enough.
        weight: of this teacher among several.
        frozen: whether it is a frozen teacher.
        before_relu: whether the taps lie before a ReLU, see `Probe`.
    """
    taps = network if isinstance(network, Taps) else Taps(network)
    with left_as_it_was(taps):
        outputs, classifier = _classify(taps, images)
        # The norms of a network that trains change, so its margins are measured.
        norms = norms_before(taps, images) if frozen and taps.paths else [None] * len(taps.paths)
    names = {module: name for name, module in taps.model.named_modules()}
    return Probe(
        outputs,
        paths=tuple(taps.paths),
        norms=tuple(None if norm is None else names[norm] for norm in norms),
        margins=tuple(None if norm is None else bn_margin(norm) for norm in norms),
        weight=weight,
        frozen=frozen,
        before_relu=before_relu,
        classifier=classifier,
    )


def _classify(taps: Taps, images: Images) -> tuple[Outputs, Tensor | None]:
    """Return the outputs of one forward, and the weight of the linear layer that returns the logits."""
    results: list[tuple[nn.Linear, Tensor]] = []

    def note(layer: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        results.append((layer, output))

    handles = [layer.register_forward_hook(note) for layer in taps.modules() if isinstance(layer, nn.Linear)]
    try:
        outputs = dry_forward(taps, images)
    finally:
        for handle in handles:
            handle.remove()
    for layer, output in reversed(results):
        if output.shape == outputs.logits.shape and torch.equal(output.to(outputs.logits), outputs.logits):
            return outputs, layer.weight.detach()
    return outputs, None
