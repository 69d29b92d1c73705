"""Find where a network can be tapped: at the last map of every resolution, before its activation."""

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
GROWS = 1.2  # largest growth by padding; before the last pool, maps grow by nothing else
NORMS = ("layer_norm", "rms_norm")  # over the last dimension
NUM_BY_DEPTH = 4  # taps of a network that keeps one resolution


def find_taps(model: nn.Module, images_or_size: Size) -> list[Tap]:
    """Find where a network can be tapped: one map per resolution, the last before the next layer reduces it.

    A forward is recorded operator by operator. A map is suitable if all information about the images passes through it
    to the logits, such as the sum after a residual block. At a resolution without such a map, as in the branches of
    HRNet, it is the last one. It is read before its activation if a module takes or returns it there. A network with
    one resolution, such as a plain ViT, is tapped after a quarter, half, three quarters and all of its blocks.

    Args:
        model: any network of images; it is run in eval mode without a graph, and is not changed.
        images_or_size: (B, 3, H, W), or height and width of random images, one number for a square.

    Returns:
        The taps from shallow to deep.

    Raises:
        ValueError: no map of the images can be read.
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
        ValueError: `Taps` refuses a path.
    """
    with left_as_it_was(model):
        images = two_images(model, images_or_size)
        return _describe(model, paths, images, trace(model, images))


def _describe(model: nn.Module, paths: Sequence[str], images: Tensor, graph: Trace) -> list[Tap]:
    taps = Taps(model, paths)
    try:
        maps = [as_map(feature) for feature in dry_forward(taps, images).features]
        norms = norms_before(taps, images)
    finally:
        taps.close()
    names = {module: name for name, module in model.named_modules()}
    places = {graph.path(place): number for number, at in graph.places.items() for place in at}
    places |= {
        f"{graph.path(place).split('#')[0]}#{place.call - graph.calls[place.name]}": number
        for number, at in graph.places.items()
        for place in at
    }
    consumers, total = graph.consumers(), max(graph.values[-1].num_layers, 1)
    described = []
    for path, point, tapped, norm in zip(paths, taps.points, maps, norms, strict=True):
        number = places.get(path.split("@first")[0].split("@last")[0].split("@tokens")[0])
        function = None if number is None else activation_of(number, graph, consumers)
        depth = 0.0 if number is None else graph.values[number].num_layers / total
        margin: Literal["norm", "measured", "none"] = "none"
        if function in (*CUTS, *NEARLY_CUTS):
            margin = "norm" if norm is not None and function in CUTS else "measured"
        name = None if norm is None else names[norm]
        kind: Literal["map", "tokens"] = "tokens" if point.layout.kind == "tokens" else "map"
        size = (tapped.shape[2], tapped.shape[3])
        described.append(Tap(path, tapped.shape[1], size, kind, name, function, margin, depth))
    return described


