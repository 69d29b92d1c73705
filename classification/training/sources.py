"""Read the weight files of a run's networks before any network is built, to find architectures and preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from classification.data.folders import DataFolder
from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.models import known_name
from classification.models.weights import WeightFile, describe_file, read_weights
from classification.options.names import DEFAULT_TEACHER
from classification.options.options import Options
from classification.paths import exists
from classification.system.weight_files import read_checkpoint


@dataclass
class Sources:
    """The files of a run's networks.

    Args:
        resumes: whether the run resumes from a checkpoint.
        resume: path of that checkpoint, or an empty string.
        arch: the student's network.
        specs: the description of each teacher, with its network.
        student: the file with the student's weights, or None.
        resumed: the description in the checkpoint to resume from, or None.
        teachers: the file of each teacher, or None.
        img_size: the value of --img-size; None to use that of the files.
        train_crop: the value of --train-crop; None to use that of the files.
        notes: remarks for the user.
    """

    resumes: bool = False
    resume: str = ""
    arch: str = ""
    specs: list[dict[str, Any]] = field(default_factory=list)
    student: WeightFile | None = None
    resumed: WeightFile | None = None
    teachers: list[WeightFile | None] = field(default_factory=list)
    img_size: int | None = None
    train_crop: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str] | None:
        """The class names of the first file that has some."""
        return next((file.classes for file in (self.student, *self.teachers) if file and file.classes), None)

    def student_preprocessing(self, evaluate: bool, published: Preprocessing | None) -> Preprocessing:
        """Return the student's preprocessing: that of its file, or of published weights, or the usual one.

        --img-size replaces its size, and --train-crop its crop in a new run. Evaluations and resumed runs keep the crop
        of their file.

        Args:
            evaluate: whether the networks are only evaluated.
            published: that of the published weights, or None; it replaces the usual one.
        """
        file = self.student or self.resumed
        usual = Preprocessing.of(self.img_size or 224, self.train_crop or "resized")
        own = _of_file(file, usual, published)
        keeps_crop = (
            (evaluate or self.resumed is not None) and file is not None and "resize" in file.preprocessing_values
        )
        crop = None if keeps_crop else self.train_crop
        return own if (self.img_size, crop) == (None, None) else own.at(self.img_size or own.img_size, crop)

    def teacher_preprocessing(
        self,
        student: Preprocessing,
        spec: Mapping[str, Any],
        file: WeightFile | None,
        published: Preprocessing | None,
    ) -> Preprocessing:
        """Return a teacher's preprocessing: of its file or published weights, changed by --img-size and by its recipe.

        Args:
            student: that of the student.
            spec: the description of the teacher; values of a recipe come first.
            file: of its weights, or None.
            published: as in `student_preprocessing`.

        Raises:
            UserError: values of the recipe are wrong.
        """
        own = _of_file(file, Preprocessing.of(student.img_size, self.train_crop or "resized"), published)
        own = own if self.img_size is None else own.at(self.img_size)
        try:
            return own.with_values({key: spec[key] for key in ("img_size", "mean", "std") if key in spec})
        except ValueError as error:
            raise UserError(f"the teacher {spec['arch']}: {error}") from error


def _of_file(file: WeightFile | None, usual: Preprocessing, published: Preprocessing | None) -> Preprocessing:
    if file is None or "mean" not in file.preprocessing_values:
        usual = published or usual
    return usual if file is None else file.preprocessing(usual)


def find_sources(options: Options, *, with_student: bool, with_teacher: bool) -> Sources:
    """Read the files of a run's networks, and take architectures that the options do not name from them.

    Raises:
        UserError: a file cannot be read, or is of an unknown network.
    """
    run, networks = options.run, options.networks
    last = str(Path(run.output, "last.pth")) if run.resume == "auto" and run.output else run.resume
    resumes = bool(run.resume) and (run.resume != "auto" or exists(last))
    sources = Sources(
        resumes, last if resumes else "", img_size=options.data.img_size, train_crop=options.data.train_crop
    )
    if with_student and (run.evaluate or not resumes):
        file = (run.resume if run.evaluate else "") or networks.student_resume
        sources.student = read_weights(file) if file else None
    elif with_student:
        sources.resumed = describe_file(last, read_checkpoint(last), {})
    sources.teachers = [
        read_weights(spec["resume"]) if with_teacher and spec.get("resume") else None for spec in options.teachers
    ]
    arch = networks.arch or _arch(sources.student or sources.resumed, sources.notes, "-a") or "resnet18"
    sources.arch = arch
    if with_student and not resumes and arch.startswith("hf:") and (networks.pretrained or networks.use_pretrained):
        sources.student = sources.student or read_weights(arch)
    sources.specs = [
        {**spec, "arch": spec["arch"] or _teacher_arch(arch, spec, file, sources.notes)}
        for spec, file in zip(options.teachers, sources.teachers, strict=True)
    ]
    if with_teacher:
        sources.teachers = [
            read_weights(spec["arch"]) if file is None and _brings_weights(spec) else file
            for spec, file in zip(sources.specs, sources.teachers, strict=True)
        ]
    return sources


def _brings_weights(spec: Mapping[str, Any]) -> bool:
    """Return whether a teacher's name also names its weights; peers of mutual learning start with random ones."""
    return str(spec["arch"]).startswith("hf:") and bool(spec.get("frozen", True))


def _teacher_arch(student: str, spec: Mapping[str, Any], file: WeightFile | None, notes: list[str]) -> str:
    usual = DEFAULT_TEACHER.get(student, "resnet50") if spec.get("frozen", True) else student
    return _arch(file, notes, "--teacher-arch") or usual


def _arch(file: WeightFile | None, notes: list[str], option: str) -> str | None:
    """Return this project's name of the architecture that a file records; None if it records none."""
    if file is None:
        return None
    if file.arch is None:
        notes.append(
            f"{file.path} does not name its network, so the usual one is assumed: if that is wrong, name it with "
            f"{option}"
        )
        return None
    name = known_name(file.arch)
    if name is None:
        raise UserError(
            f"checkpoint {file.path} has the network {file.arch}, which this project does not know: name a network "
            f"with {option}"
        )
    return name


def numbered_as(data: DataFolder, names: list[str] | None) -> DataFolder:
    """Number the classes of a folder as in `names`, if these contain all of them and more."""
    if names is None or not set(data.classes) < set(names):
        return data
    index = [names.index(name) for name in data.classes]
    train, valid = ([(path, index[t] if t >= 0 else t) for path, t in split] for split in (data.train, data.valid))
    return replace(data, classes=names, train=train, valid=valid)
