from __future__ import annotations

import math
import re
import subprocess
from dataclasses import replace
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import nn

from classification.data.folders import DataFolder
from classification.errors import UserError
from classification.models import build, pretrained_source
from classification.options import config
from classification.options.config import _commit, learning_rate, parse, total_epochs
from classification.options.options import Options, recorded
from classification.options.terms import needing, using
from classification.runs.world import Seed
from classification.training.job import Job
from classification.training.tapping import tap
from mgd import Batch, Outputs, Probe, probe
from mgd.losses import ChannelMatching
from tests.mgd.nets import Seen

RECIPES = Path(config.__file__).parents[1] / "recipes"


def distillation(*words: str) -> Options:
    return parse(["DIR", *words], "main_mgd.py", distillation=True)


def test_defaults_are_the_published_ones() -> None:
    args = distillation()
    published = {
        "arch": "resnet18",
        "epochs": 100,
        "start_epoch": 0,
        "batch_size": 256,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "print_freq": None,
        "world_size": -1,
        "rank": -1,
        "lr_drop_ratio": 0.1,
        "lr_drop_epochs": [31, 61, 81],
        "use_pretrained": 0,
        "distiller": "mgd",
        "mgd_with_kd": 0,
        "sync_bn": 0,
        "warmup": 0,
        "warmup_epochs": 10,
        "img_size": None,  # that of the weights, or 224
    }
    found = recorded(args)
    assert {name: found[name] for name in published} == published
    mgd = args.table["mgd"].hyper
    assert (mgd.reducer, mgd.update_freq, mgd.used_capacity(), mgd.max_images) == ("amp", 2, "spread", 20_000)
    assert ChannelMatching([1], [1], [None], mgd).weight == 1e-4  # one over the loss factor
    kd = distillation("--mgd-with-kd", "1").table["kd"]
    assert (kd.hyper.temperature, kd.kind.weight, kd.schedule.weight) == (1.5, 1.0, None)


def test_what_one_option_implies_of_another() -> None:
    assert distillation("--mgd-reducer", "sm").table["mgd"].hyper.used_capacity() == "single"
    assert distillation("--distiller", "kd").table["kd"].hyper.temperature == 4.0
    assert distillation("--mgd-with-kd", "1").distiller == distillation("--distiller", "mgd+kd").distiller == "mgd+kd"
    assert distillation("--taps", "a,b").teacher_taps == "a,b"


def test_published_schedule() -> None:
    args = distillation("--warmup", "1", "--epochs", "120")
    assert total_epochs(args.optimisation) == 130
    rates = [learning_rate(args.optimisation, epoch, 0.5) for epoch in range(130)]
    assert rates[0] == pytest.approx(0.01) and rates[5] == pytest.approx(0.055) and rates[10] == pytest.approx(0.1)
    drops = [epoch for epoch in range(11, 130) if rates[epoch] < 0.5 * rates[epoch - 1]]
    assert drops == [41, 71, 91] and rates[-1] == pytest.approx(1e-4)


def test_cosine_ends_at_zero() -> None:
    args = distillation("--lr-schedule", "cosine", "--epochs", "20")
    assert learning_rate(args.optimisation, 0, 0.0) == 0.1
    assert learning_rate(args.optimisation, 10, 0.0) == pytest.approx(0.05)
    assert learning_rate(args.optimisation, 19, 1.0) == pytest.approx(0, abs=1e-12)


