"""Our losses against those of torchdistill (Yoshitomo Matsubara, 1.1.5): values, and gradients at the student's tensor.

Theirs run in float64, ours in float32. Common to all: theirs leave it to the caller to cut the teacher's gradient, to
gather the ranks and to bring maps to one size; ours detach, gather and average-pool the larger map.

method             | torchdistill class       | difference of definition
-------------------|--------------------------|-------------------------------------------------------------------------
kd                 | KDLoss                   | without labels theirs lacks tau^2; with labels a CE + b tau^2 KL: none
kd, standardised   | LogitStdKDLoss           | as KDLoss; besides, their std divides by K - 1, ours by K, so that their
                   |                          | tau is ours * sqrt((K - 1) / K); eps 1e-7 is added, ours a lower bound
dist               | DISTLoss                 | theirs has a factor tau^2
dml                | KDLoss, tau 1            | none
symmetric, ssld    | KDLoss both ways, tau 1  | they have no such class; ours is half the sum of both
meal, similarity   | KDLoss, tau 1            | they have no such class; ours = KL + entropy of the mean probability
rkd                | RKDLoss                  | none; a map is flattened, ours averaged over pixels. Coinciding images:
                   |                          | same value; their angles give such a pair gradients near 1e12, ours none
at                 | ATLoss, mode "code"      | none
at                 | ATLoss, mode "paper"     | theirs is a mean of lengths, each sqrt(H W * ours of that image)
similarity         | SPKDLoss                 | rows of absolute sum 1 there, of length 1 here (test_similarity.py)
fitnet, map_l2     | SimpleLossWrapper, MSE   | none; their generic wrapper, around the user's own regressor
crd                | CRDLoss, Normalizer4CRD  | same bank and negatives: none, except eps 1e-7 beside K / N. Draws are
                   |                          | not comparable: ours are without replacement, never the anchor, one for
                   |                          | the batch; their `draw` reads `self.prob`, which nothing sets, so that
                   |                          | negatives must be given. An image twice in a batch: ours keeps the first
reviewkd, context  | HierarchicalContextLoss  | theirs skips the sizes >= height, ours those >= the smaller side
reviewkd, fusion   | AttentionBasedFusion     | none but names and initial weights; theirs makes square maps only
ofd, mgd           | AltActTransferLoss       | another quantity: on which side of 0 the teacher is, up to one margin,
                   |                          | where ours regresses its positive values. Equal once targets become the
                   |                          | margin or its opposite by sign, and students above it count as at it
dkd, wsl           | none                     | not in the package
afd                | none                     | not in the package; AffinityLoss is another method, of segmentation
masked_generative  | none                     | not in the package
meal, discriminator| none                     | not in the package
none               | SRDLoss, SKD, DIST+, ... | methods which we do not have
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgd import Batch, Outputs
from mgd.losses import AT, CE, CRD, KD, FitNet, ReviewKD, Term, at, dist, dml, kd, map_l2, meal, rkd
from mgd.losses.crd import candidates
from mgd.losses.margin import partial_l2
from mgd.losses.reviewkd import context_loss

torchdistill = pytest.importorskip(
    "torchdistill", reason="torchdistill is not installed (it needs torch 2.12 or newer)"
)
losses = importlib.import_module("torchdistill.losses.mid_level")

PATHS = ("student", "output", "teacher", "output")
PAIR = {"student": {"path": "student", "io": "output"}, "teacher": {"path": "teacher", "io": "output"}}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pool(x: Tensor, side: int) -> Tensor:
    pooled: Tensor = F.adaptive_avg_pool2d(x, side)
    return pooled


def call(module: nn.Module, student: object, teacher: object, *target: Tensor) -> Tensor:
    """Call one of their losses as their training does: on a dictionary of the modules' outputs for each network."""
    value: Tensor = module({"student": {"output": student}}, {"teacher": {"output": teacher}}, *target)
    return value


