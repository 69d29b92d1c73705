"""--int8-epochs: in the last epochs, the student rounds as its int8 file will."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from classification.models.fake_quantised import FakeQuantisation
from classification.models.trained import Trained
from classification.options.config import epoch_name, total_epochs
from classification.training.job import Job

if TYPE_CHECKING:
    from classification.training.trainer import Trainer

CALIBRATION = 256  # number of images that set the first scales


def prepare_int8(job: Job) -> None:
    """Find where the student's int8 file will round; call it before the student is tapped.

    Raises:
        UserError: the file rounds a tensor that is not found in the student's forward.
    """
    number = job.options.optimisation.int8_epochs
    if not number or job.options.run.evaluate:
        return
    from classification.models.rounding import find_sites  # needs the extra [export]

    assert job.student is not None
    description = (job.arch, job.num_classes, job.data.classes, job.preprocessing)
    sites = find_sites(Trained(Path(), job.student, *description, note=""))
    job.quantisation = FakeQuantisation(sites)
    job.notes.append(
        f"int8: the last {number} epochs round {len(sites.tensors)} activations, and all weights with "
        f"{len(sites.folded)} batch norms folded into them"
    )


def begin_int8(trainer: Trainer) -> None:
    """Calibrate the student and round in it from now on, if the epoch is one of --int8-epochs.

    The best epoch is chosen again, because earlier ones did not round.
    """
    optimisation, quantisation = trainer.options.optimisation, trainer.job.quantisation
    if quantisation is None or trainer.epoch < total_epochs(optimisation) - optimisation.int8_epochs:
        return
    student, engine = trainer.student, trainer.engine
    if not quantisation.calibrated:
        student.eval()
        images = (images for images, *_ in engine.training_images(trainer.epoch, CALIBRATION))
        quantisation.calibrate(student, images)
        trainer.forget_best()
        trainer.world.say(f"=> int8: {epoch_name(optimisation, trainer.epoch)} and later ones round as the file will")
    quantisation.attach(student)


def described_int8(job: Job) -> dict[str, Any]:
    """Return the scales for a checkpoint, if they are set."""
    if job.quantisation is None or not job.quantisation.calibrated:
        return {}
    return {"int8": job.quantisation.describe()}
