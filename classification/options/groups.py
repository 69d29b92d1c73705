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
        help="folder of photographs: train/CLASS/*.jpg and valid/CLASS/*.jpg (or val/); with --resume, the default is "
        "the folder of that run",
        free=True,
        reading=True,
        place=True,
    )
    train_list: str | None = option(
        None,
        metavar="FILE",
        help="text file with one `path label` per line, used instead of train/",
        free=True,
        reading=True,
        file=True,
        place=True,
    )
    valid_list: str | None = option(
        None,
        metavar="FILE",
        help="the same for valid/; with both lists, the class names are the label numbers",
        free=True,
        reading=True,
        file=True,
        place=True,
    )
    num_classes: int | None = option(
        None,
        kind=number(int, 1, 1_000_000),
        help="number of classes; default: the number of class folders in train/, or the largest label + 1",
        reading=True,
    )
    labels: str | None = option(
        None,
        kind=switched("none", "true"),
        choices=LABELS,
        help="which labels are used: true: those of train/ and of --pile-list; pseudo: those of --pile-list only, "
        "without the images of train/; none: no labels, train/ is any folder of images; default: true if a term "
        "needs labels, or else none",
    )
    img_size: int | None = option(
        None,
        kind=number(int, 8, LARGEST_SIZE),
        help="height and width in pixels of the images that the networks get; default: the size that belongs to each "
        "network's weights, or 224",
    )
    train_crop: str | None = option(
        None,
        choices=("resized", "pad"),
        help="resized: crop a random part and resize it; pad: shift the image by an eighth at most, for objects that "
        "fill it (CIFAR); default: resized",
    )
    hflip: int = switch(1, help="1: mirror half of the images; 0: none, for example for digits or text")
    randaugment: int | None = option(
        None,
        kind=number(int, 0, 30),
        metavar="STRENGTH",
        help="change the shape or colours of each image twice at random (RandAugment), with a strength from 0 to 30; "
        "9 is usual; default: no change",
    )
    random_erasing: float = option(
        0.0,
        kind=number(float, 0, 1),
        metavar="SHARE",
        help="share of the images in which a random rectangle is erased; 0.25 is usual, 0 is off",
    )
    repeats: int = option(
        1,
        kind=count,
        metavar="N",
        help="put each image N times into a batch, augmented in N ways; an epoch then has 1/N of the images; 3 is "
        "usual, 1 is off",
    )
    second_view: str = option(
        "strong",
        choices=("strong", "weak"),
        help="how the second view of an image is made, for terms that compare two views: weak: crop and mirror; "
        "strong: also RandAugment and a grey square",
        distillation=True,
    )
    mixup: float = option(
        0.0, kind=nonnegative, metavar="ALPHA", help="blend pairs of images (mixup); 0.2 is usual, 0 is off"
    )
    cutmix: float = option(
        0.0,
        kind=nonnegative,
        metavar="ALPHA",
        help="paste a part of one image into another (CutMix); 1 is usual, 0 is off",
    )
    sampler: str | None = option(
        None,
        choices=("balanced",),
        help="balanced: an epoch has equally many images of each class, so images of small classes repeat; default: "
        "every image once",
    )
    class_weights: str | None = option(
        None,
        choices=("balanced",),
        help="balanced: in the cross-entropy, an image has the weight n / (K n_c), with n images, K classes and n_c "
        "images in its class; default: equal weights",
    )
    bad_images: str = option(
        "stop",
        choices=("stop", "skip"),
        help="what to do with images that cannot be read: stop: end with an error; skip: read all images first, leave "
        "such images out and list them",
        free=True,
        reading=True,
    )
    cache: str = option(
        "off",
        choices=("off", "ram"),
        help="ram: decode each image once and keep it in memory",
        free=True,
        reading=True,
    )


