from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mgd import Outputs, Taps, dry_forward, freeze, logits_of, norms_before
from tests.mgd.nets import TOY_TAPS, Toy, toy, toy_maps


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_maps_are_those_of_a_hand_written_forward(training: bool, gradient: bool) -> None:
    net, images = toy().train(training), torch.randn(257, 3, 6, 6)  # more than Python's shared numbers
    taps = Taps(net, TOY_TAPS)
    with torch.set_grad_enabled(gradient):
        for _ in range(3):  # the second and third forward no longer copy every map
            outputs = taps(images)
            for got, expected in zip(outputs.features, toy_maps(net, images), strict=True):
                torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("after_others", [False, True])
def test_maps_are_right_in_inference_mode(after_others: bool) -> None:
    net, images = toy().eval(), torch.randn(5, 3, 6, 6)
    taps = Taps(net, TOY_TAPS)
    if after_others:  # what need not be copied is known by then
        taps(images)
    with torch.inference_mode():
        for _ in range(2):
            for got, expected in zip(taps(images).features, toy_maps(net, images), strict=True):
                torch.testing.assert_close(got, expected)


def test_output_overwritten_in_place_is_copied() -> None:
    net, images = toy().eval(), torch.randn(2, 3, 6, 6)
    taps = Taps(net, ["bn2", "bn1"])
    for _ in range(2):
        second, first = taps(images).features
        torch.testing.assert_close(first, net.bn1(net.conv1(images)))
        torch.testing.assert_close(second, net.bn2(net.conv2(torch.relu(first))))


def test_only_overwritten_maps_are_copied_later() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.Flatten())
    taps = Taps(net, ["1@in", "2"])
    taps(torch.randn(1, 3, 2, 2))
    seen: list[int] = []
    net[0].register_forward_hook(lambda m, a, out: seen.append(out.data_ptr()))
    net[2].register_forward_hook(lambda m, a, out: seen.append(out.data_ptr()))
    outputs = taps(torch.randn(1, 3, 2, 2))
    assert outputs.features[0].data_ptr() == seen[0]
    assert outputs.features[1].data_ptr() != seen[1]


def test_the_first_forward_gives_the_very_tensor_as_later_ones_do() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten())
    seen: list[int] = []
    net[0].register_forward_hook(lambda m, a, out: seen.append(out.data_ptr()))
    (first,) = Taps(net, ["1@in"])(torch.randn(1, 3, 2, 2)).features
    assert first.data_ptr() == seen[0]  # not a copy: a resumed run begins with a first forward


def test_what_only_training_overwrites_is_copied_there() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5, inplace=True), nn.Flatten())
    taps, images = Taps(net, ["0"]), torch.randn(4, 3, 5, 5)
    dry_forward(taps, images)
    for _ in range(2):
        (got,) = taps.train()(images).features
        torch.testing.assert_close(got, nn.functional.batch_norm(images, None, None, training=True))


def test_gradient_flows_through_a_tap() -> None:
    net = toy()
    outputs = Taps(net, TOY_TAPS)(torch.randn(2, 3, 6, 6))
    outputs.features[0].square().sum().backward()
    assert net.conv1.weight.grad is not None and net.conv1.weight.grad.abs().sum() > 0
    assert net.conv2.weight.grad is None


def test_gradient_equals_that_of_the_hand_written_forward() -> None:
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)  # float32 rounds too much for some draws
    grads = []
    for forward in (lambda net: Taps(net, TOY_TAPS)(images).features, lambda net: toy_maps(net, images)):
        net = toy().double().train()
        torch.stack([(m**3).sum() for m in forward(net)]).sum().backward()
        grads.append(net.conv1.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_the_network_alone_keeps_nothing() -> None:
    net = toy()
    taps = Taps(net, TOY_TAPS)
    net(torch.randn(2, 3, 6, 6))
    assert not taps._open


def test_modules_whose_input_is_read_are_out_of_place_until_closed() -> None:
    net, images = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Flatten()), torch.randn(1, 3, 2, 2)
    expected = net(images)
    taps = Taps(net, ["1@in"])
    outputs = [taps(images) for _ in range(2)][1]
    torch.testing.assert_close(outputs.features[0], net[0](images))
    torch.testing.assert_close(outputs.logits, expected)
    assert not net[1].inplace
    taps.close()
    assert net[1].inplace


def test_a_copy_reads_its_own_network() -> None:
    taps, images = Taps(toy(), TOY_TAPS), torch.randn(2, 3, 6, 6)
    other = copy.deepcopy(taps)
    other.model.get_parameter("conv1.weight").data.mul_(2)
    for each in (taps, other, taps):
        each.eval()
        assert isinstance(each.model, Toy)
        for got, expected in zip(each(images).features, toy_maps(each.model, images), strict=True):
            torch.testing.assert_close(got, expected)