def run(term: Term, student: list[Tensor], teacher: list[Tensor], index: Tensor | None = None) -> Tensor:
    """Call one of our terms on maps."""
    logits = student[0].new_zeros(len(student[0]), 2)
    value: Tensor = term(Outputs(logits, student), [Outputs(logits, teacher)], Batch(index=index))
    return value


def check(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], student: Tensor) -> None:
    """Compare the values, and the gradients with respect to the student's tensor."""
    x, y = student.clone().requires_grad_(), student.double().requires_grad_()
    value, expected = ours(x), theirs(y)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-9)
    (gradient,), (expected_gradient,) = torch.autograd.grad(value, x), torch.autograd.grad(expected, y)
    scale = expected_gradient.abs().max().item()
    assert scale > 1e-6
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_kd_equals_their_loss_without_labels_times_the_squared_temperature(tau: float) -> None:
    student, teacher = 3 * randn(6, 5), 3 * randn(6, 5, seed=1)
    module = losses.KDLoss(*PATHS, temperature=tau, alpha=0.0)
    # Without labels theirs has no factor tau^2.
    check(lambda z: kd(z, teacher, temperature=tau), lambda z: call(module, z, teacher.double()) * tau**2, student)


def test_cross_entropy_and_kd_with_weights_equal_their_loss_with_labels() -> None:
    student, teacher, target = 3 * randn(6, 5), 3 * randn(6, 5, seed=1), torch.tensor([0, 4, 1, 1, 3, 2])
    module = losses.KDLoss(*PATHS, temperature=5.0, alpha=0.3)

    def ours(z: Tensor) -> Tensor:
        parts = [term(Outputs(z), [Outputs(teacher)], Batch(target)) for term in (CE(), KD(temperature=5.0))]
        value: Tensor = 0.3 * parts[0] + 0.7 * parts[1]
        return value

    check(ours, lambda z: call(module, z, teacher.double(), target), student)


@pytest.mark.parametrize("num_classes", [3, 10])
def test_standardised_kd_equals_their_loss_at_the_temperature_of_the_other_deviation(num_classes: int) -> None:
    student, teacher, tau = 3 * randn(6, num_classes), 1 + 2 * randn(6, num_classes, seed=1), 2.0
    # Their standard deviation divides by K - 1, ours by K; their eps is added, ours a lower bound.
    theirs_tau = tau * math.sqrt((num_classes - 1) / num_classes)
    module = losses.LogitStdKDLoss(*PATHS, temperature=theirs_tau, eps=0.0, alpha=0.0)
    term = KD(temperature=tau, standardised=True)
    # Without labels theirs has no factor tau^2.
    check(
        lambda z: term(Outputs(z), [Outputs(teacher)], Batch()),
        lambda z: call(module, z, teacher.double()) * tau**2,
        student,
    )


@pytest.mark.parametrize(("batch", "tau"), [(6, 1.0), (6, 4.0), (1, 2.0)])
def test_dist_equals_their_loss_over_the_squared_temperature(batch: int, tau: float) -> None:
    student, teacher = 3 * randn(batch, 5), 3 * randn(batch, 5, seed=1)
    module = losses.DISTLoss(*PATHS, beta=0.5, gamma=2.0, tau=tau)
    check(
        lambda z: dist(z, teacher, temperature=tau, beta=0.5, gamma=2.0),
        lambda z: call(module, z, teacher.double()) / tau**2,  # theirs has a factor tau^2
        student,
    )


def test_dml_is_their_kd_and_its_symmetric_form_half_the_sum_both_ways() -> None:
    student, peer = 3 * randn(6, 5), 3 * randn(6, 5, seed=1)
    module = losses.KDLoss(*PATHS, temperature=1.0, alpha=0.0)
    check(lambda z: dml(z, peer), lambda z: call(module, z, peer.double()), student)
    # They have no symmetric loss: two of theirs, one with the networks exchanged.
    check(
        lambda z: dml(z, peer, symmetric=True),
        lambda z: (call(module, z, peer.double()) + call(module, peer.double(), z)) / 2,
        student,
    )


