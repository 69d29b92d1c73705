"""A job: data, networks and distiller of one run, built and checked before any rank starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from classification.data.folders import DataFolder
from classification.data.preprocessing import Preprocessing
from classification.data.stored import StoredViews
from classification.errors import UserError
from classification.models.fake_quantised import FakeQuantisation
from classification.models.weights import load_strictly
from classification.options.config import total_epochs
from classification.options.options import Options, recorded
from classification.options.terms import mutual
from classification.runs.checkpoint import Now, fingerprints, image_names, read_resume
from classification.runs.folder import run_folder
from classification.runs.restore import explain_damage, load_or_keep
from classification.runs.world import Seed
from classification.system.weight_files import damaged_error
from mgd import Distiller
from mgd.losses import Term


@dataclass
class Job:
    """Everything that `Engine` needs, on the CPU.

    Args:
        options: of the run.
        seed: of the run, drawn or typed; a resumed run has that of its checkpoint.
        data: the images.
        student: the network to train or evaluate; None if only a teacher is evaluated.
        teachers: the other networks: frozen teachers, or the peers in mutual learning.
        arch: the student's network.
        specs: the description of each teacher, with its network.
        num_classes: K.
        resume_from: the checkpoint to resume from, or an empty string.
        teacher_dtype: number type of the frozen teachers.
        distiller: computes the loss; None with --evaluate.
        notes: for the user, one line each.
        sizes: parameters of each network, by role: "student", "teacher", or "teacher 1" and so on.
        preprocessing: of the student's images.
        teacher_preprocessing: of each teacher's images.
        before_relu: whether the taps lie before a ReLU; then terms whose source reads maps after the ReLU apply one.
        other_classes: whether each teacher has other classes than the run, or none, so that only its maps are used.
        still: modules of the student that stay in eval mode while it trains.
        checkpoint: content of the checkpoint to resume from, or None.
        changed: how the run of the checkpoint differs from this one; --resume-override allows it.
        reinitialised: the parts whose state does not fit the new options, and which are initialised again.
        inputs: see `fingerprints`.
        bad_images: images that are skipped, and why.
        auto: whether --resume auto was typed; then a complete run is no error.
        done: whether the run of the checkpoint is complete.
        folder: the run folder.
        taps_table: what --show-taps prints instead of training, or an empty string.
        quantisation: rounds in the student in the epochs of --int8-epochs; or None.
        stored: the views and teacher outputs of --teacher-cache, or None.
    """

    options: Options
    seed: Seed
    data: DataFolder
    student: nn.Module | None = None
    teachers: list[nn.Module] = field(default_factory=list)
    arch: str = ""
    specs: list[dict[str, Any]] = field(default_factory=list)
    num_classes: int = 0
    resume_from: str = ""
    teacher_dtype: str = ""
    distiller: Distiller | None = None
    notes: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    teacher_preprocessing: list[Preprocessing] = field(default_factory=list)
    before_relu: bool = False
    other_classes: list[bool] = field(default_factory=list)
    still: list[nn.Module] = field(default_factory=list)
    checkpoint: dict[str, Any] | None = None
    changed: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)
    bad_images: dict[str, str] = field(default_factory=dict)
    auto: bool = False
    done: bool = False
    folder: Path = Path()
    taps_table: str = ""
    quantisation: FakeQuantisation | None = None
    stored: StoredViews | None = None

    def networks(self) -> dict[str, tuple[str, nn.Module]]:
        """Return {role: (arch, network)}, teachers first."""
        pairs = zip(self.specs, self.teachers, strict=False)
        others = {role: (spec["arch"], network) for role, (spec, network) in zip(self._roles(), pairs, strict=True)}
        return others if self.student is None else {**others, "student": (self.arch, self.student)}

    def preprocessing_by_role(self) -> dict[str, Preprocessing | None]:
        """Return {role: preprocessing} of the networks, None for those of other classes."""
        pairs = zip(self.teacher_preprocessing, self.other_classes, strict=True)
        others = {role: None if other else own for role, (own, other) in zip(self._roles(), pairs, strict=True)}
        return {**others, "student": self.preprocessing}

    def _roles(self) -> list[str]:
        name = "peer" if mutual(self.options.table) else "teacher"
        return [name] if len(self.teachers) == 1 else [f"{name} {number + 1}" for number in range(len(self.teachers))]

    @property
    def untrained(self) -> bool:
        """Whether the student begins with random weights."""
        networks = self.options.networks
        return not (networks.student_resume or networks.pretrained or networks.use_pretrained or self.resume_from)

    @property
    def train_crop(self) -> str:
        """How training images are cropped."""
        return self.options.data.train_crop or "resized"

    def record(self) -> dict[str, Any]:
        """Return the options as the run records them, with the values that files and folders decided."""
        typed = self.options.data.img_size is not None
        stored = [] if self.stored is None else [{"arch": arch, "frozen": True} for arch in self.stored.plan.archs]
        values: dict[str, Any] = {
            "seed": self.seed.value, "seeded": self.seed.typed, "arch": self.arch, "teachers": self.specs or stored,
            "num_classes": self.num_classes, "img_size": self.preprocessing.img_size, "img_size_asked": typed,
            "train_crop": self.train_crop, "resume": self.resume_from,
        }  # fmt: skip
        names = ",".join(spec["arch"] for spec in self.specs)
        values["teacher_arch"] = names or self.options.networks.teacher_arch
        if self.teacher_dtype:
            values["teacher_dtype"] = self.teacher_dtype
        return recorded(self.options, **values)

    def set_distiller(self, distiller: Distiller) -> None:
        """Set the distiller, and load the checkpoint of a run that is resumed."""
        data, run = self.options.data, self.options.run
        assert data.data is not None
        self.distiller = distiller
        if self.quantisation is not None:
            distiller.add_module("int8", self.quantisation)  # its scales train with the networks
        arch = self.arch.replace(":", "-").replace("/", "-")  # of timm: or hf:
        self.folder = run_folder(run, f"{arch}-{'+'.join(self.options.table)}")
        frozen = [] if distiller.peers else self.teachers
        self.inputs = fingerprints(frozen, self.data.train, data.data, distiller.terms)
        if self.stored is not None:
            self.inputs["teachers"] = self.stored.plan.fingerprint()
        self.inputs["preprocessing"] = {
            role: str(own) for role, own in zip(self._roles(), self.teacher_preprocessing, strict=True)
        }
        if not self.resume_from:
            return
        images = partial(image_names, self.data.train, data.data)
        now = Now(self.record(), self.options, self.data.classes, self.inputs, images)
        self.checkpoint, self.changed = read_resume(self.resume_from, now)
        if self.changed:
            self.notes.append(f"resuming with {', '.join(self.changed)}")
        self.done = self.checkpoint["resume"]["epoch"] >= total_epochs(self.options.optimisation)
        if self.done and not self.auto:
            raise UserError(f"{self.resume_from} is from a run that is complete: raise --epochs to train longer")
        self._load_resume(self.checkpoint, distiller)

    def _load_resume(self, checkpoint: dict[str, Any], distiller: Distiller) -> None:
        """Load the student and the terms; a term whose state does not fit changed options is initialised again."""
        assert self.student is not None
        load_strictly(self.student, checkpoint["state_dict"], f"{self.resume_from} is damaged: it", self.arch)
        if self.quantisation is not None and (state := checkpoint["resume"].get("int8")):
            with explain_damage(self.resume_from):
                self.quantisation.load_state_dict(state)
        for name, term in distiller.terms.items():
            if error := load_or_keep(term, partial(_load_term, term, checkpoint["resume"]["terms"].get(name))):
                if not self.changed:
                    what = f"the state of the term {name} does not fit: {' '.join(str(error).split())[:200]}"
                    raise damaged_error(self.resume_from, what) from error
                self.reinitialised.append(f"the term {name}")


def _load_term(term: nn.Module, state: dict[str, Any]) -> None:
    term.load_state_dict(state)
    if isinstance(term, Term):
        term.check_state()
