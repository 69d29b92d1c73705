"""Options that make no sense, or not beside each other."""

from __future__ import annotations

from classification import main_mgd
from tests.classification.refusals import Case, Place


def one_image(place: Place) -> list[str]:
    """A batch norm over one image of one pixel has nothing to compare."""
    return place.base("-a", "resnet18", "-b", "1")


CASES = [
    Case("an option with a typing mistake", lambda p: p.distil("--mgd-reducr", "amp"), main_mgd, process=True),
    Case("an option of the other script", lambda p: p.base("--mgd-reducer", "amp")),
    Case("a rate that is no number", lambda p: p.base("--lr", "nan")),
    Case("a batch without images", lambda p: p.base("-b", "0")),
    Case("images of a million px", lambda p: p.base("--img-size", "1000000")),
    Case("a million loading processes", lambda p: p.base("-j", "1000000")),
    Case("drops of the rate that do not rise", lambda p: p.base("--lr-drop-epochs", "5", "3")),
    Case("a start behind the last epoch", lambda p: p.base("--start-epoch", "7")),
    Case("fewer classes than class folders", lambda p: p.base("--num-classes", "2")),
    Case("a network that no rule makes", lambda p: p.base("-a", "cifar_resnet9")),
    Case("a network of 999,999,998 layers", lambda p: p.base("-a", "cifar_resnet999999998")),
    Case("a network that does not run at this size", lambda p: p.base("-a", "timm:levit_128s", "--img-size", "16")),
    Case("a device that is none", lambda p: p.base("--device", "tpu9000")),
    Case("ranks without a number", lambda p: p.base("--world-size", "2")),
    Case("an empty name of a file, as of an unset variable", lambda p: p.base("--student-resume", "")),
    Case("a teacher for main_base.py", lambda p: p.base("--teacher-resume", str(p.teacher))),
    Case("the same term twice", lambda p: p.distil("--distiller", "kd+kd"), main_mgd),
    Case("an option that has no effect", lambda p: p.distil("--distiller", "kd", "--mgd-reducer", "sp"), main_mgd),
    Case(
        "equally frequent classes of images without labels",
        lambda p: p.distil("--distiller", "kd", "--labels", "0", "--sampler", "balanced"),
        main_mgd,
    ),
    Case(
        "weights of classes without cross-entropy",
        lambda p: p.distil("--distiller", "kd", "--labels", "0", "--class-weights", "balanced"),
        main_mgd,
    ),
    Case("more parts than a batch has images", lambda p: p.base("-b", "4", "--accumulate", "5")),
    Case("more repetitions than a batch has images", lambda p: p.base("-b", "4", "--repeats", "5")),
    Case("a norm of 0 for gradients", lambda p: p.base("--clip-gradients", "0")),
    Case("a strength of RandAugment that there is not", lambda p: p.base("--randaugment", "31")),
    Case("a share of erased images above 1", lambda p: p.base("--random-erasing", "2")),
    Case("an optimizer that is not there", lambda p: p.base("--optimizer", "adam")),
    Case("a tracker that is not there", lambda p: p.base("--track", "wandb")),
    Case(
        "mixed images for a term of one class",
        lambda p: p.distil("--distiller", "dkd", "--cutmix", "1"),
        main_mgd,
    ),
    Case("a term's value that is no YAML", lambda p: p.distil("--term", "mgd.weight=["), main_mgd),
    Case(
        "a term's value of another kind",
        lambda p: p.distil("--distiller", "dkd", "--term", "dkd.beta=[1, 2]"),
        main_mgd,
    ),
    Case(
        "--calibrate with one term",
        lambda p: p.distil("--calibrate", "1", "--distiller", "kd", "--labels", "0"),
        main_mgd,
    ),
    Case("a linear probe of a network without weights", lambda p: p.base("--linear-probe", "1")),
    Case("a linear probe in a distillation", lambda p: p.distil("--linear-probe", "1"), main_mgd),
    Case("batches of one image whose last maps are one px", one_image),
]