def test_close_takes_the_hooks_away() -> None:
    net = toy()
    taps = Taps(net, TOY_TAPS)
    taps.close()
    assert not net.relu._forward_pre_hooks
    with pytest.raises(RuntimeError, match="not reached"):
        taps(torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("rellu@in", "nearest are relu"),
        ("relu@out", "not of the form"),
        ("relu@in#x", "not of the form"),
        ("", "not of the form"),
    ],
)
def test_a_wrong_path_is_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Taps(toy(), [path])


def test_an_ambiguous_or_missing_call_is_refused() -> None:
    images = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"called 2 times.*'relu@in#-1' for the last"):
        Taps(toy(), ["relu@in"])(images)
    with pytest.raises(ValueError, match="only 2 times"):
        Taps(toy(), ["relu@in#2"])(images)


def test_norms_before_finds_the_last_norm_or_none() -> None:
    net = toy()
    found = norms_before(Taps(net, ["relu@in#0", "relu@in#1", "conv2", "bn1@in"]), torch.zeros(1, 3, 4, 4))
    assert found[0] is net.bn1
    assert found[1] is net.bn2
    assert found[2] is None and found[3] is None


def test_norms_before_needs_the_width_of_the_map() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(2)
            self.relu = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: Tensor = self.relu(torch.cat([x[:, :1], self.bn(x[:, 1:])], 1))
            return out

    assert norms_before(Taps(Halves(), ["relu@in"]), torch.zeros(1, 3, 4, 4)) == [None]


def test_dry_forward_leaves_modes_and_statistics_alone() -> None:
    net = toy().train()
    net.bn1.eval()
    mean = net.bn2.get_buffer("running_mean").clone()
    outputs = dry_forward(Taps(net, TOY_TAPS), torch.randn(4, 3, 6, 6))
    assert net.training and net.bn2.training and not net.bn1.training
    assert torch.equal(net.bn2.get_buffer("running_mean"), mean)
    assert not outputs.logits.requires_grad


@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_forward_reads_the_same_maps(training: bool) -> None:
    net, images = toy().train(training), torch.randn(5, 3, 6, 6)
    taps = Taps(net, TOY_TAPS)
    compiled = torch.compile(taps, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for got, expected in zip(compiled(images).features, toy_maps(net, images), strict=True):
            torch.testing.assert_close(got, expected)


def test_maps_with_their_channels_last_are_turned() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Flatten())
    net[0].register_forward_hook(lambda m, a, out: out.permute(0, 2, 3, 1))  # as a Swin transformer's blocks give it
    images = torch.randn(2, 3, 5, 5)
    (turned,) = Taps(net, ["0@last"])(images).features
    assert turned.shape == (2, 4, 5, 5) and torch.equal(turned, net[0](images).permute(0, 3, 1, 2))


def test_a_map_that_is_overwritten_later_than_at_first_is_refused() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.in_place = nn.Conv2d(3, 4, 1), False

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            out: Tensor = (y.mul_(2) if self.in_place else y * 2).mean((2, 3))
            return out

    net = Sometimes()
    taps, images = Taps(net, ["conv"]), torch.randn(2, 3, 4, 4)
    taps(images)
    net.in_place = True
    with pytest.raises(RuntimeError, match="'conv' was overwritten in place; it was not in the first forward"):
        taps(images)


def test_a_tap_that_is_no_tensor_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    net = nn.Sequential(Pair(), nn.Flatten())
    with pytest.raises(TypeError, match="tap '0' reads a tuple, not a tensor"):
        Taps(net, ["0"])(torch.randn(1, 3, 2, 2))


@pytest.mark.parametrize("call", [2, -3])
def test_a_missing_call_is_refused(call: int) -> None:
    with pytest.raises(ValueError, match="only 2 times"):
        Taps(toy(), [f"relu@in#{call}"])(torch.randn(1, 3, 4, 4))


def test_norms_before_takes_plain_norms_only_also_without_weights() -> None:
    class Activates(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    for norm, taken in ((nn.BatchNorm2d(4), True), (nn.BatchNorm2d(4, affine=False), True), (Activates(4), False)):
        net = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Sigmoid(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.Flatten())
        assert norms_before(Taps(net, ["2@in", "0@in"]), torch.zeros(1, 3, 4, 4)) == [norm if taken else None, None]


def test_norms_before_leaves_modes_and_statistics_alone() -> None:
    net = toy().train()
    mean = net.bn1.get_buffer("running_mean").clone()
    norms_before(Taps(net, TOY_TAPS), torch.ones(2, 3, 4, 4))
    assert net.training and torch.equal(net.bn1.get_buffer("running_mean"), mean)


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    net, wrong = toy().train(), torch.zeros(1, 5, 4, 4)
    taps = Taps(net, TOY_TAPS)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    for call in (taps, lambda x: dry_forward(taps, x), lambda x: norms_before(taps, x)):
        with pytest.raises(RuntimeError, match="channels"):
            call(wrong)
        assert net.training and not taps._open
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()) == hooks


