"""Terms, teachers and taps that do not go together."""

from __future__ import annotations

from classification import main_mgd
from tests.classification.refusals import Case, Place
from tests.classification.refusals.recipes import recipe


def without(place: Place, *more: str, teacher: bool = True) -> list[str]:
    """A distillation without the options of mgd; without its teacher too where that is asked for."""
    data, *words = place.distil()
    kept = ("-a", *(("--teacher-arch", "--teacher-resume") if teacher else ()))
    pairs = [words[at : at + 2] for at, word in enumerate(words) if word in kept]
    return [data, *(word for pair in pairs for word in pair), "--img-size", "16", *more]


def case(what: str, *more: str, teacher: bool = True) -> Case:
    return Case(what, lambda p: without(p, *more, teacher=teacher), main_mgd)


def peer(what: str, keys: str) -> Case:
    """Mutual learning by a recipe with a peer of these keys."""
    content = f"teachers: [{{arch: cifar_resnet8, {keys}}}]\nterms: {{ce: , dml: }}\n"
    return Case(what, lambda p: without(p, "--config", p.write("r.yaml", content), teacher=False), main_mgd)


TWO_AND_ONE = ("--student-taps", "layer2,layer3", "--teacher-taps", "layer3")
CASES = [
    case("a term that is not there", "--distiller", "dsit"),
    case("a weight for a term that is not there", "--distiller", "dist", "--term", "dkd.weight=2"),
    case("a hyper-parameter of another term", "--distiller", "dist", "--term", "dist.alpha=2"),
    case("cross-entropy by name", "--distiller", "ce+kd"),
    case("a term of labels without labels", "--distiller", "wsl", "--labels", "0"),
    case("mutual learning in the place of a frozen teacher", "--distiller", "dml+mgd", teacher=False),
    case("a term that starts behind the last epoch", "--distiller", "kd", "--epochs", "2", "--term", "kd.start=2"),
    case("an epoch without any term", "--distiller", "kd", "--labels", "0", "--term", "kd.start=1"),
    case("weights of teachers by --term", "--distiller", "kd", "--term", "kd.teacher_weights=[1,2]"),
    case("a map term at what is no map", "--distiller", "at", "--taps", "linear"),
    case("a teacher's number type for peers", "--distiller", "dml", "--teacher-dtype", "float32", teacher=False),
    Case("a recipe of no terms", **recipe("terms: {}\n")),
    case("one teacher as several", "--distiller", "kd", "--teacher-mean", "probabilities"),
    Case("a map with its channels last", lambda p: [
        str(p.photos), "-a", "torchvision:swin_t", "--img-size", "32", "--distiller", "udml",
        "--teacher-arch", "torchvision:swin_t", "--taps", "features.3",
    ], main_mgd),
    case("taps that are not there", "--distiller", "at", "--taps", "layer9"),
    case("more taps of the student", "--distiller", "at", *TWO_AND_ONE),
    case("taps where no term reads maps", "--distiller", "kd", "--taps", "layer3"),
    peer("a frozen peer", "frozen: true"),
    peer("a peer with weights of its own", "frozen: false, weights: V1"),
    Case("a term of labels on images without", **recipe("terms: {wsl: }\nlabels: 0\n")),
]  # fmt: skip