def test_the_similarity_of_meal_is_their_kd_against_the_mean_probability_plus_its_entropy() -> None:
    student, teachers = 3 * randn(6, 5), [3 * randn(6, 5, seed=seed) for seed in (1, 2)]
    module = losses.KDLoss(*PATHS, temperature=1.0, alpha=0.0)
    mean = torch.stack([teacher.double().softmax(dim=1) for teacher in teachers]).mean(dim=0)
    entropy = -(mean * mean.log()).sum(dim=1).mean()  # ours is a cross-entropy, theirs a divergence
    check(lambda z: meal(z, teachers), lambda z: call(module, z, mean.log()) + entropy, student)


@pytest.mark.parametrize(("distance", "angle"), [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0)])
def test_rkd_equals_their_loss(distance: float, angle: float) -> None:
    student, teacher = randn(6, 3), randn(6, 7, seed=1)
    student[5] *= 20  # differences above 1: the linear part
    module = losses.RKDLoss("student", "teacher", distance, angle, "mean")
    check(
        lambda x: rkd(x, teacher, distance=distance, angle=angle), lambda x: call(module, x, teacher.double()), student
    )


def test_rkd_of_coinciding_images_equals_their_value() -> None:
    student, teacher = randn(5, 3), randn(5, 7, seed=1)
    student[1] = student[0]
    expected = call(losses.RKDLoss("student", "teacher", 25.0, 50.0, "mean"), student.double(), teacher.double())
    torch.testing.assert_close(rkd(student, teacher).double(), expected, rtol=1e-5, atol=0)


def test_at_equals_the_sum_of_their_loss_over_the_taps() -> None:
    deep, teachers = randn(3, 5, 2, 2, seed=3), [randn(3, 6, 4, 3, seed=1), randn(3, 2, 2, 2, seed=2)]
    pairs = {name: {net: {"path": f"{net}.{name}", "io": "output"} for net in ("student", "teacher")} for name in "ab"}
    module = losses.ATLoss(pairs, mode="code")

    def theirs(x: Tensor) -> Tensor:
        student = {"student.a": {"output": x}, "student.b": {"output": deep.double()}}
        value: Tensor = module(
            student, {f"teacher.{n}": {"output": t.double()} for n, t in zip("ab", teachers, strict=True)}
        )
        return value

    check(lambda x: run(AT(), [x, deep], teachers), theirs, randn(3, 4, 4, 3))


@pytest.mark.parametrize(("student_side", "teacher_side"), [(6, 3), (3, 6)])
def test_at_of_two_sizes_equals_their_loss_after_pooling_the_larger_map(student_side: int, teacher_side: int) -> None:
    student, teacher = randn(3, 4, student_side, student_side), randn(3, 6, teacher_side, teacher_side, seed=1)
    module = losses.ATLoss({"pair": PAIR}, mode="code")
    # Theirs refuses maps of two sizes; ours average-pools the larger one.
    check(lambda x: at(x, teacher), lambda x: call(module, pool(x, 3), pool(teacher.double(), 3)), student)


def test_at_is_the_mean_of_their_squared_lengths_by_the_paper_over_the_pixels() -> None:
    student, teacher = randn(3, 4, 4, 3), randn(3, 6, 4, 3, seed=1)
    module = losses.ATLoss({"pair": PAIR}, mode="paper")

    def theirs(x: Tensor) -> Tensor:
        # Theirs is a mean of lengths, ours of squares over H W: image by image, so that each can be squared.
        lengths = [call(module, x[i : i + 1], teacher[i : i + 1].double()) for i in range(3)]
        return torch.stack(lengths).square().mean() / (4 * 3)

    check(lambda x: at(x, teacher), theirs, student)


