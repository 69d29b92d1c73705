"""Every option of the main scripts as a field of a frozen dataclass, with its default, its check and its help."""

from __future__ import annotations

from dataclasses import dataclass

from classification.options.fields import count, nonnegative, number, option, positive, switch, switched, whole
from classification.options.names import BEST_BY, LABELS, LARGEST_SIZE, TAPS, TRACKERS


@dataclass(frozen=True)
class Data:
    """Photographs"""

    data: str | None = option(
        None,
        positional=True,
        metavar="DIR",
        nargs="?",
        help="folder of photographs: train/CLASS/*.jpg and valid/CLASS/*.jpg (or val/); with --resume, the run's own",
        free=True,
        reading=True,
        place=True,
    )
    train_list: str | None = option(
        None,
        metavar="FILE",
        help="list of `path label` lines that takes the place of train/",
        free=True,
        reading=True,
        file=True,
        place=True,
    )
    valid_list: str | None = option(
        None,
        metavar="FILE",
        help="the same for valid/; with both, labels are the class names",
        free=True,
        reading=True,
        file=True,
        place=True,
    )
    num_classes: int | None = option(
        None,
        kind=number(int, 1, 1_000_000),
        help="default: the number of class folders in train/, or largest label + 1",
        reading=True,
    )
    labels: str | None = option(
        None,
        kind=switched("none", "true"),
        choices=LABELS,
        help="which labels count: true: those of train/, and of --pile-list beside it; pseudo: those of --pile-list "
        "alone, without the images of train/; none: train/ holds images without labels; default: by the terms",
    )
    img_size: int | None = option(
        None,
        kind=number(int, 8, LARGEST_SIZE),
        help="side of the square the networks see, in pixels; default: that of each network's weights, or 224",
    )
    train_crop: str | None = option(
        None, choices=("resized", "pad"), help="pad: images fill the frame already (CIFAR); default: resized"
    )
    hflip: int = switch(1, help="0: no mirrored images (digits, text)")
    randaugment: int | None = option(
        None,
        kind=number(int, 0, 30),
        metavar="STRENGTH",
        help="two random changes of shape or colour for each image (RandAugment), 0 to 30; 9 is usual; default: none",
    )
    random_erasing: float = option(
        0.0,
        kind=number(float, 0, 1),
        metavar="SHARE",
        help="share of the images of which a random rectangle is erased; 0.25 is usual, 0 is off",
    )
    repeats: int = option(
        1,
        kind=count,
        metavar="N",
        help="each image N times in a row, augmented in N ways, and 1/N of the images an epoch; 3 is usual, 1 is off",
    )
    second_view: str = option(
        "strong",
        choices=("strong", "weak"),
        help="second view of an image, for terms that compare two: weak: another crop and mirror; strong: RandAugment "
        "and a grey square, too",
        distillation=True,
    )
    mixup: float = option(0.0, kind=nonnegative, metavar="ALPHA", help="mix pairs of images; 0.2 is usual, 0 is off")
    cutmix: float = option(0.0, kind=nonnegative, metavar="ALPHA", help="paste parts of images; 1 is usual, 0 is off")
    sampler: str | None = option(
        None,
        choices=("balanced",),
        help="balanced: an epoch shows all classes equally often, and repeats images of small ones; default: every "
        "image once",
    )
    class_weights: str | None = option(
        None,
        choices=("balanced",),
        help="balanced: cross-entropy weighs an image by n / (K n_c), with n_c of n images in its class, one of K; "
        "default: all alike",
    )
    bad_images: str = option(
        "stop",
        choices=("stop", "skip"),
        help="stop at an image that cannot be read, or read all first, leave such images out and list them",
        free=True,
        reading=True,
    )
    cache: str = option(
        "off",
        choices=("off", "ram"),
        help="ram: decode every image once and keep it in memory",
        free=True,
        reading=True,
    )


