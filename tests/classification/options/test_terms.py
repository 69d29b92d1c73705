from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from classification.errors import UserError
from classification.options.config import parse
from classification.options.options import Options
from classification.options.published import without_aliases
from classification.options.terms import Schedule, names_of
from mgd.losses import LOSSES


def distillation(*words: str, recipe: str | None = None, folder: Path | None = None) -> Options:
    config = []
    if recipe is not None:
        assert folder is not None
        (folder / "recipe.yaml").write_text(recipe)
        config = ["--config", str(folder / "recipe.yaml")]
    return parse(["DIR", *config, *words], "main_mgd.py", distillation=True)


def test_cross_entropy_is_a_term_unless_labels_are_left_out() -> None:
    assert list(distillation().table) == ["ce", "mgd"]
    assert list(distillation("--distiller", "mgd+kd").table) == ["ce", "mgd", "kd"]
    args = distillation("--distiller", "kd", "--labels", "0")
    assert list(args.table) == ["kd"] and args.labels == "none"


def test_weights_follow_the_epoch() -> None:
    def over(schedule: Schedule, own: float, epochs: int = 5) -> list[float]:
        return [schedule.at(own, 10, epoch) for epoch in range(epochs)]

    assert over(Schedule(), 2.0, 10) == [2.0] * 10 and over(Schedule(weight=3), 2.0) == [3.0] * 5
    assert over(Schedule(warmup=4), 2.0) == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert over(Schedule(start=2, stop=4), 1.0) == [0, 0, 1, 1, 0]
    assert over(Schedule(start=2, warmup=2), 1.0) == [0, 0, 0.5, 1, 1]
    assert Schedule(decay="linear").at(4.0, 8, 6) == 1.0
    assert Schedule(decay="cosine").at(4.0, 8, 4) == pytest.approx(2.0)


def said(args: Options, *usual: str) -> dict[str, dict[str, object]]:
    """What the terms of a run have that is not usual; and what is usual of the keys named."""
    found = {}
    for name, spec in args.table.items():
        plain = dataclasses.asdict(spec.kind.Hyper())
        found[name] = {k: v for k, v in spec.record().items() if k in usual or plain.get(k, "none") != v}
    return found


def test_a_recipe_lists_terms_with_weights_and_schedules(tmp_path: Path) -> None:
    recipe = """
    student: {arch: resnet18}
    teachers: [{arch: resnet34, weights: IMAGENET1K_V1, frozen: true}]
    terms:
      ce: {weight: 0.5, label_smoothing: 0.1}
      mgd: {weight: 1.0e-4, reducer: sp, update_freq: 1, decay: linear}
      kd: {temperature: 2, warmup: 5}
    """
    args = distillation(recipe=recipe, folder=tmp_path)
    assert (args.networks.arch, args.teachers[0]["arch"], args.distiller) == ("resnet18", "resnet34", "mgd+kd")
    assert said(args) == {
        "ce": {"weight": 0.5, "label_smoothing": 0.1},
        "mgd": {"weight": 1e-4, "decay": "linear", "reducer": "sp", "update_freq": 1},
        "kd": {"warmup": 5, "temperature": 2},
    }
    assert args.labels == "true"
    typed = distillation("--distiller", "kd", "--term", "kd.warmup=7", recipe=recipe, folder=tmp_path)
    assert said(typed) == {"ce": {"weight": 0.5, "label_smoothing": 0.1}, "kd": {"warmup": 7, "temperature": 2}}


def test_what_is_typed_wins_over_a_recipe(tmp_path: Path) -> None:
    recipe = "terms: {ce: {label_smoothing: 0.2}, kd: {weight: 0.5, standardised: true}, mgd: {weight: 1}}"
    words = ("--kd-weight", "3", "--label-smoothing", "0", "--loss-factor", "10")
    args = distillation(*words, recipe=recipe, folder=tmp_path)
    assert said(args, "label_smoothing") == {
        "ce": {"label_smoothing": 0},
        "kd": {"weight": 3, "standardised": True, "temperature": 1.5},
        "mgd": {"loss_factor": 10},
    }
    args = distillation("--kd-weight", "3", "--term", "kd.weight=4", recipe=recipe, folder=tmp_path)
    assert args.table["kd"].schedule.weight == 4 and said(args)["mgd"] == {"weight": 1}