def squared_error() -> nn.Module:
    """Return their generic wrapper around the mean squared error, which is how they run FitNets."""
    module: nn.Module = losses.SimpleLossWrapper(
        nn.MSELoss(),
        input={"is_from_teacher": False, "module_path": "student", "io": "output"},
        target={"is_from_teacher": True, "module_path": "teacher", "io": "output"},
    )
    return module


def test_fitnet_and_map_l2_equal_their_wrapped_squared_error() -> None:
    student, teacher, module = randn(3, 4, 4, 4), randn(3, 6, 4, 4, seed=1), squared_error()
    torch.manual_seed(0)
    term = FitNet([4], [[6]])
    regressor = copy.deepcopy(term.regressors[0]).double()
    check(
        lambda x: run(term, [x], [teacher]),
        lambda x: call(module, regressor(x), teacher.double(), torch.zeros(3)),
        student,
    )
    hint = teacher[:, :4]
    check(lambda x: map_l2(x, hint), lambda x: call(module, x, hint.double(), torch.zeros(3)), student)


def test_crd_equals_their_loss_with_the_same_bank_and_negatives_over_two_steps() -> None:
    wrapper = importlib.import_module("torchdistill.models.wrapper")
    num_images, num_negatives, dimension, temperature = 12, 6, 8, 0.5
    torch.manual_seed(0)
    term = CRD(3, [4], num_images, num_negatives=num_negatives, dimension=dimension, temperature=temperature)
    (memory,) = term.contrasts.children()
    # Their eps of 1e-7 beside K / N has no counterpart: 0.
    module = losses.CRDLoss(
        *("student", "empty", "teacher", dimension, num_images, num_negatives, num_images, temperature), eps=0.0
    ).double()
    module.memory_v1.copy_(memory.student_bank)
    module.memory_v2.copy_(memory.teacher_bank)
    heads = [
        wrapper.Normalizer4CRD(copy.deepcopy(head).double()) for head in (memory.student_head, memory.teacher_head)
    ]

    def compare(step: int) -> None:
        teacher, index = randn(4, 4, 2, 2, seed=20 + step), (torch.tensor([3, 0, 7, 11]) + step) % num_images
        # Theirs takes one list an image, the positive in front; ours draws one for the batch, and one to spare.
        *wanted, spare = candidates(step, num_negatives + 1, num_images).tolist()
        drawn = torch.tensor([[i, *(spare if k == i else k for k in wanted)] for i in index.tolist()])

        def theirs(x: Tensor) -> Tensor:
            # Theirs flattens a map; ours averages it over the pixels first.
            unit = [head(m.mean(dim=(2, 3))) for head, m in zip(heads, (x, teacher.double()), strict=True)]
            student = {"student": {"output": unit[0]}, "empty": {"input": {"pos_idx": index, "contrast_idx": drawn}}}
            value: Tensor = module(student, {"teacher": {"output": unit[1]}})
            return value.squeeze()  # theirs has the shape (1,)

        check(lambda x: run(term, [x], [teacher], index), theirs, randn(4, 3, 2, 2, seed=10 + step))

    for step in range(2):
        compare(step)
        torch.testing.assert_close(memory.student_bank.double(), module.memory_v1, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(memory.teacher_bank.double(), module.memory_v2, rtol=1e-5, atol=1e-6)
        normalisers = module.params[2:4].detach()
        torch.testing.assert_close(memory.get_buffer("log_normalisers").exp().double(), normalisers, rtol=1e-5, atol=0)


def context(sizes: list[int] | None = None) -> nn.Module:
    module: nn.Module = losses.HierarchicalContextLoss(*PATHS, output_sizes=sizes)
    return module


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 7), (4, 4), (2, 2), (1, 1)])
def test_the_context_loss_equals_theirs(height: int, width: int) -> None:
    student, teacher = randn(2, 3, height, width), randn(2, 3, height, width, seed=1)
    check(lambda x: context_loss(x, teacher), lambda x: call(context(), (x, None), teacher.double()), student)