@dataclass(frozen=True)
class Run:
    """Run"""

    config: str | None = option(
        None,
        metavar="FILE",
        help="recipe: a YAML mapping of option names to values, or the name of one in classification/recipes; the "
        "command line wins",
        free=True,
        anew=True,
        file=True,
    )
    output: str | None = option(
        None,
        metavar="FOLDER",
        help="run folder; default: a new one under runs/",
        free=True,
        anew=True,
        file=True,
    )
    resume: str = option(
        "",
        metavar="RUN",
        help="resume a run: its folder, or the last.pth in it; what is not typed is as the run had it; auto: that in "
        "--output, if there is one, with the options that are typed",
        free=True,
        anew=True,
        file=True,
    )
    resume_override: int = switch(
        0, help="1: resume although options that change the result differ", free=True, anew=True
    )
    checkpoint_every_steps: int | None = option(
        None, kind=count, metavar="N", help="write last.pth every N steps, beside every epoch", free=True
    )
    keep_checkpoints: int = option(
        0,
        kind=whole,
        metavar="N",
        help="keep the checkpoints of the last N epochs as epoch0001.pth ..., from which --resume can resume",
        free=True,
    )
    log_steps: int | None = option(
        None,
        kind=count,
        metavar="N",
        help="write loss, terms and rate of every N-th step to steps.jsonl and to the trackers; default: no steps",
        free=True,
    )
    track: str = option(
        "tensorboard",
        choices=TRACKERS,
        help="trackio: log to trackio, too, beside the TensorBoard events of each run",
        free=True,
    )
    best_by: str = option(
        "top1", choices=BEST_BY, help="measure on valid/ by which the epoch of best.pth is chosen; default: top1"
    )
    skip_nonfinite: int = option(
        0, kind=whole, metavar="N", help="steps with a non-finite loss that are skipped before the run stops", free=True
    )
    evaluate: bool = option(
        False,
        "-e",
        "--evaluate",
        help="evaluate, write evaluation.json into --output or beside the weights, and leave",
        free=True,
        anew=True,
    )
    calibrate: int | None = option(
        None,
        kind=count,
        metavar="STEPS",
        help="print weights that balance the terms' gradients, and each pair of taps' share, and leave",
        distillation=True,
        free=True,
        anew=True,
    )
    show_taps: bool = option(
        False,
        help="print where student and teachers are tapped, and what a flow could gain at each pair, and leave",
        distillation=True,
        free=True,
        anew=True,
    )
    print_freq: int | None = option(
        None,
        "-p",
        "--print-freq",
        kind=count,
        metavar="N",
        help="print every N steps; default: about every 10 seconds",
        free=True,
    )
    seed: int | None = option(
        None,
        kind=number(int, 0, 2**31 - 1),
        help="seed of everything random; default: a fresh one, written to config.json",
    )


