"""--optimizer dot: what it does not work with."""

from __future__ import annotations

from classification.errors import UserError
from classification.options.options import Options


def check_dot(options: Options) -> None:
    """Refuse what does not work with two momenta.

    Raises:
        UserError: one of these.
    """
    optimisation, table = options.optimisation, options.table
    low, high = (optimisation.momentum + sign * optimisation.dot_delta for sign in (-1, 1))
    if low < 0 or high >= 1:
        raise UserError(
            f"--optimizer dot needs momenta of at least 0 and below 1; --momentum {optimisation.momentum:g} and "
            f"--dot-delta {optimisation.dot_delta:g} make {low:g} and {high:g}"
        )
    if optimisation.clip_gradients is not None:
        raise UserError(
            "--optimizer dot keeps two gradients, which --clip-gradients cannot clip: leave out one of the two options"
        )
    if len({spec.kind.alone for spec in table.values()}) < 2:
        raise UserError(
            "--optimizer dot separates the gradients of labels and teachers, but this run has only "
            f"{' and '.join(table)}"
        )
    if options.devices.amp == "fp16":
        raise UserError("--optimizer dot does not work with --amp fp16, which scales gradients: use --amp bf16 or off")