def test_the_context_loss_of_a_tall_map_equals_theirs_without_the_sizes_above_its_width() -> None:
    student, teacher = randn(2, 3, 6, 3), randn(2, 3, 6, 3, seed=1)
    # Theirs looks at the height alone and would pool a width of 3 to 4.
    check(lambda x: context_loss(x, teacher), lambda x: call(context([2, 1]), (x, None), teacher.double()), student)


@pytest.mark.parametrize(("student_side", "teacher_side"), [(8, 5), (5, 8)])
def test_the_context_loss_of_two_sizes_equals_theirs_after_pooling(student_side: int, teacher_side: int) -> None:
    student, teacher = randn(2, 3, student_side, student_side), randn(2, 3, teacher_side, teacher_side, seed=1)
    # Theirs refuses maps of two sizes; ours average-pools the larger one.
    check(
        lambda x: context_loss(x, teacher),
        lambda x: call(context(), (pool(x, 5), None), pool(teacher.double(), 5)),
        student,
    )


@pytest.mark.parametrize("varied", [0, 1, 2])
def test_reviewkd_equals_their_fusion_modules_and_context_losses(varied: int) -> None:
    wrapper = importlib.import_module("torchdistill.models.wrapper")
    widths, teacher_widths, sides, names = (2, 3, 4), (3, 2, 5), (8, 4, 2), ("enter", "attention", "leave")
    maps = [randn(2, c, s, s, seed=k) for k, (c, s) in enumerate(zip(widths, sides, strict=True))]
    teacher = [randn(2, c, s, s, seed=9 + k) for k, (c, s) in enumerate(zip(teacher_widths, sides, strict=True))]
    torch.manual_seed(0)
    term = ReviewKD(widths, [teacher_widths], width=3)
    fusions = []
    for stage in range(3):
        theirs = wrapper.AttentionBasedFusion(widths[stage], 3, teacher_widths[stage], uses_attention=stage < 2)
        state = term.get_submodule(f"fusions.0.{stage}").state_dict()
        for name, other in zip(names, ("conv1", "attention_conv.0", "conv2"), strict=True):
            state = {key.replace(name, other): value for key, value in state.items()}
        theirs.load_state_dict(state)
        fusions.append(theirs.double())

    def review(x: Tensor) -> Tensor:
        student = [*(m.double() for m in maps[:varied]), x, *(m.double() for m in maps[varied + 1 :])]
        out, deeper = fusions[2](student[2])
        total = call(context(), (out, deeper), teacher[2].double())
        for stage in (1, 0):
            out, deeper = fusions[stage](student[stage], deeper, sides[stage])
            total = total + call(context(), (out, deeper), teacher[stage].double())
        return total

    check(lambda x: run(term, [*maps[:varied], x, *maps[varied + 1 :]], teacher), review, maps[varied])


def test_the_partial_l2_of_signs_is_their_loss_of_activation_boundaries() -> None:
    student, teacher, margin = 2 * randn(3, 4, 4, 4), randn(3, 4, 4, 4, seed=1), 1.0
    module = losses.AltActTransferLoss({"pair": PAIR}, margin=margin, reduction="mean")
    # Theirs asks only on which side of 0 the teacher is: a positive target becomes the margin, another its opposite.
    signs = torch.where(teacher > 0, margin, -margin)

    def ours(x: Tensor) -> Tensor:
        # Theirs counts no student that lies above the margin of a positive target; ours pulls it down.
        reached = torch.where(teacher > 0, x.clamp(max=margin), x)
        return partial_l2(reached, signs, torch.full((4,), -margin)) / len(x)  # ours is a sum, theirs the batch's mean

    check(ours, lambda x: call(module, x, teacher.double()), student)