def test_a_recipe_stands_in_for_defaults_and_the_command_line_wins(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("arch: mobilenet_v1\nlr_drop_epochs: [3, 5]\nmgd-reducer: sp\nepochs: 7\nevaluate: true\n")
    args = distillation("--config", str(recipe), "--epochs", "9")
    assert (args.networks.arch, args.optimisation.lr_drop_epochs) == ("mobilenet_v1", (3, 5))
    assert (args.terms.mgd_reducer, args.optimisation.epochs) == ("sp", 9)
    assert args.run.evaluate and args.data.data == "DIR"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("archh: resnet18", "unknown key 'archh'; close ones are arch"),
        ("epochs: many", "whole number.*'many'"),
        ("epochs: 0", "at least 1"),
        ("mgd_reducer: max", "choose from"),
        ("evaluate: 3", "true or false"),
        ("- arch", "must be a mapping"),
        ("arch: [", "not YAML"),
        ("arch: !!python/object/apply:os.system [ls]", "not YAML"),
        ("help: true", "unknown key 'help'"),
        ("output: null", "output needs a value"),
        ("epochs: {a: 1}", "epochs needs a value"),
    ],
)
def test_a_wrong_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        distillation("--config", str(tmp_path / "r.yaml"))


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        distillation("--config", str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr 0", "above 0"),
        ("--lr nan", "above 0.*'nan'"),
        ("--lr -0.1", "above 0"),
        ("-b 0", "at least 1"),
        ("-b 1.5", "whole number"),
        ("--epochs -3", "at least 1"),
        ("--momentum 1", "at most"),
        ("--wd -1", "at least 0"),
        ("--img-size 4", "at least 8"),
        ("--loss-factor 0", "above 0"),
        ("--kd-temperature inf", "above 0"),
        ("--label-smoothing 1", "at most"),
        ("--mgd-update-freq -1", "at least 0"),
        ("--start-epoch 100", "nothing to train"),
        ("--lr-drop-epochs 5 3", "must rise"),
        ("--mgd-reducr amp", "close ones are --mgd-reducer"),
        ("--mgd-reducer max", "choose from"),
        ("--distiller mgdd", "close ones are mgd"),
        ("--distiller kd --mgd-with-kd 1", "needs the term mgd"),
        ("--mgd-reducer sm --mgd-capacity spread", "capacity must be 'single', not 'spread'"),
        ("--device tpu9000", "unknown device"),
        ("--world-size 2", "--rank between 0 and 1"),
        ("--world-size 2 --rank 2", "--rank between 0 and 1"),
        ("--world-size 0", "positive"),
        ("--pretrained --student-resume b", "exclude"),
        ("--taps a --student-taps b", "leave"),
        ("--rank 1", "--rank between 0 and 0"),
        ("--rank -7", "--rank between"),
        ("--multiprocessing-distributed --rank 3", "--rank between 0 and 0"),
        ("--device meta", "not supported"),
        ("--device cpu --multiprocessing-distributed --gpu 0", "this machine has|exclude"),
        ("--seed 99999999999999999999", "at most"),
        ("--distiller kd --mgd-reducer sp", "--mgd-reducer has no effect here: it works only with the term mgd"),
        ("--distiller ofd --mgd-solver scipy", "it works only with init flow"),
        ("--distiller ofd --term ofd.init=flow --mgd-update-freq 2", "--mgd-update-freq has no effect"),
        (
            "--distiller dml+ofd --term ofd.init=flow",
            "ofd matches a student to a frozen teacher",
        ),
        ("--distiller kd --taps a", "--taps has no effect"),
        ("--kd-weight 2", "--kd-weight has no effect here"),
        ("--lr-schedule cosine --lr-drop-epochs 3", "--lr-schedule step"),
        ("--warmup-epochs 3", "--warmup 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        distillation(*words.split())


@pytest.mark.parametrize("words", ["--gpu 99", "--device cuda:99"])
def test_a_gpu_that_is_not_there_is_refused(words: str) -> None:
    with pytest.raises(UserError, match="this machine has"):
        distillation(*words.split())


def test_main_base_refuses_what_has_no_effect_there() -> None:
    with pytest.raises(UserError, match=r"--labels has no effect here: it works only with main_mgd\.py"):
        parse(["DIR", "--labels", "0"], "main_base.py", distillation=False)
    with pytest.raises(UserError, match="--mgd-reducer"):
        parse(["DIR", "--mgd-reducer", "amp"], "main_base.py", distillation=False)
    message = "argument --lr/--learning-rate: expected a number above 0; got 'nan'"
    with pytest.raises(UserError) as caught:
        distillation("--lr", "nan")
    assert str(caught.value) == message  # no hint of other options
    with pytest.raises(UserError, match=r"main_mgd\.py"):
        parse(["DIR", "--teacher-resume", "x"], "main_base.py", distillation=False)
    assert math.isclose(parse(["DIR"], "main_base.py", distillation=False).optimisation.lr, 0.1)


RECIPE = pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)


def head_of(recipe: Path) -> str:
    """The comment that a recipe opens with."""
    return "\n".join(takewhile(lambda line: line.startswith("#"), recipe.read_text().splitlines()))


@RECIPE
def test_every_recipe_is_read_and_says_where_it_comes_from(recipe: Path) -> None:
    args, content, head = distillation("--config", str(recipe)), yaml.safe_load(recipe.read_text()), head_of(recipe)
    assert all(word in head for word in ("Source:", "Published", "python main_mgd.py", "Hardware"))
    assert f"--config recipes/{recipe.name}" in head
    assert "ot run here" in head or "README" in head or "docs/results/quality.md" in head
    if "terms" in content:  # none left out, none added; its weights and its arch are those of the run
        assert list(args.table) == list(content["terms"])
        assert args.networks.arch == content["student"]["arch"]
        for name, entry in content["terms"].items():
            assert args.table[name].schedule.weight == entry["weight"]
    if "--teacher-resume" in head and "terms" in content:  # its teacher cannot be downloaded: the file must be heeded
        typed = distillation("--config", str(recipe), "--teacher-resume", "TEACHER.pth")
        assert [teacher["resume"] for teacher in typed.teachers] == ["TEACHER.pth"]


@pytest.mark.parametrize(
    ("term", "weight", "batch", "rate"),
    [
        ("masked_generative", 7e-5 * 2048 * 7 * 7, 256, 0.1),
        ("at", 1000, 512, 0.2),
        ("ofd", 1e-4, 128, 0.05),
        ("wsl", 2.5, 256, 0.1),
        ("crd", 0.8, 256, 0.1),
        ("dkd", 1, 512, 0.2),
        ("reviewkd", 8, 256, 0.1),
    ],
)
def test_recipes_of_mobilenet_have_the_numbers_of_their_sources(
    term: str, weight: float, batch: int, rate: float
) -> None:
    args = distillation("--config", str(RECIPES / f"imagenet_mobilenet_v1_{term}.yaml"))
    assert args.table[term].schedule.weight == pytest.approx(weight, rel=1e-3)
    rates = args.optimisation
    assert (rates.batch_size, rates.lr, rates.epochs, rates.lr_drop_epochs) == (batch, rate, 100, (30, 60, 90))


@cache
def network(arch: str, num_classes: int, position: int) -> nn.Module:
    """One network for all recipes; the position keeps two peers of one arch apart."""
    torch.manual_seed(position)
    return build(arch, num_classes)


@RECIPE
def test_the_terms_of_every_recipe_fit_its_networks(recipe: Path) -> None:
    args, content = distillation("--config", str(recipe)), yaml.safe_load(recipe.read_text())
    if not {"terms", "distiller"} & set(content):
        pytest.skip("it leaves distillation to the command line")
    size = 32 if args.data.img_size == 32 else 64
    archs = [args.networks.arch, *(teacher["arch"] for teacher in args.teachers)]
    torch.manual_seed(0)
    # Three images: two are at one distance, and RKD has nothing to compare.
    outputs = [Outputs(torch.randn(3, 7, requires_grad=True)), *(Outputs(torch.randn(3, 7)) for _ in args.teachers)]
    probes = [Probe(output) for output in outputs]
    if using(args.table, "maps"):
        student, *teachers = (network(arch, 7, position) for position, arch in enumerate(archs))
        specs = [dict(teacher) for teacher in args.teachers]
        job = Job(args, Seed(0, True), DataFolder([], [], []), student, teachers, archs[0], specs)
        job.teacher_preprocessing = [job.preprocessing for _ in teachers]  # as where teachers are found
        tapped = tap(job)
        images = torch.randn(3, 3, size, size)
        probes = [probe(taps, images) for taps in tapped]
        outputs = [found.outputs for found in probes]
        for taps in tapped:
            taps.close()
    else:  # logits will do: the names are looked up, and the large networks among them not built
        for arch in archs:
            assert not arch.startswith("timm:") or arch.removeprefix("timm:") in timm.list_pretrained()
            pretrained_source(arch)
    if needing(args.table, "views"):
        outputs = [replace(output, more=(output,)) for output in outputs]
    batch = Batch(torch.tensor([0, 1, 2]), torch.tensor([3, 8, 5]))
    for spec in args.table.values():
        term = spec.kind.build(probes[0], probes[1:], 10, spec.hyper)
        term.update(0, Seen([(outputs[0], outputs[1:])]))
        value = term(outputs[0], outputs[1:], batch)
        assert value.shape == () and value.isfinite() and value > 0


def test_options_of_another_form_of_the_matching_term_are_refused() -> None:
    with pytest.raises(UserError, match="--loss-factor has no effect"):
        distillation("--mgd-form", "mean", "--loss-factor", "3")
    with pytest.raises(UserError, match="--mgd-weight has no effect"):
        distillation("--mgd-weight", "3")


def test_the_published_imagenet_run_is_its_recipe() -> None:
    recipe = recorded(distillation("--config", str(RECIPES / "imagenet_mobilenet_v1_mgd.yaml")))
    words = "--arch mobilenet_v1 --epochs 120 --batch-size 256 --learning-rate 0.1 --mgd-update-freq 1 --warmup 1"
    typed = recorded(distillation(*words.split()))
    same = set(recipe) - {"config", "command"}
    assert {name: recipe[name] for name in same} == {name: typed[name] for name in same}


def test_a_commit_is_dirty_where_code_differs_and_not_where_results_do(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    assert _commit(tmp_path) is None
    for name in ("code.py", "result.json"):
        (tmp_path / name).write_text("1\n")
    git("init")
    git("add", "-A")
    git("commit", "-m", "one")
    clean = _commit(tmp_path)
    assert clean is not None and re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "result.json").write_text("2\n")
    assert _commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("2\n")
    assert _commit(tmp_path) == f"{clean}-dirty"


@pytest.mark.parametrize(
    ("recipe", "distils"),
    [
        ("warmup-epochs: 3", False),
        ("warmup-epochs: 3\nteacher-mean: probabilities\nterms: {kd: {}}\nteachers: [{arch: a}, {arch: b}]", True),
    ],
)
def test_recipes_of_any_script_and_number_of_teachers_are_checked(recipe: str, distils: bool, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(recipe)
    with pytest.raises(UserError, match="warmup-epochs has no effect: it works only with --warmup 1"):
        parse(["DIR", "--config", str(tmp_path / "r.yaml")], "main.py", distillation=distils)


def test_a_recipe_of_this_project_goes_by_its_name() -> None:
    by_name = parse(["photos", "--config", "recommended"], "main_mgd.py", distillation=True)
    by_file = parse(["photos", "--config", str(RECIPES / "recommended.yaml")], "main_mgd.py", distillation=True)
    assert by_name.table == by_file.table and set(by_name.table) == {"ce", "mgd", "kd"}
    with pytest.raises(UserError, match=r"cannot be read: No such file.*; close ones of this project are recommended$"):
        parse(["photos", "--config", "recomended"], "main_mgd.py", distillation=True)


def test_an_installed_copy_has_no_commit_of_the_project_around_it(tmp_path: Path) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    root = tmp_path / "lib" / "site-packages"
    root.mkdir(parents=True)
    assert _commit(root.parent) is not None and _commit(root) is None
