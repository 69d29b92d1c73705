from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import mgd
from tests.mgd.nets import TOY_TAPS, toy, toy_maps


def test_a_frozen_teacher_stays_in_eval_mode_and_builds_no_graph() -> None:
    net = toy()
    teacher = mgd.freeze(mgd.Taps(net, TOY_TAPS))
    images = torch.randn(4, 3, 6, 6, requires_grad=True)
    mean = net.bn1.get_buffer("running_mean").clone()
    outputs = teacher.train()(images)
    assert not net.training and not net.bn1.training
    assert torch.equal(net.bn1.get_buffer("running_mean"), mean)
    assert not any(m.requires_grad for m in [outputs.logits, *outputs.features])
    assert not any(p.requires_grad for p in teacher.parameters())
    torch.nn.Sequential(teacher).train()
    assert not net.bn1.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_change_the_type_that_a_teacher_computes_in(dtype: torch.dtype) -> None:
    teacher, images = mgd.freeze(mgd.Taps(toy().to(dtype), TOY_TAPS)), torch.randn(4, 3, 6, 6)
    expected = teacher(images)
    with torch.autocast("cpu", torch.bfloat16):
        got = teacher(images)
        assert torch.is_autocast_enabled("cpu")
    for a, b in zip([got.logits, *got.features], [expected.logits, *expected.features], strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)


def test_freezing_twice_changes_nothing() -> None:
    teacher = mgd.freeze(toy())
    assert mgd.freeze(teacher) is teacher


def test_ensemble_is_the_weighted_mean_of_probabilities() -> None:
    nets, images = [toy(seed=s).eval() for s in (0, 1)], torch.randn(4, 3, 6, 6)
    ensemble = mgd.Ensemble([nets[0], mgd.Taps(nets[1], TOY_TAPS)], [1, 3])
    outputs = mgd.freeze(ensemble)(images)
    expected = 0.25 * nets[0](images).softmax(1) + 0.75 * nets[1](images).softmax(1)
    torch.testing.assert_close(outputs.logits.exp(), expected)
    torch.testing.assert_close(outputs.logits.softmax(1), expected)
    assert len(outputs.features) == 2
    joint = mgd.freeze(ensemble).bfloat16()(images)  # the images stay float32
    assert joint.features[0].dtype == torch.bfloat16
    torch.testing.assert_close(joint.logits.exp(), expected, atol=0.02, rtol=0)


def test_ensemble_weights_are_checked() -> None:
    for models, weights in (
        ([], None),
        ([toy()], [1.0, 2.0]),
        ([toy(), toy()], [1.0, 0.0]),
        ([toy(), toy()], [1.0, float("nan")]),
    ):
        with pytest.raises(ValueError, match="positive weight"):
            mgd.Ensemble(models, weights)


def test_networks_of_other_classes_are_no_ensemble() -> None:
    ensemble = mgd.Ensemble([toy(), nn.Sequential(toy(), nn.Linear(3, 5))])
    with pytest.raises(ValueError, match=r"one number of classes; got \[\(2, 3\), \(2, 5\)\]"):
        ensemble(torch.randn(2, 3, 6, 6))