@dataclass(frozen=True)
class Optimisation:
    """Training"""

    epochs: int = option(100, kind=count, help="epochs of training, those of the warmup not counted")
    start_epoch: int = option(0, kind=whole, help="epoch to begin with, counted from 0", free=True, anew=True)
    batch_size: int = option(
        256,
        "-b",
        "--batch-size",
        kind=count,
        help="images a step, over all devices and ranks together",
        reading=True,
    )
    accumulate: int = option(
        1,
        kind=count,
        metavar="N",
        help="pass each batch in N parts, to save memory; batch norms and terms see the parts",
    )
    linear_probe: int = switch(0, help="1: train the head alone, on a frozen network with weights (main_base.py)")
    optimizer: str = option(
        "sgd",
        choices=("sgd", "muon", "adamw", "lamb", "dot"),
        help="muon: orthogonal steps of convolutions; begin with --lr 0.03 --wd 0.05; adamw: --lr 0.001 --wd 0.05; "
        "lamb, for large batches: --lr 0.005 --wd 0.02 --clip-gradients 1; dot: SGD with a lower momentum for labels "
        "and a higher one for teachers, main_mgd.py only",
    )
    dot_delta: float = option(
        0.075,
        kind=number(float, 0, 0.9999),
        metavar="DELTA",
        help="dot: subtracted from the momentum of the labels, added to that of the teachers",
        distillation=True,
    )
    lr: float = option(0.1, "--lr", "--learning-rate", kind=positive, help="learning rate")
    momentum: float = option(
        0.9,
        kind=number(float, 0, 0.9999),
        help="Nesterov momentum; with dot a plain one; the first beta of adamw and lamb",
    )
    weight_decay: float = option(1e-4, "--wd", "--weight-decay", kind=nonnegative, help="weight decay")
    no_decay: str = option(
        "none", choices=("none", "norms"), help="norms: no weight decay of norms, biases and other vectors"
    )
    clip_gradients: float | None = option(
        None,
        kind=positive,
        metavar="NORM",
        help="shrink the gradient of a step to this norm where it is longer, all weights together; default: never",
    )
    lr_schedule: str = option("step", choices=("step", "cosine"), help="drops at epochs, or half a cosine to 0")
    lr_drop_ratio: float = option(0.1, kind=positive, help="step: factor at every drop")
    lr_drop_epochs: tuple[int, ...] = option((31, 61, 81), kind=count, nargs="+", help="step: epochs of the drops")
    warmup: int = switch(0, help="1: linear warmup from 0.1 of the rate, added in front")
    warmup_epochs: int = option(10, kind=count, help="epochs that --warmup 1 adds in front")
    int8_epochs: int = option(
        0,
        kind=whole,
        metavar="N",
        help="the last N epochs compute as the student's int8 file will, which export.py --to int8 then writes",
    )
    ema: float = option(
        0.0,
        kind=number(float, 0, 0.999999),
        metavar="DECAY",
        help="evaluate and keep an average of the student over its steps; 0.999 to 0.9999 is usual, 0 is off",
    )


@dataclass(frozen=True)
class Networks:
    """Weights and teachers"""

    arch: str | None = option(
        None,
        "-a",
        "--arch",
        help="the network to train: a name, torchvision:NAME, timm:NAME or hf:NAME_OR_FOLDER; default: that of the "
        "file in --student-resume, or resnet18",
    )
    pretrained: bool = option(False, help="start from the published ImageNet weights", free=True, anew=True)
    use_pretrained: int = switch(0, help="1: the same as --pretrained", free=True, anew=True)
    student_resume: str | None = option(
        None,
        metavar="FILE",
        help="weights to evaluate, or to start from, with another head if need be",
        free=True,
        anew=True,
        file=True,
    )
    teacher_arch: str | None = option(
        None,
        help="the teacher's network, or several, comma-separated; default: that of its file, or resnet50 (resnet152 "
        "for the student resnet50); with dml, the student's peers, kept as peer1.pth, best_peer1.pth ...; default: one "
        "more of the student",
    )
    teacher_resume: str | None = option(
        None, metavar="FILE", help="weights of the teacher, or of each, comma-separated", free=True, file=True
    )
    teacher_cache: str | None = option(
        None,
        metavar="FOLDER",
        help="train from a teacher's outputs, as reinforce.py stored them, with no teacher in memory; crops, mirrors "
        "and mixtures of the images are those in FOLDER",
        distillation=True,
        free=True,
        file=True,
        place=True,
    )
    teacher_mean: str = option(
        "terms",
        choices=("terms", "probabilities"),
        help="several teachers: mean of each term over them, or each term against the mean of their probabilities",
        section=TAPS,
        distillation=True,
    )
    student_taps: str | None = option(
        None,
        metavar="PATHS",
        help="comma-separated, as layer2.1.relu@in#-1, or auto, found by what the network computes; default: those of "
        "its family, or auto",
        section=TAPS,
        distillation=True,
    )
    teacher_taps: str | None = option(
        None,
        metavar="PATHS",
        help="the same for the teacher; for several, separated by ;",
        section=TAPS,
        distillation=True,
    )
    taps: str | None = option(
        None,
        metavar="PATHS",
        help="the same paths for student and teacher, or auto",
        section=TAPS,
        distillation=True,
    )
