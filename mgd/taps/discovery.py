"""Where a network can be tapped: the last map of every resolution, before its activation, found by what it computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from mgd.taps.activation import CUTS, NEARLY_CUTS, VIEWS, activation, activation_of, gated
from mgd.taps.changed import grown_layout, matters
from mgd.taps.kept import left_as_it_was
from mgd.taps.layout import as_map, readings, reorders_tokens, stated_prefix
from mgd.taps.norms import norms_before
from mgd.taps.sizes import Size, two_images
from mgd.taps.tap import Tap
from mgd.taps.taps import Taps, dry_forward
from mgd.taps.trace import LAYERS, Place, Trace, Value, trace

POOLS = ("mean", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "amax", "max")
PADS = ("constant_pad_nd", "reflection_pad2d", "replication_pad2d")
GROWS = 1.2  # by more than what padding adds, a map does not grow before the last pool
NORMS = ("layer_norm", "rms_norm")  # over the last dimension
NUM_BY_DEPTH = 4  # taps of a network that keeps one resolution


def find_taps(model: nn.Module, images_or_size: Size) -> list[Tap]:
    """Find where a network can be tapped: one map per resolution, the last before the next layer reduces it.

    A forward is recorded operator by operator. A map counts where all that the logits know of the images passes
    through it, such as the sum behind a residual block; at a resolution without such a map, as in the branches of
    HRNet, it is the last one. It is read before its activation where a module takes or returns it there. A network of
    one resolution, as a plain ViT, is tapped at a quarter, half, three quarters and the end of its blocks.

    Args:
        model: any network of images; it is run in eval mode without a graph, and left as it was.
        images_or_size: (B, 3, H, W), or the height and width of made images, one number for a square.

    Returns:
        From shallow to deep.

    Raises:
        ValueError: nothing that can be read is a map of the images.
    """
    with left_as_it_was(model):
        images = two_images(model, images_or_size)
        graph = trace(model, images)
        finder = _Finder(model, graph, images)
        return _describe(model, finder.paths(), images, graph)


def describe_taps(model: nn.Module, paths: Sequence[str], images_or_size: Size) -> list[Tap]:
    """Describe given taps of a network as `find_taps` describes those that it finds.

    Args:
        model: see `find_taps`.
        paths: as `Taps` takes them.
        images_or_size: see `find_taps`.

    Raises:
        ValueError: a path that `Taps` refuses.
    """
    with left_as_it_was(model):
        images = two_images(model, images_or_size)
        return _describe(model, paths, images, trace(model, images))


def _describe(model: nn.Module, paths: Sequence[str], images: Tensor, graph: Trace) -> list[Tap]:
    taps = Taps(model, paths)
    try:
        maps = [as_map(found) for found in dry_forward(taps, images).features]
        norms = norms_before(taps, images)
    finally:
        taps.close()
    names = {module: name for name, module in model.named_modules()}
    places = {graph.path(place): number for number, found in graph.places.items() for place in found}
    places |= {
        f"{graph.path(place).split('#')[0]}#{place.call - graph.calls[place.name]}": number
        for number, found in graph.places.items()
        for place in found
    }
    consumers, total = graph.consumers(), max(graph.values[-1].num_layers, 1)
    described = []
    for path, point, found, norm in zip(paths, taps.points, maps, norms, strict=True):
        number = places.get(path.split("@first")[0].split("@last")[0].split("@tokens")[0])
        function = None if number is None else activation_of(number, graph, consumers)
        depth = 0.0 if number is None else graph.values[number].num_layers / total
        margin: Literal["norm", "measured", "none"] = "none"
        if function in (*CUTS, *NEARLY_CUTS):
            margin = "norm" if norm is not None and function in CUTS else "measured"
        name = None if norm is None else names[norm]
        kind: Literal["map", "tokens"] = "tokens" if point.layout.kind == "tokens" else "map"
        size = (found.shape[2], found.shape[3])
        described.append(Tap(path, found.shape[1], size, kind, name, function, margin, depth))
    return described


@dataclass(frozen=True)
class _Map:
    """A value of the trunk that can be read as a map.

    Args:
        value: itself.
        size: H and W.
        layout: the end of its path.
        is_tokens: whether it has three dimensions.
    """

    value: Value
    size: tuple[int, int]
    layout: str
    is_tokens: bool


class _Finder:
    """The search of `find_taps`."""

    def __init__(self, model: nn.Module, graph: Trace, images: Tensor) -> None:
        self.model, self.graph, self.images = model, graph, images
        self.consumers = graph.consumers()
        self.reorders = reorders_tokens(model)
        self.prefix = stated_prefix(model)
        self.refused: list[str] = []
        self.trunk = _before_pool(graph.trunk())

    def paths(self) -> list[str]:
        """Return the paths of all taps, from shallow to deep."""
        stages = self._stages(self.trunk)
        below = self._below(stages) if len(stages) < 2 else []
        if below:
            found = [chosen for stage in (*stages, *below) if (chosen := self._choose(stage))]
        elif len(stages) == 1:
            found = self._by_depth(stages[0])
        else:
            found = [chosen for stage in self._with_branches(stages) if (chosen := self._choose(stage))]
        if not found:
            why = f": {'; '.join(dict.fromkeys(self.refused))}" if self.refused else ""
            raise ValueError(
                "found no place to tap: on the way from the images to the logits, no module takes or returns one map "
                f"that all of them pass{why}. Name the paths of modules that return maps (B, C, H, W), or of others "
                "with @last or @tokens at the end"
            )
        return [self._path(chosen) for chosen in found]

    def _stages(self, values: Sequence[Value]) -> list[list[_Map]]:
        """Return the maps among values that can be read, those of one resolution together."""
        found: list[_Map] = []
        for value in values[1:]:
            if value.operator in PADS and value.shape != self.graph.values[value.parents[0]].shape:
                continue
            if value.number in self.graph.places and (reading := self._read(value, found[-1].size if found else None)):
                while found and found[-1].size[0] < reading.size[0] / GROWS:
                    found.pop()  # what had the shape of a smaller map, as windows have, was none
                if not found or reading.size[0] <= found[-1].size[0]:  # not what was only padded
                    found.append(reading)
        stages: list[list[_Map]] = []
        for reading in found:
            if stages and reading.size[0] > 0.75 * stages[-1][0].size[0]:
                stages[-1].append(reading)
            else:
                stages.append([reading])
        layers = [0, *(stage[-1].value.num_layers for stage in stages)]  # a map that was only pooled is no stage
        return [stage for stage, below, own in zip(stages, layers, layers[1:], strict=False) if own > below]

    def _read(self, value: Value, grid: tuple[int, int] | None) -> _Map | None:
        """Read a value as a map; tokens are laid out as the map was that they were made of, or half of that."""
        shape = value.shape
        if len(shape) not in (3, 4) or shape[0] != len(self.images):
            return None
        return self._read_map(value) if len(shape) == 4 else None if grid is None else self._read_tokens(value, grid)

    def _read_map(self, value: Value) -> _Map | None:
        shape, images = value.shape, self.images.shape
        sides = {"first": (shape[2], shape[3]), "last": (shape[1], shape[2])}
        found = readings(shape, images, slack=False) or readings(shape, images)
        if not found or sides[found[0]][0] > images[2]:
            return None
        kind = found[0]
        if len(found) == 2:
            path = self._path(_Map(value, sides["last"], "@last", False))
            kind = "last" if _accepts(self.model, path, self.images) else "first"
        return _Map(value, sides[kind], "" if kind == "first" else "@last", False)

    def _read_tokens(self, value: Value, grid: tuple[int, int]) -> _Map | None:
        num, channels = value.shape[1:]
        halves = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
        if channels in (math.prod(grid), math.prod(halves)) and not self._has_channels_last(value):
            return None  # perhaps (B, C, N)
        for rows, columns in (grid, halves):
            for prefix in {0, self.prefix}:
                if num == prefix + rows * columns:
                    if self.reorders:
                        self.refused.append("its tokens are not in the order of rows and columns")
                        return None
                    text = "@tokens" + (f":prefix={prefix}" if prefix else "")
                    text += "" if rows == columns else f":grid={rows}x{columns}"
                    return _Map(value, (rows, columns), text, True)
        self.refused.append(f"{num} tokens are not {self.prefix} in front and {grid[0]} x {grid[1]} of the image")
        return None

    def _with_branches(self, stages: list[list[_Map]]) -> list[list[_Map]]:
        """Add the resolutions between two stages that only branches have, as in HRNet: their last value."""
        found = list(stages)
        reached = self._reaching()
        trunk = {value.number for value in self.trunk}
        for above, below in pairwise(stages):
            if above[-1].size[0] < 3 * below[0].size[0]:
                continue
            between = self.graph.values[above[-1].value.number : below[0].value.number]
            sizes: dict[tuple[int, int], list[_Map]] = {}
            for value in between:
                if value.number in self.graph.places and value.number in reached and value.number not in trunk:
                    reading = self._read(value, None)
                    if (
                        reading
                        and below[0].size[0] < 0.75 * reading.size[0]
                        and reading.size[0] < 0.75 * above[-1].size[0]
                    ):
                        sizes.setdefault(reading.size, []).append(reading)
            found += [[maps[-1]] for maps in sizes.values()]
        return sorted(found, key=lambda stage: -stage[-1].size[0])

    def _below(self, stages: list[list[_Map]]) -> list[list[_Map]]:
        """Return the resolutions that only branches have, smaller than the trunk's only one if it has one: their last.

        Of what is inside blocks, as keys that attention keeps at half the size, none counts; nor do branches of which
        no map is left early, as of two transformers side by side.
        """
        if stages and len(self._blocks(stages[0])) >= NUM_BY_DEPTH:
            return []
        start, most = (stages[0][0].value.number, 0.75 * stages[0][0].size[0]) if stages else (1, math.inf)
        between = self._reaching() - {value.number for value in self.trunk}
        sizes: dict[tuple[int, int], _Map] = {}
        for value in self.graph.values[start:]:
            if value.number in between and value.number in self.graph.places and len(value.shape) == 4:
                reading = self._read(value, None)
                if reading and 1 < reading.size[0] < most and value.operator not in POOLS:
                    sizes[reading.size] = reading
        kinds = {"": "first", "@last": "last"}
        found = [found for found in sizes.values() if self._grown(found.value) == kinds[found.layout]]
        layers = max((reading.value.num_layers for reading in found), default=0)
        return [[reading] for reading in found] if 2 * layers >= self.graph.values[-1].num_layers else []

    def _has_channels_last(self, value: Value) -> bool:
        """Whether a value of three dimensions is (B, N, C): it is normalised over C, or a wider image makes N grow."""
        alike = [other for other in self.trunk if other.shape == value.shape]
        near = [v for other in alike for v in (other, *self.consumers.get(other.number, []))]
        return any(name in v.operator for v in near for name in NORMS) or self._grown(value) == "tokens"

    def _grown(self, value: Value) -> str | None:
        """Name the layout of a value by its shape on larger images, as `moved` does; None where nothing tells."""
        place = min(self.graph.places[value.number], key=self._rank)
        return grown_layout(self.model, self.graph.path(place), self.images, value.shape, place.call)

    def _reaching(self) -> set[int]:
        """Return the values from which the logits are computed."""
        found, left = set[int](), [self.graph.end or 0]
        while left:
            number = left.pop()
            if number not in found:
                found.add(number)
                left += self.graph.values[number].parents
        return found

    def _by_depth(self, stage: list[_Map]) -> list[_Map]:
        """Return maps of one resolution, evenly over the blocks that are siblings."""
        most = self._that_matter(self._blocks(stage))
        if len(most) < 2:
            chosen = self._choose(stage)
            return [] if chosen is None else [chosen]
        num = min(NUM_BY_DEPTH, len(most))
        chosen_ones = [most[math.ceil(len(most) * (k + 1) / num) - 1] for k in range(num)]
        return [self._before_activation(found, stage) for found in chosen_ones]

    def _blocks(self, stage: list[_Map]) -> list[_Map]:
        """Return what the most blocks that are siblings return, one map for each number of layers before it."""
        blocks: dict[str, dict[int, _Map]] = {}
        for found in stage:
            for place in self.graph.places[found.value.number]:
                family = place.name.rstrip("0123456789")
                if not place.reads_input and family != place.name and self.graph.calls[place.name] == 1:
                    blocks.setdefault(family, {})[found.value.num_layers] = found
        return list(max(blocks.values(), key=len, default=dict[int, _Map]()).values())

    def _that_matter(self, maps: list[_Map]) -> list[_Map]:
        """Return tokens up to the last that the logits are made of: some read the class token alone."""
        num = len(maps)
        while num and "prefix" in maps[num - 1].layout:
            if matters(self.model, self._path(maps[num - 1]), self.images):
                break
            num -= 1
        return maps[:num]

    def _choose(self, stage: list[_Map]) -> _Map | None:
        """Return the last map of a stage, or what its activation reads."""
        stage = self._that_matter(stage)
        return self._before_activation(stage[-1], stage) if stage else None

    def _before_activation(self, last: _Map, stage: list[_Map]) -> _Map:
        """Return what the activation reads that a map of a stage comes from, or the map itself."""
        if activation_of(last.value.number, self.graph, self.consumers):
            return last
        value, num_layers = last.value, 0
        by_number = {found.value.number: found for found in stage}
        while value.parents:
            above = self.graph.values[value.parents[0]]
            if by_hand := gated(value, self.graph):
                above = self.graph.values[by_hand[1]]
            if by_hand or (len(value.parents) == 1 and activation(value)):
                return by_number.get(above.number) or self._read_before(above, last) or last
            layer = value.operator.strip("_") in LAYERS
            # Behind an activation may follow what a DenseNet's transition has, one convolution and a pool.
            passes = value.operator in (*VIEWS, "avg_pool2d")
            if layer:
                passes = not num_layers and value.shape[2:] == above.shape[2:]
            if len(value.parents) > 1 or not passes:
                break
            num_layers += layer
            value = above
        return last

    def _read_before(self, value: Value, last: _Map) -> _Map | None:
        """Return what an activation reads, which may be a view of what a module returns."""
        while value.number not in self.graph.places and value.operator in VIEWS and len(value.parents) == 1:
            value = self.graph.values[value.parents[0]]
        return self._read(value, last.size) if value.number in self.graph.places else None

    def _path(self, found: _Map) -> str:
        places = self.graph.places[found.value.number]
        # What a module returns besides its result, the network may have read already.
        used = min((value.number for value in self.consumers.get(found.value.number, [])), default=None)
        ahead = [place for place in places if used is None or place.time <= used]
        return self.graph.path(min(ahead or places, key=self._rank)) + found.layout

    def _rank(self, place: Place) -> tuple[bool, bool, bool, int]:
        """Order places: of modules called once, outputs, no mere `Identity`, the outermost."""
        several = self.graph.calls[place.name] > 1
        return several, isinstance(place.module, nn.Identity), place.reads_input, place.name.count(".")


def _accepts(model: nn.Module, path: str, images: Tensor) -> bool:
    """Whether `Taps` reads a path: it looks at images of other sizes where no shape tells a layout."""
    taps = Taps(model, [path])
    try:
        dry_forward(taps, images)
    except ValueError:
        return False
    finally:
        taps.close()
    return True


def _before_pool(trunk: list[Value]) -> list[Value]:
    """Return the trunk up to the pool in front of the last layers."""
    for position, value in enumerate(trunk):
        if value.operator not in POOLS:
            continue
        one_pixel = len(value.shape) != 4 or value.shape[2:] == (1, 1)
        if one_pixel or value.shape[2] > trunk[position - 1].shape[2]:  # a VGG's pool makes 7 x 7 of any map
            return trunk[:position]
    return trunk