def test_folding_changes_neither_logits_nor_maps() -> None:
    net, images = toy().eval(), torch.randn(4, 3, 6, 6)
    taps = mgd.Taps(net, TOY_TAPS)
    before = taps(images)
    assert mgd.fold_norms(taps, images) == 2
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    after = mgd.freeze(taps)(images)
    for a, b in zip([before.logits, *before.features], [after.logits, *after.features], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_tapped_is_not_folded() -> None:
    taps = mgd.Taps(toy(), ["conv1", "bn2"])
    assert mgd.fold_norms(taps, torch.randn(1, 3, 6, 6)) == 0


class Branching(nn.Module):
    """A convolution whose output is read twice, once where no module sees it."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Sigmoid()
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = (self.bn(y) + (y if self.hidden else self.other(y))).mean((2, 3))
        return out


@pytest.mark.parametrize("hidden", [False, True])
def test_a_convolution_that_others_read_is_not_folded(hidden: bool) -> None:
    torch.manual_seed(0)
    net = Branching(hidden)
    nn.init.constant_(net.bn.weight, 3.0)
    images = torch.randn(2, 3, 4, 4)
    before = net.eval()(images)
    assert mgd.fold_norms(mgd.Taps(net), images) == 0
    torch.testing.assert_close(net(images), before)


def test_folding_takes_real_networks_whole() -> None:
    for name, expected in (("resnet18", 20), ("mobilenet_v3_small", 34), ("efficientnet_b0", 49)):
        net = torchvision.models.get_model(name).eval()
        assert mgd.fold_norms(mgd.Taps(net), torch.randn(1, 3, 64, 64)) == expected
        assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def test_a_teacher_in_bfloat16_takes_float_images() -> None:
    net, images = toy().eval(), torch.randn(8, 3, 6, 6)
    exact = mgd.freeze(mgd.Taps(toy(), TOY_TAPS))(images)
    fast = mgd.freeze(mgd.Taps(net, TOY_TAPS)).to(torch.bfloat16).to(memory_format=torch.channels_last)(images)
    assert fast.logits.dtype == torch.bfloat16
    for a, b in zip(exact.features, fast.features, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.float().flatten(), dim=0) > 0.999


def test_a_view_shows_the_student_s_images_as_the_teacher_was_trained() -> None:
    pictures = torch.rand(2, 3, 8, 8)
    mean, std, own_mean, own_std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    given = (pictures - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(mgd.View(mean, std, own_mean, own_std)(given), (pictures - 0.5) / 0.5)
    assert mgd.View(mean, std, own_mean, own_std, 12)(given).shape == (2, 3, 12, 12)
    net = toy().eval()
    teacher = mgd.freeze(net, mgd.View(mean, std, own_mean, own_std))
    torch.testing.assert_close(teacher(given).logits, net((pictures - 0.5) / 0.5))


def test_a_view_resizes_as_photos_are() -> None:
    view, images = mgd.View((0.5,) * 3, (0.5,) * 3, (0.5,) * 3, (0.5,) * 3, 3), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(view(images), F.interpolate(images, size=(3, 3), mode="bilinear", antialias=True))
    assert view(torch.rand(2, 3, 5, 3)).shape == (2, 3, 3, 3)


class Twice(nn.Module):
    """A convolution and its norm called once, and others that are shared."""

    def __init__(self, shared_conv: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(1 if shared_conv else 2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2 if shared_conv else 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        for conv, norm in ((self.convs[0], self.norms[0]), (self.convs[-1], self.norms[-1])):
            x = norm(conv(x)).relu()
        return x.mean((2, 3))


@pytest.mark.parametrize("shared_conv", [True, False])
def test_what_is_called_twice_is_not_folded_and_the_rest_is(shared_conv: bool) -> None:
    torch.manual_seed(0)
    net = Twice(shared_conv).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 3)
            nn.init.normal_(module.get_buffer("running_mean"))
    images = torch.randn(2, 3, 4, 4)
    before = copy.deepcopy(net).eval()(images)
    assert mgd.fold_norms(mgd.Taps(net), images) == 1  # from training mode too
    assert isinstance(net.norm, nn.Identity)
    torch.testing.assert_close(net(images), before)


def test_other_norms_and_convolutions_are_not_folded() -> None:
    class Activates(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, F.normalize(self.weight.flatten(1), dim=1).view_as(self.weight), self.bias)

    pairs = [
        (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
        (nn.Conv2d(3, 3, 1), Activates(3)),
        (Standardised(3, 3, 2), nn.BatchNorm2d(3)),
        (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
    ]
    net = nn.Sequential(*(module for pair in pairs for module in pair), nn.Flatten())
    assert mgd.fold_norms(mgd.Taps(net.eval()), torch.randn(2, 3, 4, 4)) == 1


def test_folding_is_undone_where_a_map_alone_would_change() -> None:
    class Hidden(nn.Module):
        """A map that is read where no module sees it, and that the logits do not hold."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.seen, self.fc = (
                nn.Conv2d(3, 3, 1),
                nn.BatchNorm2d(3),
                nn.Identity(),
                nn.Linear(3, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            self.seen(y * 2)
            out: Tensor = self.fc(self.bn(y).mean((2, 3)))
            return out

    net = Hidden().eval()
    nn.init.constant_(net.bn.weight, 3.0)
    assert mgd.fold_norms(mgd.Taps(net, ["seen"]), torch.randn(2, 3, 4, 4)) == 0


def test_an_ensemble_has_the_maps_of_its_networks_in_order_also_of_frozen_ones() -> None:
    images, nets = torch.randn(2, 3, 6, 6), [toy(seed=s).eval() for s in (0, 1)]
    view = mgd.View((0.5,) * 3, (0.5,) * 3, (0.4,) * 3, (0.2,) * 3)
    ensemble = mgd.Ensemble([mgd.Taps(nets[0], TOY_TAPS), mgd.freeze(mgd.Taps(nets[1], TOY_TAPS), view)])
    expected = [*toy_maps(nets[0], images), *toy_maps(nets[1], view(images))]
    for got, wanted in zip(mgd.freeze(ensemble)(images).features, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        *((isa, False) for isa in ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "avx512_core_vnni")),
        *((isa, True) for isa in ("", "ALL", "DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_AMX", "AVX10_1_512_AMX")),
    ],
)
@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_bfloat16_is_only_where_processor_and_environment_have_it(
    variable: str, allowed: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, allowed)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert mgd.has_bfloat16(torch.device("cpu")) is expected
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not mgd.has_bfloat16(torch.device("cpu"))
    assert not mgd.has_bfloat16(torch.device("meta"))


