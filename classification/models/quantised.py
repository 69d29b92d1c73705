"""Quantise an ONNX file to int8 by onnxruntime's static quantisation."""

from __future__ import annotations

import contextlib
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classification.models.exporting import describe_onnx, suppress_output

METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
# Processor instructions that add products of bytes without saturation, best first: flag in /proc/cpuinfo -> name.
INT8_INSTRUCTIONS = {
    "amx_int8": "AMX int8",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "asimddp": "NEON dot product",
}


def wide_instructions(cpuinfo: str = "/proc/cpuinfo") -> list[str]:
    """Return the names of this processor's instructions that add products of bytes without saturation."""
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path(cpuinfo).read_text(errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                flags |= set(line.split())
    names = [name for flag, name in INT8_INSTRUCTIONS.items() if flag in flags]
    return names or (["NEON dot product"] if platform.machine() == "arm64" else [])  # Apple's processors


def instruction_set() -> str:
    """Describe the instructions that int8 uses on this processor."""
    names = wide_instructions()
    widest = torch.backends.cpu.get_cpu_capability()
    return f"{widest} with {', '.join(names)}" if names else f"{widest} without VNNI"


def to_int8(
    model: bytes,
    batches: Sequence[Tensor],
    metadata: dict[str, str],
    *,
    method: str = "minmax",
    reduce_range: bool = False,
    scales: Mapping[str, tuple[float, int]] | None = None,
) -> bytes:
    """Quantise an ONNX file: QDQ format, weights per output channel, activations per tensor.

    Args:
        model: the float file.
        batches: calibration images, prepared as input of the file.
        metadata: the description of the file.
        method: how ranges of activations are found: a key of `METHODS`.
        reduce_range: whether weights have 7 bits, for processors whose sums of products saturate.
        scales: {tensor: (scale, zero point)} of tensors that need no calibration.
    """
    import onnx

    quantised = onnx.load_from_string(
        quantise(fold_batch_norms(model), batches, method=method, reduce_range=reduce_range, scales=scales)
    )
    describe_onnx(quantised, metadata)
    content: bytes = quantised.SerializeToString()
    return content


def fold_batch_norms(model: bytes) -> bytes:
    """Fold the batch norms of an ONNX file, as `quantise` needs it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, suppress_output():
        source, target = Path(folder, "float.onnx"), Path(folder, "prepared.onnx")
        source.write_bytes(model)
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
        return target.read_bytes()


def quantise(
    model: bytes,
    batches: Sequence[Tensor],
    *,
    method: str = "minmax",
    reduce_range: bool = False,
    scales: Mapping[str, tuple[float, int]] | None = None,
) -> bytes:
    """Quantise a prepared ONNX file; see `to_int8`."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    overrides = {
        name: [{"scale": np.array(scale, np.float32), "zero_point": np.array(zero, np.uint8)}]
        for name, (scale, zero) in (scales or {}).items()
    }
    with tempfile.TemporaryDirectory() as folder, suppress_output():
        source, target = Path(folder, "prepared.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(model)
        quantize_static(
            source,
            target,
            _reader(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[METHODS[method]],
            extra_options={
                "CalibStridedMinMax": 1,  # keep the values of one batch only, as all would fill the memory
                "TensorQuantOverrides": overrides,
            },
        )
        return target.read_bytes()


def _reader(batches: Sequence[Tensor]) -> Any:
    """Return calibration images in the form that onnxruntime needs."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # it is untyped
        def __len__(self) -> int:
            return len(batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.remaining = iter(batches[start_index:end_index])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.remaining, None)
            return None if batch is None else {"images": batch.numpy()}

    return Reader()