@dataclass(frozen=True)
class _Map:
    """A value of the trunk that can be read as a map.

    Args:
        value: the value.
        size: H and W.
        layout: the end of its path, see `Taps`.
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
            maps = [chosen for stage in (*stages, *below) if (chosen := self._choose(stage))]
        elif len(stages) == 1:
            maps = self._by_depth(stages[0])
        else:
            maps = [chosen for stage in self._with_branches(stages) if (chosen := self._choose(stage))]
        if not maps:
            why = f": {'; '.join(dict.fromkeys(self.refused))}" if self.refused else ""
            raise ValueError(
                "found no place to tap: on the way from the images to the logits, no module takes or returns one map "
                f"that all of them pass{why}. Name the paths of modules that return maps (B, C, H, W), or of others "
                "with @last or @tokens at the end"
            )
        return [self._path(chosen) for chosen in maps]

    def _stages(self, values: Sequence[Value]) -> list[list[_Map]]:
        """Return the maps among values that can be read, grouped by resolution."""
        maps: list[_Map] = []
        for value in values[1:]:
            if value.operator in PADS and value.shape != self.graph.values[value.parents[0]].shape:
                continue
            if value.number in self.graph.places and (reading := self._read(value, maps[-1].size if maps else None)):
                while maps and maps[-1].size[0] < reading.size[0] / GROWS:
                    maps.pop()  # it only looked like a smaller map, as windows do
                if not maps or reading.size[0] <= maps[-1].size[0]:  # larger ones were only padded
                    maps.append(reading)
        stages: list[list[_Map]] = []
        for reading in maps:
            if stages and reading.size[0] > 0.75 * stages[-1][0].size[0]:
                stages[-1].append(reading)
            else:
                stages.append([reading])
        layers = [0, *(stage[-1].value.num_layers for stage in stages)]  # a map that was only pooled is not a stage
        return [stage for stage, below, own in zip(stages, layers, layers[1:], strict=False) if own > below]

    def _read(self, value: Value, grid: tuple[int, int] | None) -> _Map | None:
        """Read a value as a map; `grid` is the size of the map before, of which tokens have all or half the sides."""
        shape = value.shape
        if len(shape) not in (3, 4) or shape[0] != len(self.images):
            return None
        return self._read_map(value) if len(shape) == 4 else None if grid is None else self._read_tokens(value, grid)

    def _read_map(self, value: Value) -> _Map | None:
        shape, images = value.shape, self.images.shape
        sides = {"first": (shape[2], shape[3]), "last": (shape[1], shape[2])}
        kinds = readings(shape, images, slack=False) or readings(shape, images)
        if not kinds or sides[kinds[0]][0] > images[2]:
            return None
        kind = kinds[0]
        if len(kinds) == 2:
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
        """Add the last map of each resolution between two stages that only branches have, as in HRNet."""
        all_stages = list(stages)
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
            all_stages += [[maps[-1]] for maps in sizes.values()]
        return sorted(all_stages, key=lambda stage: -stage[-1].size[0])

    def _below(self, stages: list[list[_Map]]) -> list[list[_Map]]:
        """Return the last map of each resolution that only branches have, below the trunk's resolution if it has one.

        Maps inside of blocks do not count, such as keys of attention at half the size; nor do maps in the first half of
        the network only, such as those of two transformers side by side.
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
        maps = [reading for reading in sizes.values() if self._grown(reading.value) == kinds[reading.layout]]
        layers = max((reading.value.num_layers for reading in maps), default=0)
        return [[reading] for reading in maps] if 2 * layers >= self.graph.values[-1].num_layers else []

    def _has_channels_last(self, value: Value) -> bool:
        """Return whether a value is (B, N, C): if it is normalised over C, or a wider image makes N grow."""
        alike = [other for other in self.trunk if other.shape == value.shape]
        near = [v for other in alike for v in (other, *self.consumers.get(other.number, []))]
        return any(name in v.operator for v in near for name in NORMS) or self._grown(value) == "tokens"

    def _grown(self, value: Value) -> str | None:
        """Return the layout of a value by its shape on larger images, as `moved` does; None if that is not clear."""
        place = min(self.graph.places[value.number], key=self._rank)
        return grown_layout(self.model, self.graph.path(place), self.images, value.shape, place.call)

    def _reaching(self) -> set[int]:
        """Return the values from which the logits are computed."""
        reaching, waiting = set[int](), [self.graph.end or 0]
        while waiting:
            number = waiting.pop()
            if number not in reaching:
                reaching.add(number)
                waiting += self.graph.values[number].parents
        return reaching

    def _by_depth(self, stage: list[_Map]) -> list[_Map]:
        """Return maps of one resolution, evenly spaced over its blocks."""
        blocks = self._that_matter(self._blocks(stage))
        if len(blocks) < 2:
            chosen = self._choose(stage)
            return [] if chosen is None else [chosen]
        num = min(NUM_BY_DEPTH, len(blocks))
        chosen_blocks = [blocks[math.ceil(len(blocks) * (k + 1) / num) - 1] for k in range(num)]
        return [self._before_activation(block, stage) for block in chosen_blocks]

    def _blocks(self, stage: list[_Map]) -> list[_Map]:
        """Return the outputs of the longest series of sibling modules, one map per number of layers before it."""
        blocks: dict[str, dict[int, _Map]] = {}
        for reading in stage:
            for place in self.graph.places[reading.value.number]:
                family = place.name.rstrip("0123456789")
                if not place.reads_input and family != place.name and self.graph.calls[place.name] == 1:
                    blocks.setdefault(family, {})[reading.value.num_layers] = reading
        return list(max(blocks.values(), key=len, default=dict[int, _Map]()).values())

    def _that_matter(self, maps: list[_Map]) -> list[_Map]:
        """Return the maps without last ones that do not change the logits, as if only the class token is read."""
        num = len(maps)
        while num and "prefix" in maps[num - 1].layout:
            if matters(self.model, self._path(maps[num - 1]), self.images):
                break
            num -= 1
        return maps[:num]

    def _choose(self, stage: list[_Map]) -> _Map | None:
        """Return the last map of a stage, or the input of its activation."""
        stage = self._that_matter(stage)
        return self._before_activation(stage[-1], stage) if stage else None

    def _before_activation(self, last: _Map, stage: list[_Map]) -> _Map:
        """Return the input of the activation that computed a map of a stage, or the map itself."""
        if activation_of(last.value.number, self.graph, self.consumers):
            return last
        value, num_layers = last.value, 0
        by_number = {reading.value.number: reading for reading in stage}
        while value.parents:
            above = self.graph.values[value.parents[0]]
            if by_hand := gated(value, self.graph):
                above = self.graph.values[by_hand[1]]
            if by_hand or (len(value.parents) == 1 and activation(value)):
                return by_number.get(above.number) or self._read_before(above, last) or last
            layer = value.operator.strip("_") in LAYERS
            # After the activation, one convolution and a pool may follow, as in the transitions of a DenseNet.
            passes = value.operator in (*VIEWS, "avg_pool2d")
            if layer:
                passes = not num_layers and value.shape[2:] == above.shape[2:]
            if len(value.parents) > 1 or not passes:
                break
            num_layers += layer
            value = above
        return last

    def _read_before(self, value: Value, last: _Map) -> _Map | None:
        """Return the input of an activation as a map; it may be a view of what a module returns."""
        while value.number not in self.graph.places and value.operator in VIEWS and len(value.parents) == 1:
            value = self.graph.values[value.parents[0]]
        return self._read(value, last.size) if value.number in self.graph.places else None

    def _path(self, reading: _Map) -> str:
        places = self.graph.places[reading.value.number]
        # At a later place, the network may have used the value already.
        used = min((value.number for value in self.consumers.get(reading.value.number, [])), default=None)
        ahead = [place for place in places if used is None or place.time <= used]
        return self.graph.path(min(ahead or places, key=self._rank)) + reading.layout

    def _rank(self, place: Place) -> tuple[bool, bool, bool, int]:
        """Return the sort key of places: prefer modules called once, no `Identity`, outputs, and outer modules."""
        several = self.graph.calls[place.name] > 1
        return several, isinstance(place.module, nn.Identity), place.reads_input, place.name.count(".")


def _accepts(model: nn.Module, path: str, images: Tensor) -> bool:
    """Return whether `Taps` accepts a path; it also runs images of other sizes if a shape has several readings."""
    taps = Taps(model, [path])
    try:
        dry_forward(taps, images)
    except ValueError:
        return False
    finally:
        taps.close()
    return True


def _before_pool(trunk: list[Value]) -> list[Value]:
    """Return the trunk up to the pool before the last layers."""
    for position, value in enumerate(trunk):
        if value.operator not in POOLS:
            continue
        one_pixel = len(value.shape) != 4 or value.shape[2:] == (1, 1)
        if one_pixel or value.shape[2] > trunk[position - 1].shape[2]:  # a VGG's pool resizes every map to 7 x 7
            return trunk[:position]
    return trunk
