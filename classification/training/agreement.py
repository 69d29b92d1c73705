"""Check that all ranks have the same checkpoint, options, teachers and images; and what DataParallel allows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from classification.data.image_files import file_digest
from classification.data.members import file_size
from classification.data.samples import samples_digest
from classification.errors import UserError
from classification.runs.checkpoint import job_hash
from classification.runs.world import World, parallel_devices
from classification.training.job import Job
from mgd.losses import Term

MOST = 100_000  # approximate number of files whose sizes are compared; of longer lists, evenly spaced ones
READ = 64  # approximate number of files whose contents are compared


def check_ranks(job: Job, world: World) -> None:
    """Check that all ranks run the same job.

    Raises:
        RunError: they do not; the message names the ranks that differ from rank 0, and what differs.
    """
    if world.size == 1:
        return
    world.check_same(
        _number(_checkpoint(job)),
        "the checkpoints to resume from (a run folder that not every rank sees, or not the same one)",
    )
    if job.distiller is not None:
        world.check_same(job_hash(job.record(), job.inputs), "options, teachers or training images")
    root = str(job.options.data.data)
    for name, samples in (("training images", job.data.train), ("validation images", job.data.valid)):
        world.check_same(_number(_files(samples, root)), name)


def check_parallel(job: Job, world: World) -> None:
    """Refuse what does not work on several devices, and note what changes if each GPU gets a part of the batch.

    Raises:
        UserError: --int8-epochs on several devices; or with DataParallel, --teacher-cache or a term that keeps data
            between steps.
    """
    devices = parallel_devices(world, job.options.devices)
    if job.quantisation is not None and max(devices, world.size) > 1:
        raise UserError("--int8-epochs works in one process on one device: start one process, with --gpu N on a GPU")
    if job.distiller is None or devices == 1:
        return
    terms = {name: term for name, term in job.distiller.terms.items() if isinstance(term, Term)}
    if lost := [name for name, term in terms.items() if term.remembers]:
        raise UserError(
            f"{', '.join(lost)} keeps data between steps, which DataParallel loses: start one rank per GPU with "
            "torchrun or --multiprocessing-distributed, or choose one GPU with --gpu"
        )
    if job.stored is not None:
        raise UserError(
            "--teacher-cache does not work with DataParallel: start one rank per GPU with torchrun, or choose one "
            "with --gpu"
        )
    if parts := [name for name, term in terms.items() if term.relational]:
        job.notes.append(f"DataParallel: {', '.join(parts)} compares an image only with those on the same GPU")


def _checkpoint(job: Job) -> list[str]:
    """Return epoch, step and file digest of the checkpoint to resume from; nothing if there is none."""
    if job.checkpoint is None:
        return []
    state = job.checkpoint["resume"]
    return [str(state["epoch"]), str(state["step"]), file_digest(job.resume_from)]


def _files(samples: Sequence[tuple[str, int]], root: str) -> list[str]:
    """Return digests of names and classes, sizes, and digests of the contents of a few files."""
    sizes = [str(file_size(path)) for path, _ in samples[:: max(1, len(samples) // MOST)]]
    read = [file_digest(path) for path, _ in samples[:: max(1, len(samples) // READ)]]
    return [samples_digest(samples, root), *sizes, *read]


def _number(parts: Sequence[str]) -> int:
    """Return a 63-bit hash of texts."""
    digest = hashlib.sha256(b"\0".join(map(os.fsencode, parts))).digest()
    return int.from_bytes(digest[:8], "big") >> 1