def test_a_copy_hooks_nothing_twice() -> None:
    taps, images = Taps(toy(), ["bn2"]), torch.randn(2, 3, 6, 6)
    other = copy.deepcopy(taps)
    for each in (taps, other):
        assert len(each(images).features) == 1  # a module called once is read once


class Wrapped(nn.Module):
    """A toy network that returns its logits as `wrap` makes them."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.wrap = toy(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.net(x))


class Named(NamedTuple):
    logits: Tensor
    aux_logits: Tensor | None


WRAPS: list[Callable[[Tensor], Any]] = [
    lambda y: y,
    lambda y: SimpleNamespace(logits=y, hidden_states=None),
    lambda y: Named(y, y * 2),
    lambda y: Named(y, None),
    lambda y: {"loss": y.sum(), "logits": y},
    lambda y: OrderedDict(out=y, aux=y * 2),
    lambda y: (y, y * 2),
    lambda y: [y],
    lambda y: Outputs(y),
]


@pytest.mark.parametrize("number", range(len(WRAPS)))
def test_logits_are_found_in_what_a_network_returns(number: int) -> None:
    net, images = Wrapped(WRAPS[number]).eval(), torch.randn(2, 3, 6, 6)
    expected = net.net(images)
    for found in (logits_of(net(images)), Taps(net)(images).logits, freeze(net)(images).logits):
        torch.testing.assert_close(found, expected)
    dry = dry_forward(Taps(net, [f"net.{path}" for path in TOY_TAPS]), images)
    torch.testing.assert_close(dry.features[0], toy_maps(net.net, images)[0])


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (lambda y: None, "NoneType"),
        (lambda y: {"prediction": y}, "dict"),
        (lambda y: {"logits": None}, "dict"),
        (lambda y: (), "tuple"),
        (lambda y: (y.sum(), y), "tuple"),  # a loss first
        (lambda y: [y[:, :, None]], "list"),
        (lambda y: SimpleNamespace(logits=[y]), "SimpleNamespace"),
        (lambda y: y.detach().numpy(), "ndarray"),
    ],
)
def test_a_network_without_logits_is_refused_at_its_first_forward(wrap: Callable[[Tensor], Any], kind: str) -> None:
    for run in (dry_forward, lambda taps, images: taps(images)):
        with pytest.raises(TypeError, match=f"returns a {kind} in which no logits are found: .*\\.logits"):
            run(Taps(Wrapped(wrap)), torch.randn(2, 3, 6, 6))


def test_a_module_that_is_called_by_keyword_is_read_at_its_input() -> None:
    class Attends(nn.Module):
        def forward(self, mask: Tensor | None = None, *, x: Tensor, scale: float = 1.0) -> Tensor:
            return x * scale

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.attends = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), Attends()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attends(None, scale=2.0, x=self.relu(input=self.conv(input=x))).mean((2, 3))
            return out

    net, images = Net(), torch.randn(2, 3, 6, 6)
    taps = Taps(net, ["relu@in", "attends@in", "conv@in"])
    for _ in range(2):
        first, second, given = taps(images).features
        torch.testing.assert_close(first, net.conv(images))
        torch.testing.assert_close(second, net.conv(images).relu())
        assert torch.equal(given, images)


def test_an_input_without_tensors_is_refused() -> None:
    class Sized(nn.Module):
        def forward(self, sizes: list[int], scale: float = 1.0) -> Tensor:
            return torch.zeros(sizes)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sized = Sized()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.sized([len(x), 3], scale=2.0)
            return out

    with pytest.raises(TypeError, match="tap 'sized@in' reads a list, not a tensor"):
        Taps(Net(), ["sized@in"])(torch.randn(2, 3, 6, 6))


class ByNames(nn.Module):
    """Calls a module by keyword, in another order than that of its forward."""

    class Gate(nn.Module):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return x * gate

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 4, 1), self.Gate()

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        out: Tensor = self.gate(gate=x.mean((2, 3), keepdim=True), x=x).mean((2, 3))
        return out


def test_arguments_by_keyword_count_in_the_order_of_the_forward() -> None:
    model, images = ByNames(), torch.randn(2, 3, 4, 4)
    assert torch.equal(Taps(model, ["gate@in"])(images).features[0], model.conv(images))
