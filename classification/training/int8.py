"""--int8-epochs: the last epochs round as the student's int8 file will."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from classification.models.fake_quantised import FakeQuantisation
from classification.models.trained import Trained
from classification.options.config import epoch_name, total_epochs
from classification.training.job import Job

if TYPE_CHECKING:
    from classification.training.trainer import Trainer

CALIBRATION = 256  # images from which the scales start


def prepare_int8(job: Job) -> None:
    """Find where the student's int8 file will round; before the student is tapped.

    Raises:
        UserError: a network whose file rounds what cannot be found in its forward.
    """
    number = job.options.optimisation.int8_epochs
    if not number or job.options.run.evaluate:
        return
    from classification.models.rounding import find_sites  # needs the extra [export]

    assert job.student is not None
    about = (job.arch, job.num_classes, job.data.classes, job.preprocessing)
    sites = find_sites(Trained(Path(), job.student, *about, note=""))
    job.quantisation = FakeQuantisation(sites)
    job.notes.append(
        f"int8: the last {number} epochs round {len(sites.tensors)} activations, and all weights with "
        f"{len(sites.folded)} batch norms folded into them"
    )


def begin_int8(trainer: Trainer) -> None:
    """Calibrate the student and round in it from now on, if the epoch is one of --int8-epochs.

    The best epoch is chosen again, because earlier ones did not round.
    """
    optimisation, found = trainer.options.optimisation, trainer.job.quantisation
    if found is None or trainer.epoch < total_epochs(optimisation) - optimisation.int8_epochs:
        return
    student, engine = trainer.student, trainer.engine
    if not found.calibrated:
        student.eval()
        found.calibrate(student, (images for images, *_ in engine.training_images(trainer.epoch, CALIBRATION)))
        trainer.forget_best()
        trainer.world.say(f"=> int8: {epoch_name(optimisation, trainer.epoch)} and later ones round as the file will")
    found.attach(student)


def described_int8(job: Job) -> dict[str, Any]:
    """Return what a checkpoint says of the scales, once there are some."""
    if job.quantisation is None or not job.quantisation.calibrated:
        return {}
    return {"int8": job.quantisation.describe()}