def test_a_file_of_the_student_stands_in_for_a_recipes_download(tmp_path: Path) -> None:
    recipe = "student: {arch: resnet50, pretrained: true}"
    args = distillation("--student-resume", "S.pth", recipe=recipe, folder=tmp_path)
    assert args.networks.student_resume == "S.pth" and not args.networks.pretrained
    with pytest.raises(UserError, match="exclude each other"):
        distillation("--student-resume", "S.pth", "--pretrained", recipe=recipe, folder=tmp_path)


def test_a_recipe_without_ce_needs_no_labels(tmp_path: Path) -> None:
    args = distillation(recipe="terms: {kd: {temperature: 2}}", folder=tmp_path)
    assert list(args.table) == ["kd"] and args.labels == "none"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--distiller nothing", "unknown distiller 'nothing': use one of afd, at"),
        ("--distiller ce", "ce is added automatically if labels are used"),
        ("--distiller kd+", "has an empty term: write a sum such as mgd\\+kd"),
        ("--distiller kd --term kd.start=100", "the term kd never acts: it starts in epoch 100"),
        ("--distiller kd --labels 0 --term kd.start=1", "no term acts in epoch 0"),
        ("--distiller kd --labels 0 --term kd.stop=7 --epochs 1000000000", "no term acts in epoch 7"),
        ("--distiller kd --term kd.teacher_weights=[1]", "term kd has no 'teacher_weights'"),
        ("--distiller kd+kd", "names a term twice"),
        ("--term kd.weight=2", "this run has the terms ce, mgd, but no kd"),
        ("--term weight", "expected NAME.KEY=VALUE"),
        ("--term mgd.weigth=2", "term mgd has no 'weigth': it takes weight.*close ones are weight"),
        ("--term mgd.reducer=spp", "mgd.reducer must be one of amp, sp, sp_mean, rd, sm, linear or null; got 'spp'"),
        ("--mgd-reducer sm --mgd-capacity spread", "term mgd: reducer 'sm' matches one to one"),
        ("--mgd-capacity soft --mgd-reducer amp", "makes weighted sums: reducer must be 'linear', not 'amp'"),
        ("--mgd-groups teacher --mgd-capacity single", "takes the capacity 'spread' or 'truncate', not 'single'"),
        ("--mgd-groups teacher --mgd-reducer sm", "takes the capacity 'spread' or 'truncate', not 'single'"),
        ("--mgd-groups teacher --mgd-capacity soft", "takes the capacity 'spread' or 'truncate', not 'soft'"),
        ("--mgd-across 1 --mgd-assignment random", "across follows the costs: assignment must be 'cheapest'"),
        ("--mgd-cost gradient --mgd-observe online", "takes a pass of its own: observe must be 'pass'"),
        ("--distiller ofd --mgd-groups teacher", "--mgd-groups has no effect here: it works only with init flow"),
        ("--distiller kd --mgd-cost correlation", "--mgd-cost has no effect here: it works only with the term mgd"),
        ("--distiller ofd --term ofd.init=flow --mgd-capacity soft", "ofd.capacity must be one of spread, truncate"),
        ("--term mgd.epsilon=0.2", r"--term mgd.epsilon=0.2 has no effect here: it works only with the capacity soft"),
        ("--mgd-capacity soft --term mgd.penalty=2", "penalty=2 has no effect here.*the capacity unbalanced"),
        ("--term ce.views=all", "ce.views=all has no effect here: it works only with a term that compares two views"),
        ("--distiller mlkd --term mlkd.second=0 --term ce.views=all", "ce.views=all has no effect here"),
        ("--distiller ofd --term ofd.cost=correlation", "cost=correlation has no effect here.*init flow"),
        (
            "--mgd-observe online --mgd-update-freq 0",
            "term mgd: observe 'online' needs an update_freq of at",
        ),
        ("--distiller fitnet --term fitnet.tap=first", "fitnet.tap must be a whole number or null; got 'first'"),
        ("--term mgd.stage_weights=[a]", "mgd.stage_weights must be a list of numbers or null"),
        ("--term ce.label_smoothing=1", "term ce: label_smoothing must be at least 0 and below 1; got 1"),
        ("--distiller kd --term kd.temperature=true", "kd.temperature must be a number; got True"),
        ("--term mgd.weight=-1", "at least 0; got -1"),
        ("--term mgd.weight=much", "mgd.weight must be a number or null; got 'much'"),
        ("--term mgd.decay=fast", "must be one of constant, linear, cosine; got 'fast'"),
        ("--term ce.smoothing=0.1", "term ce has no 'smoothing': it takes weight.*close ones are label_smoothing"),
        (
            "--teacher-arch resnet18,resnet34 --teacher-resume a",
            r"as many files as there are teachers, 2 \(resnet18, resnet34\), .*; got 1$",
        ),
        ("--distiller kd --labels 0 --label-smoothing 0.1", "--label-smoothing has no effect"),
    ],
)
def test_terms_that_make_no_sense_are_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        distillation(*words.split())


