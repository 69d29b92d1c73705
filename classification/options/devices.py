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
        help="loading processes of a node, shared by its ranks",
        free=True,
        reading=True,
    )
    channels_last: int = switch(1, help="memory layout of maps: 1 is faster nearly always", reading=True)
    compile: int = switch(0, help="1: torch.compile; slow to start")
    world_size: int = option(-1, kind=int, help="nodes (with --multiprocessing-distributed), or else ranks", free=True)
    rank: int = option(-1, kind=int, help="number of this node, or of this rank", free=True)
    dist_url: str = option(
        "tcp://127.0.0.1:23456", help="where rank 0 listens; env:// takes the environment's", free=True
    )
    dist_backend: str | None = option(
        None,
        choices=("nccl", "gloo"),
        help="how ranks talk; default: nccl on GPUs, gloo on CPUs",
        free=True,
    )
    dist_timeout: int = option(
        1800, kind=count, help="seconds that ranks wait for each other before the run ends", free=True
    )
    multiprocessing_distributed: bool = option(False, help="one process per GPU of this node", free=True)
    deterministic: int = switch(
        0, help="1: the same bits on the same GPU, at some cost in speed; the CPU gives them anyway"
    )
    sync_bn: int = switch(0, help="1: batch statistics over all GPUs of a DDP run")
    average_bn: int = switch(
        0,
        help="1: before each evaluation, the statistics of batch norms become their mean over the ranks; 0: those of "
        "rank 0 count",
    )
    teacher_dtype: str = option(
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="number type of the frozen teacher; auto: bfloat16 where the device computes in it, else that of --amp",
        section=TAPS,
        distillation=True,
    )
    compile_student: int | None = switch(
        None,
        help="with --compile 1: whether the student is translated too, or teachers and matching alone; default: on a "
        "GPU only: on a CPU it makes small ResNets faster and MobileNets slower",
        section=TAPS,
        distillation=True,
    )
    teacher_threads: int = option(
        0,
        kind=whole,
        help="on a CPU: threads on which the teachers compute the next batch while the student trains on the others; "
        "0: in turn, each on all. Half of the cores is a good start",
        section=TAPS,
        distillation=True,
        free=True,
    )
