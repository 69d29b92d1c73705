"""int8: an ONNX file whose weights and activations are bytes, by onnxruntime's static quantisation."""

from __future__ import annotations

import contextlib
import io
import logging
import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classification.models.exporting import describe_onnx

METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
# Instructions that add products of bytes without saturation, as /proc/cpuinfo names them, best first.
WIDE = {"amx_int8": "AMX int8", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX VNNI", "asimddp": "NEON dot product"}


def wide_instructions(cpuinfo: str = "/proc/cpuinfo") -> list[str]:
    """Return the names of this processor's instructions that add products of bytes without saturation."""
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path(cpuinfo).read_text(errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                flags |= set(line.split())
    found = [name for flag, name in WIDE.items() if flag in flags]
    return found or (["NEON dot product"] if platform.machine() == "arm64" else [])  # Apple's processors


def instruction_set() -> str:
    """Return the instructions that int8 runs on here, in words."""
    found = wide_instructions()
    widest = torch.backends.cpu.get_cpu_capability()
    return f"{widest} with {', '.join(found)}" if found else f"{widest} without VNNI"


def to_int8(
    model: bytes,
    batches: Sequence[Tensor],
    said: dict[str, str],
    *,
    method: str = "minmax",
    reduce_range: bool = False,
) -> bytes:
    """Quantise an ONNX file: QDQ format, weights per output channel, activations per tensor.

    Args:
        model: the float file.
        batches: calibration images as the file takes them.
        said: the description of the file.
        method: how ranges of activations are found: a key of `METHODS`.
        reduce_range: weights of 7 bits, for processors whose sums of products saturate.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, prepared, target = (Path(folder, f"{name}.onnx") for name in ("float", "prepared", "int8"))
        source.write_bytes(model)
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            _reader(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[METHODS[method]],
            extra_options={"CalibStridedMinMax": 1},  # a batch at a time, by every method: all would fill the memory
        )
        quantised = onnx.load(target)
    describe_onnx(quantised, said)
    content: bytes = quantised.SerializeToString()
    return content


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the progress that onnxruntime prints, and its warnings of every tensor without channels."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _reader(batches: Sequence[Tensor]) -> Any:
    """Return calibration images in the form that onnxruntime asks for."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # it is untyped
        def __len__(self) -> int:
            return len(batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(batches[start_index:end_index])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {"images": batch.numpy()}

    return Reader()