@pytest.mark.parametrize("path", ["1.act@in", "1.act"])
def test_a_norm_that_activates_itself_is_folded_and_its_activation_stays(path: str) -> None:
    torch.manual_seed(0)
    norm = timm.layers.BatchNormAct2d(4, act_layer=nn.Hardswish)
    for values in (norm.weight, norm.bias, norm.get_buffer("running_mean")):
        nn.init.normal_(values)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images, activation = torch.randn(2, 3, 6, 6), norm.act
    plain = F.batch_norm(net[0](images), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    taps = mgd.Taps(net, [path])
    assert mgd.fold_norms(taps, images) == 1
    assert net[1].act is activation and not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    for each in (taps, copy.deepcopy(taps)):
        outputs = mgd.freeze(each)(images)
        torch.testing.assert_close(outputs.logits, F.hardswish(plain).mean((2, 3)))
        torch.testing.assert_close(outputs.features[0], plain if path == "1.act@in" else F.hardswish(plain))


def test_a_convolution_that_pads_by_itself_is_folded() -> None:
    class PadsFirst(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (0, 1, 0, 1)))

    net = nn.Sequential(PadsFirst(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten()).eval()
    nn.init.normal_(net.get_parameter("1.weight"))
    images = torch.randn(2, 3, 6, 6)
    expected = net(images)
    assert mgd.fold_norms(mgd.Taps(net), images) == 1
    torch.testing.assert_close(net(images), expected)


def test_norms_of_other_kinds_stay() -> None:
    class Reads(nn.Module):
        """A network that looks at its norm's weights."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = (self.bn(self.conv(x)) + self.bn.weight.sum()).mean((2, 3))
            return out

    class Scales(nn.BatchNorm2d):
        """A norm whose module is not all that lies behind it."""

        def __init__(self) -> None:
            super().__init__(3)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = 2 * self.act(super().forward(x))
            return out

    images = torch.randn(2, 3, 4, 4)
    split = timm.layers.SplitBatchNorm2d(3)
    for net in (Reads(), *(nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Flatten()) for norm in (Scales(), split))):
        expected = net.eval()(images)
        assert mgd.fold_norms(mgd.Taps(net), images) == 0
        torch.testing.assert_close(net(images), expected)


def test_layers_that_are_called_by_keyword_are_folded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.bn(input=self.conv(input=x)).mean((2, 3))
            return out

    assert mgd.fold_norms(mgd.Taps(Net()), torch.randn(2, 3, 4, 4)) == 1


@pytest.mark.parametrize(("name", "kept"), [("efficientnet_lite0", 0), ("test_byobnet", 0), ("test_resnet", 0)])
def test_families_of_timm_fold_whole(name: str, kept: int) -> None:
    net = timm.create_model(name, num_classes=3)
    mgd.fold_norms(mgd.Taps(net), torch.randn(1, 3, 64, 64))
    assert sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()) == kept
