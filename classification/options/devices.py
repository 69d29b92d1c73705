"""The options of devices and ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass

from classification.options.fields import count, number, option, switch, whole
from classification.options.names import TAPS


@dataclass(frozen=True)
class Devices:
    """Devices"""

    device: str = option("auto", help="auto, cpu, cuda, cuda:1 ...", free=True, reading=True)
    gpu: int | None = option(None, kind=whole, help="use this GPU only", free=True, reading=True)
    amp: str = option(
        "off",
        choices=("off", "bf16", "fp16"),
        help="mixed precision; bf16 runs anywhere (in float32 where the device lacks it), fp16 on GPUs",
        reading=True,
    )
    workers: int = option(
        min(8, os.cpu_count() or 1),
        "-j",
        "--workers",
        kind=number(int, 0, 1024),
        help="loading processes per node, shared by its ranks",
        free=True,
        reading=True,
    )
    channels_last: int = switch(1, help="1: store maps with channels last, which is nearly always faster", reading=True)
    compile: int = switch(0, help="1: use torch.compile, which takes minutes to start")
    world_size: int = option(
        -1, kind=int, help="number of nodes with --multiprocessing-distributed, or else number of ranks", free=True
    )
    rank: int = option(-1, kind=int, help="number of this node, or of this rank", free=True)
    dist_url: str = option(
        "tcp://127.0.0.1:23456", help="address where rank 0 listens; env:// takes it from the environment", free=True
    )
    dist_backend: str | None = option(
        None,
        choices=("nccl", "gloo"),
        help="how ranks communicate; default: nccl on GPUs, gloo on CPUs",
        free=True,
    )
    dist_timeout: int = option(
        1800, kind=count, help="seconds that ranks wait for each other before the run ends", free=True
    )
    multiprocessing_distributed: bool = option(False, help="start one process per GPU of this node", free=True)
    deterministic: int = switch(
        0, help="1: equal results bit for bit on the same GPU, at some cost in speed; CPUs give them anyway"
    )
    sync_bn: int = switch(0, help="1: batch norms use statistics over all GPUs (DDP only)")
    average_bn: int = switch(
        0,
        help="1: before each evaluation, average the statistics of batch norms over the ranks; 0: use those of rank 0",
    )
    teacher_dtype: str = option(
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="number type of the frozen teacher; auto: bfloat16 if the device has it, or else that of --amp",
        section=TAPS,
        distillation=True,
    )
    compile_student: int | None = switch(
        None,
        help="with --compile 1: 1: compile the student too; 0: compile only teachers and matching; default: 1 on a "
        "GPU and 0 on a CPU, where it makes small ResNets faster and MobileNets slower",
        section=TAPS,
        distillation=True,
    )
    teacher_threads: int = option(
        0,
        kind=whole,
        help="on a CPU: number of threads that compute the teachers' next batch while the student trains on the other "
        "threads; half of the cores is a good start; 0: student and teachers take turns on all threads",
        section=TAPS,
        distillation=True,
        free=True,
    )