def test_numbers_with_an_exponent_are_numbers_in_lists_too() -> None:
    words = "--distiller mlkd --term mlkd.temperatures=[1e-3,2] --term mlkd.weight=1e-4"
    table = distillation(*words.split()).table
    assert table["mlkd"].hyper.temperatures == (1e-3, 2.0) and table["mlkd"].schedule.weight == 1e-4


@pytest.mark.parametrize("capacity", ["soft", "unbalanced"])
def test_a_soft_capacity_is_that_of_the_matching_not_of_terms_that_start_from_pairs(capacity: str) -> None:
    words = f"--distiller ofd+mgd --term ofd.init=flow --mgd-capacity {capacity} --term mgd.epsilon=0.2"
    table = distillation(*words.split()).table
    assert table["mgd"].hyper.capacity == capacity and table["ofd"].hyper.capacity == "spread"
    words = "--distiller ofd+mgd --term ofd.init=flow --mgd-capacity truncate"
    both = distillation(*words.split()).table
    assert both["ofd"].hyper.capacity == both["mgd"].hyper.capacity == "truncate"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("terms: [ce]", "terms must be a mapping"),
        ("terms: {ce: 1}", r"terms\.ce must be a mapping; got 1"),
        ("terms: {mgd: {reducr: sp}}", "close ones are reducer"),
        ("terms: {wrong: {}}", "unknown distiller 'wrong'"),
        ("student: resnet18", "student must be a mapping"),
        ("student: {archh: resnet18}", "student has no 'archh': it takes arch"),
        ("teachers: {arch: resnet18}", "teachers must be a list"),
        ("teachers: [{weight: 1}]", "a teacher needs an arch"),
        ("teachers: [{arch: resnet18, mean: 3}]", "mean of a teacher must be three numbers"),
        (
            "teachers: [{arch: resnet18, frozen: false}]",
            "only mutual learning, for example dml, trains several networks",
        ),
    ],
)
def test_recipes_that_make_no_sense_are_refused(recipe: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        distillation(recipe=recipe, folder=tmp_path)


ONE = "teachers: [{arch: resnet18, %s}]"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("mgd_reducer: sp\ndistiller: kd", "mgd_reducer has no effect: it works only with the term mgd"),
        (
            "mgd-update-freq: 1\nterms: {ce: {}, kd: {}}",
            "mgd-update-freq has no effect: it works only with the term mgd",
        ),
        ("mgd-solver: scipy\ndistiller: ofd", "mgd-solver has no effect: it works only with init flow"),
        ("kd_weight: 2", "kd_weight has no effect: it works only with the term kd"),
        ("taps: layer1\nterms: {ce: {}, kd: {}}", "taps has no effect: it works only with a term that reads maps"),
        (
            "lr-drop-epochs: [3]\nlr-schedule: cosine",
            "lr-drop-epochs has no effect: it works only with --lr-schedule step",
        ),
        ("warmup-epochs: 3", "warmup-epochs has no effect: it works only with --warmup 1"),
        ("mgd-form: relative\nloss-factor: 3", "loss-factor has no effect: it works only with the form sum"),
        ("terms: {mgd: {form: mean}}\nloss-factor: 3", "loss-factor has no effect: it works only with the form sum"),
        ("mgd-weight: 3", "mgd-weight has no effect: it works only with the form mean or relative"),
        ("label-smoothing: 0.1\nterms: {kd: {}}", "label-smoothing has no effect: it works only with the term ce"),
        ("terms: {ce: {}, kd: {weight: 2}}\nkd-weight: 3", "kd-weight has no effect: terms.kd.weight says the same"),
        ("terms: {mgd: {weight: 2}}\nloss-factor: 3", "loss-factor has no effect: terms.mgd.weight says the same"),
        ("terms: {kd: {weight: 2}}\nterm: [kd.weight=3]", "terms.kd.weight has no effect: term kd.weight=3 says"),
        ("terms: {ce: {weight: 2}, kd: {}}\nlabels: 0", "terms.ce has no effect: labels is none"),
        (ONE % "weight: 2", r"teachers\[0\].weight has no effect: there is one teacher"),
        (ONE % "resume: a, weights: b", r"teachers\[0\].weights has no effect: its weights are those of a file"),
        ((ONE % "resume: a") + "\nteacher-resume: b", r"teachers\[0\].resume has no effect: teacher-resume says"),
        ("teachers: [{arch: timm:resnet18, weights: a}]", r"teachers\[0\].weights has no effect: timm names"),
        ("terms: {ce: {}, kd: {}}\nmgd-with-kd: 1", "--mgd-with-kd 1 needs the term mgd"),
    ],
)
def test_keys_of_a_recipe_that_would_change_nothing_are_refused(recipe: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        distillation(recipe=recipe, folder=tmp_path)
    assert "has no effect" not in message or str(error.value).startswith(f"recipe {tmp_path / 'recipe.yaml'}: ")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("mgd_reducer: sp", "--distiller kd"),
        ("lr-drop-epochs: [3]", "--lr-schedule cosine"),
        ("warmup: 1\nwarmup-epochs: 3", "--warmup 0"),
        ("terms: {ce: {}, kd: {temperature: 2}}", "--distiller dkd"),
        (ONE % "resume: a", "--teacher-resume b"),
        (ONE % "weights: IMAGENET1K_V1", "--teacher-resume b"),
        ("terms: {ce: {weight: 2}, kd: {}}", "--labels 0"),
        ("terms: {ce: {}, kd: {weight: 2}}", "--kd-weight 3"),
    ],
)
def test_keys_that_the_command_line_leaves_without_effect_are_not(recipe: str, words: str, tmp_path: Path) -> None:
    distillation(*words.split(), recipe=recipe, folder=tmp_path)


