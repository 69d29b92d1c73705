"""Find which ranks this process is or starts: from options, or from a launcher's environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from classification.errors import UserError, quoted
from classification.options.devices import Devices
from classification.runs.world import device_of

# Variables with the number of a rank on its node. Without them, ranks take the GPUs of a node in turn.
LOCAL = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
EXPORTS = (
    "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID, and MASTER_ADDR and MASTER_PORT of "
    "the first node"
)


@dataclass(frozen=True)
class Place:
    """Which ranks to start here.

    Args:
        first: number of the first one.
        size: number of ranks of the whole run.
        local_size: number of ranks that this process starts.
        spawn: whether each gets a process of its own.
        env: whether they meet at MASTER_ADDR and MASTER_PORT of the environment.
        local: number of the first one on its node; it chooses the GPU.
    """

    first: int
    size: int
    local_size: int
    spawn: bool
    env: bool
    local: int = 0


def find_place(devices: Devices, env: Mapping[str, str] = os.environ) -> Place:
    """Return which ranks to start here.

    RANK, WORLD_SIZE and MASTER_ADDR together, as torchrun, Kubernetes and many Slurm scripts set them, make this
    process one rank. With --multiprocessing-distributed and --dist-url env:// they number nodes instead.

    Raises:
        UserError: the environment is of several ranks, but does not say where they meet, or which one this is.
    """
    nodes, node = devices.world_size, devices.rank
    per_node = devices.multiprocessing_distributed
    if not per_node and nodes == -1 and node == -1 and _number(env, "WORLD_SIZE", 1) > 1:
        return _of_environment(env)
    if not per_node and nodes == -1 and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in env:
        tasks = env["SLURM_STEP_NUM_TASKS"]
        raise UserError(f"srun started {tasks} tasks that do not know each other: {EXPORTS}; or start one task")
    if devices.dist_url == "env://":
        nodes = _number(env, "WORLD_SIZE", nodes) if nodes == -1 else nodes
        node = _number(env, "RANK", node) if node == -1 else node
    nodes, node = max(nodes, 1), max(node, 0)
    if per_node:
        local_size = max(torch.cuda.device_count(), 1) if device_of(devices).type == "cuda" else 1
        return Place(node * local_size, nodes * local_size, local_size, local_size > 1, False)
    return Place(node, nodes, 1, False, False, _local(env, node))


def _of_environment(env: Mapping[str, str]) -> Place:
    size = _number(env, "WORLD_SIZE", 1)
    missing = [name for name in ("RANK", "MASTER_ADDR") if name not in env]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {size}, and {' and '.join(missing)} not set: start the ranks with torchrun, set "
            "RANK, MASTER_ADDR and MASTER_PORT too, or unset WORLD_SIZE for one process"
        )
    rank = _number(env, "RANK", 0)
    if not 0 <= rank < size:
        raise UserError(f"RANK must be 0 to WORLD_SIZE - 1 = {size - 1}; got {rank}")
    return Place(rank, size, 1, False, True, _local(env, rank))


def _local(env: Mapping[str, str], rank: int) -> int:
    number = next((_number(env, name, 0) for name in LOCAL if name in env), None)
    return rank % max(torch.cuda.device_count(), 1) if number is None else number


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "").strip()
    if not text:
        return default
    try:
        return int(text)
    except ValueError as error:
        raise UserError(
            f"the environment variable {name} must be a whole number, as a launcher sets it; got {quoted(text)}: unset "
            "it, or set it to one"
        ) from error