@dataclass(frozen=True)
class Run:
    """Run"""

    config: str | None = option(
        None,
        metavar="FILE",
        help="recipe: a YAML file with option names and values, or the name of one in classification/recipes; options "
        "that you type override it",
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
        help="resume a run, given as its folder or its last.pth; options that you do not type are those of the run; "
        "auto: resume the run in --output, or start it if there is none; type all options",
        free=True,
        anew=True,
        file=True,
    )
    resume_override: int = switch(
        0, help="1: resume even if options that change the result differ", free=True, anew=True
    )
    checkpoint_every_steps: int | None = option(
        None, kind=count, metavar="N", help="write last.pth every N steps, in addition to every epoch", free=True
    )
    keep_checkpoints: int = option(
        0,
        kind=whole,
        metavar="N",
        help="keep the checkpoints of the last N epochs as epoch0001.pth and so on; --resume accepts them",
        free=True,
    )
    log_steps: int | None = option(
        None,
        kind=count,
        metavar="N",
        help="every N steps, write loss, terms and learning rate to steps.jsonl and to the trackers; default: never",
        free=True,
    )
    track: str = option(
        "tensorboard",
        choices=TRACKERS,
        help="trackio: log to trackio, in addition to the TensorBoard file of each run",
        free=True,
    )
    best_by: str = option(
        "top1", choices=BEST_BY, help="the measure on valid/ that chooses the epoch of best.pth; default: top1"
    )
    skip_nonfinite: int = option(
        0,
        kind=whole,
        metavar="N",
        help="number of steps with a non-finite loss to skip before the run stops",
        free=True,
    )
    evaluate: bool = option(
        False,
        "-e",
        "--evaluate",
        help="only evaluate: write evaluation.json into --output, or beside the weights",
        free=True,
        anew=True,
    )
    calibrate: int | None = option(
        None,
        kind=count,
        metavar="STEPS",
        help="only measure over STEPS batches, and print the weights that would give all terms equal gradients, and "
        "the share of each pair of taps",
        distillation=True,
        free=True,
        anew=True,
    )
    show_taps: bool = option(
        False,
        help="only print where student and teachers are tapped, and what a flow could gain at each pair of taps",
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
        help="print progress every N steps; default: about every 10 seconds",
        free=True,
    )
    seed: int | None = option(
        None,
        kind=number(int, 0, 2**31 - 1),
        help="seed of all random numbers; default: a new one, written to config.json",
    )


@dataclass(frozen=True)
class Optimisation:
    """Training"""

    epochs: int = option(100, kind=count, help="number of epochs, without those of the warmup")
    start_epoch: int = option(0, kind=whole, help="the first epoch, counted from 0", free=True, anew=True)
    batch_size: int = option(
        256,
        "-b",
        "--batch-size",
        kind=count,
        help="images per step, over all devices and ranks together",
        reading=True,
    )
    accumulate: int = option(
        1,
        kind=count,
        metavar="N",
        help="compute each batch in N parts, to save memory; batch norms and terms then see one part at a time",
    )
    linear_probe: int = switch(
        0, help="1: train only the head of a network with weights, and freeze the rest (main_base.py)"
    )
    optimizer: str = option(
        "sgd",
        choices=("sgd", "muon", "adamw", "lamb", "dot"),
        help="sgd: SGD with momentum; muon: orthogonal steps of convolutions, start with --lr 0.03 --wd 0.05; adamw: "
        "start with --lr 0.001 --wd 0.05; lamb: for large batches, start with --lr 0.005 --wd 0.02 "
        "--clip-gradients 1; dot: SGD with a lower momentum for labels and a higher one for teachers "
        "(main_mgd.py)",
    )
    dot_delta: float = option(
        0.075,
        kind=number(float, 0, 0.9999),
        metavar="DELTA",
        help="for --optimizer dot: subtracted from the momentum of the labels and added to that of the teachers",
        distillation=True,
    )
    lr: float = option(0.1, "--lr", "--learning-rate", kind=positive, help="learning rate")
    momentum: float = option(
        0.9,
        kind=number(float, 0, 0.9999),
        help="Nesterov momentum; for dot, plain momentum; for adamw and lamb, the first beta",
    )
    weight_decay: float = option(1e-4, "--wd", "--weight-decay", kind=nonnegative, help="weight decay")
    no_decay: str = option(
        "none", choices=("none", "norms"), help="norms: no weight decay for norms, biases and other vectors"
    )
    clip_gradients: float | None = option(
        None,
        kind=positive,
        metavar="NORM",
        help="if the gradient of all weights together is longer than this, scale it down to this length; default: "
        "never",
    )
    lr_schedule: str = option(
        "step",
        choices=("step", "cosine"),
        help="step: the learning rate drops at certain epochs; cosine: it falls to 0 along half a cosine",
    )
    lr_drop_ratio: float = option(
        0.1, kind=positive, help="for --lr-schedule step: factor of the learning rate at every drop"
    )
    lr_drop_epochs: tuple[int, ...] = option(
        (31, 61, 81), kind=count, nargs="+", help="for --lr-schedule step: epochs of the drops"
    )
    warmup: int = switch(
        0, help="1: before these epochs, add some in which the learning rate rises linearly from 0.1 of its value"
    )
    warmup_epochs: int = option(10, kind=count, help="number of epochs that --warmup 1 adds")
    int8_epochs: int = option(
        0,
        kind=whole,
        metavar="N",
        help="in the last N epochs, round as the int8 file will that mgd export --to int8 writes afterwards",
    )
    ema: float = option(
        0.0,
        kind=number(float, 0, 0.999999),
        metavar="DECAY",
        help="evaluate and save a running average of the student's weights, with this decay per step; 0.999 to 0.9999 "
        "is usual, 0 is off",
    )


