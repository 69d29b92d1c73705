"""The cost of a network: parameters, bytes, multiplications, and measured latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from classification.models.quantised import instruction_set

SIZES = (1, 32)  # batch sizes whose latency is measured
SECONDS = 0.5  # spent on each of them, at least

Context = Callable[[], AbstractContextManager[Any]]


def measure_costs(
    networks: Mapping[str, tuple[nn.Module, int]], context: Context = nullcontext
) -> dict[str, dict[str, Any]]:
    """Measure networks; their latencies are measured in turn.

    Args:
        networks: {role: (network in eval mode, side of its images in pixels)}, all on one device.
        context: context manager for mixed precision.

    Returns:
        By role: `parameters`; `bytes` and `megabytes` of parameters and buffers; `macs` per image; `latency_ms`, the
        median milliseconds of a batch by batch size, None if memory ran out; and of the machine `device`, `threads`,
        `instructions`.
    """
    results: dict[str, dict[str, Any]] = {
        role: {**count_parameters(network), "macs": count_macs(network, px)} for role, (network, px) in networks.items()
    }
    for entry in results.values():
        entry["latency_ms"] = {}
    for batch in SIZES:
        calls = [partial(_run, network, _images(network, batch, px), context) for network, px in networks.values()]
        try:
            times: Sequence[float | None] = median_times(calls, seconds=SECONDS)
        except torch.OutOfMemoryError:
            times = [None] * len(calls)
        for entry, milliseconds in zip(results.values(), times, strict=True):
            entry["latency_ms"][str(batch)] = milliseconds
    for role, (network, _) in networks.items():
        results[role] |= describe_machine(_device(network))
    return results


def count_parameters(network: nn.Module) -> dict[str, float]:
    """Return `parameters`, and the `bytes` and `megabytes` of parameters and buffers."""
    total = sum(value.nbytes for value in (*network.parameters(), *network.buffers()))
    parameters = sum(value.numel() for value in network.parameters())
    return {"parameters": parameters, "bytes": total, "megabytes": total / 1e6}


@torch.no_grad()
def count_macs(network: nn.Module, px: int) -> int | None:
    """Count the multiplications of convolutions, matrix products and attention for one image; None if that fails.

    torch's counter counts a multiplication and its addition as two operations, so its result is halved.

    Args:
        network: in eval mode.
        px: side of the image in pixels.
    """
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    images = _images(network, 1, px)
    try:
        with _no_fast_attention(), FlopCounterMode(display=False) as counter:
            network(images)
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):  # for example a compiled network
        return None
    return int(counter.get_total_flops()) // 2


@contextmanager
def _no_fast_attention() -> Iterator[None]:
    """Make torch's attention layers use operators that the counter knows."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def median_times(
    calls: Sequence[Callable[[], object]],
    *,
    seconds: float,
    max_calls: int = 50,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the median milliseconds of each call, measured in turn after two calls to warm up.

    Args:
        calls: the functions to measure.
        seconds: total time to measure; each function is called at least three times.
        max_calls: largest number of calls of each function.
        clock: returns seconds.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in (*calls, *calls):
        call()
    end = clock() + seconds
    while len(times[0]) < 3 or (len(times[0]) < max_calls and clock() < end):
        for call, times_of_call in zip(calls, times, strict=True):
            start = clock()
            call()
            times_of_call.append(1000 * (clock() - start))
    return [statistics.median(times_of_call) for times_of_call in times]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the facts of the machine that latencies depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads(), "instructions": instruction_set()}


@torch.inference_mode()
def _run(network: nn.Module, images: Tensor, context: Context) -> None:
    with context():
        network(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def _images(network: nn.Module, count: int, px: int) -> Tensor:
    weights = [value for value in network.parameters() if value.ndim == 4]
    images = torch.zeros(count, 3, px, px, device=_device(network))
    last = bool(weights) and all(value.is_contiguous(memory_format=torch.channels_last) for value in weights)
    return images.contiguous(memory_format=torch.channels_last) if last else images


def _device(network: nn.Module) -> torch.device:
    return next((value.device for value in network.parameters()), torch.device("cpu"))
