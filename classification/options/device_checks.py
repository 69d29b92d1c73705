"""Devices and ranks that a run asks for: refused where this machine lacks them, or where they exclude each other."""

from __future__ import annotations

import os

import torch

from classification.errors import UserError
from classification.options.groups import Devices


def check_devices(devices: Devices) -> None:
    """Refuse devices that this machine lacks, and options that exclude each other.

    Raises:
        UserError: one of these.
    """
    try:
        device = torch.device(devices.device) if devices.device != "auto" else None
    except RuntimeError:
        raise UserError(f"unknown device {devices.device!r}: use auto, cpu, cuda or cuda:N") from None
    if device is not None and device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {devices.device} is not supported: use auto, cpu, cuda or cuda:N")
    _check_gpus(devices, device)
    if devices.compile:
        _check_compiler()
    _check_ranks(devices)


def _check_gpus(devices: Devices, device: torch.device | None) -> None:
    """Refuse GPUs that this machine lacks, and options that need a GPU or exclude one; `device` None is auto."""
    gpus, several = torch.cuda.device_count(), devices.multiprocessing_distributed
    one = devices.gpu is not None or (device is not None and device.index is not None)
    if devices.gpu is not None and devices.device not in ("auto", "cuda", f"cuda:{devices.gpu}"):
        raise UserError(f"--gpu {devices.gpu} and --device {devices.device} exclude each other")
    if several and one:
        raise UserError("--multiprocessing-distributed takes every visible GPU: leave --gpu and the device number out")
    if device is not None and device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"--device {devices.device}: this machine shows {gpus} GPUs")
    if devices.gpu is not None and devices.gpu >= gpus:
        raise UserError(f"--gpu {devices.gpu}: this machine shows {gpus} GPUs")
    on_gpu = devices.gpu is not None or (device.type == "cuda" if device is not None else gpus > 0)
    if devices.amp == "fp16" and not on_gpu:
        raise UserError("--amp fp16 needs a GPU: use bf16 or off")
    if devices.teacher_threads and on_gpu:
        raise UserError("--teacher-threads divides a processor's cores: on a GPU leave it out")
    if devices.sync_bn and not on_gpu:
        raise UserError("--sync-bn 1 needs GPUs: torch has no CPU form of it")
    alone = devices.world_size <= 1 and not several and "RANK" not in os.environ
    if devices.compile and alone and on_gpu and gpus > 1 and not one:
        raise UserError("--compile 1 does not go with DataParallel: name one GPU by --gpu, or start ranks by torchrun")
    if devices.dist_backend == "nccl" and not on_gpu:
        raise UserError("--dist-backend nccl needs GPUs: use gloo")


def _check_ranks(devices: Devices) -> None:
    """Refuse numbers of ranks that do not fit together."""
    if devices.sync_bn and not (devices.world_size > 1 or devices.multiprocessing_distributed or "RANK" in os.environ):
        raise UserError("--sync-bn 1 needs several ranks: --multiprocessing-distributed, --world-size or torchrun")
    if devices.world_size == 0 or devices.world_size < -1:
        raise UserError(f"--world-size must be positive; got {devices.world_size}")
    size = max(devices.world_size, 1)
    env = devices.dist_url == "env://"
    if devices.rank == -1:
        wrong = devices.world_size > 1 and not env
    else:
        wrong = not 0 <= devices.rank < size and not (env and devices.world_size == -1)
    if wrong:
        raise UserError(f"--world-size {size} needs --rank between 0 and {size - 1}; got {devices.rank}")


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise UserError("--compile 1 needs a C++ compiler, as g++: install one, or leave it out") from error