@dataclass(frozen=True)
class Networks:
    """Weights and teachers"""

    arch: str | None = option(
        None,
        "-a",
        "--arch",
        help="the network to train: a name, torchvision:NAME, timm:NAME or hf:NAME_OR_FOLDER; default: the one that "
        "the file of --student-resume names, or resnet18",
    )
    pretrained: bool = option(False, help="start from the published ImageNet weights", free=True, anew=True)
    use_pretrained: int = switch(0, help="1: the same as --pretrained", free=True, anew=True)
    student_resume: str | None = option(
        None,
        metavar="FILE",
        help="weights to evaluate or to start from; in a training, a head for other classes is replaced",
        free=True,
        anew=True,
        file=True,
    )
    teacher_arch: str | None = option(
        None,
        help="the teacher's network, or several, separated by commas; default: the one that its file names, or "
        "resnet50 (resnet152 for the student resnet50); for the terms dml and udml, the peers that train with "
        "the student, saved as peer1.pth, best_peer1.pth and so on; default for these: one more network like the "
        "student",
    )
    teacher_resume: str | None = option(
        None, metavar="FILE", help="weights of the teacher; of several, separated by commas", free=True, file=True
    )
    teacher_cache: str | None = option(
        None,
        metavar="FOLDER",
        help="train from the outputs of a teacher that mgd reinforce stored in FOLDER, with no teacher in memory; "
        "images are cropped, mirrored and mixed as FOLDER says",
        distillation=True,
        free=True,
        file=True,
        place=True,
    )
    teacher_mean: str = option(
        "terms",
        choices=("terms", "probabilities"),
        help="with several teachers: terms: average each term over them; probabilities: compare with the mean of "
        "their probabilities",
        section=TAPS,
        distillation=True,
    )
    student_taps: str | None = option(
        None,
        metavar="PATHS",
        help="modules to tap, separated by commas, for example layer2.1.relu@in#-1; auto: find them by what the "
        "network computes; default: the usual taps of this kind of network, or auto",
        section=TAPS,
        distillation=True,
    )
    teacher_taps: str | None = option(
        None,
        metavar="PATHS",
        help="the same for the teacher; with several teachers, one list for each, separated by ;",
        section=TAPS,
        distillation=True,
    )
    taps: str | None = option(
        None,
        metavar="PATHS",
        help="modules to tap in both student and teacher, or auto",
        section=TAPS,
        distillation=True,
    )