def test_a_key_may_wait_for_the_command_line(tmp_path: Path) -> None:
    args = distillation(*["--distiller", "kd"], recipe="kd-temperature: 3", folder=tmp_path)
    assert args.table["kd"].hyper.temperature == 3


@pytest.mark.parametrize(
    ("word", "labels"),
    [("0", "none"), ("1", "true"), ("none", "none"), ("true", "true"), ("True", "true"), ("false", "none")],
)
def test_labels_are_words_or_as_they_were_before(word: str, labels: str, tmp_path: Path) -> None:
    assert distillation("--distiller", "kd", "--labels", word).labels == labels
    assert distillation("--distiller", "kd", recipe=f"labels: {word}", folder=tmp_path).labels == labels


@pytest.mark.parametrize(("then", "now"), [(0, "none"), (1, "true"), ("pseudo", "pseudo")])
def test_a_run_of_before_recorded_labels_as_a_number(then: object, now: str) -> None:
    assert without_aliases({"labels": then, "terms": {}})[0] == {"labels": now, "terms": {}}


def test_kd_joins_the_terms_of_a_recipe(tmp_path: Path) -> None:
    args = distillation("--mgd-with-kd", "1", recipe="terms: {ce: {}, mgd: {}}", folder=tmp_path)
    assert list(args.table) == ["ce", "mgd", "kd"]


def test_sums_are_spelt_out() -> None:
    assert names_of("mgd+kd", LOSSES) == ["mgd", "kd"]
