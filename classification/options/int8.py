"""--int8-epochs: what it needs, and what it does not work with."""

from __future__ import annotations

import importlib.util

from classification.errors import UserError
from classification.options.options import Options

ONNX = ("onnx", "onnxscript", "onnxruntime")


def missing_packages() -> list[str]:
    """Return the packages that ONNX files need and that are not installed."""
    return [name for name in ONNX if importlib.util.find_spec(name) is None]


def check_int8(options: Options, total_epochs: int) -> None:
    """Refuse what --int8-epochs does not work with.

    Args:
        options: of a training.
        total_epochs: of it.

    Raises:
        UserError: one of these.
    """
    optimisation, devices = options.optimisation, options.devices
    number = optimisation.int8_epochs
    if not number:
        return
    if number > total_epochs:
        raise UserError(f"--int8-epochs {number} is more than the {total_epochs} epochs of the run: raise --epochs")
    others = {
        f"--amp {devices.amp}": devices.amp != "off",
        "--compile 1": bool(devices.compile),
        f"--ema {optimisation.ema:g}": optimisation.ema > 0,
        "--linear-probe 1": bool(optimisation.linear_probe),
        "mutual learning": any(spec.kind.mutual for spec in options.table.values()),
    }
    if found := [name for name, given in others.items() if given]:
        raise UserError(f"--int8-epochs does not work with {' and '.join(found)}: leave one of them out")
    if missing := missing_packages():
        names = " ".join(missing)
        raise UserError(f"--int8-epochs needs {names}: `pip install {names}`, or the extra [export] of this project")
