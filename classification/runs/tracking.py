"""Log a run's epochs and steps: in TensorBoard, and in trackio with --track."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from classification.runs import matchings

# TensorBoard groups by pattern of the metric's name; the first pattern that fits is used.
GROUPS = {
    r"(train|valid)_loss(_.*)?": "loss",
    r"train_top[15]|valid_.*": "accuracy",
    r"gradient_share_.*": "gradient_share",
    r".*flow_.*|.*match_seconds": "flow",
    r"train_seconds": "run",
    r"train_.*_weighted": "terms_weighted",
    r"train_.*": "terms",
}
PICTURE = (96, 240)  # largest numbers of rows and columns of a flow's picture


class Tracker(Protocol):
    """A log that gets every record of a run, on rank 0. A record maps names to numbers, and some texts."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Take the record of an epoch, a line of metrics.jsonl."""

    def step(self, record: Mapping[str, Any], number: int) -> None:
        """Take the record of the `number`th step of the run, a line of steps.jsonl."""

    def close(self) -> None:
        """Write what is not written yet."""


def tag_of(name: str) -> str:
    """Return the TensorBoard tag of a metric, GROUP/NAME."""
    group = next((group for pattern, group in GROUPS.items() if re.fullmatch(pattern, name)), "run")
    return f"{group}/{name}"


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record, without epoch and step."""
    place = ("epoch", "step")
    return {name: value for name, value in record.items() if isinstance(value, (int, float)) and name not in place}


class TensorBoard:
    """TensorBoard events in the run folder.

    Args:
        folder: the run folder.
        start: first epoch that will be written.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        from tensorboardX import SummaryWriter  # needed only by runs that write

        self.folder, self.events = folder, SummaryWriter(str(folder), purge_step=start or None)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Write the numbers of an epoch, and pictures of the flows found before it."""
        for name, value in numbers_of(record).items():
            self.events.add_scalar(tag_of(name), value, record["epoch"])
        self._add_flow(record["epoch"])
        self.events.flush()

    def step(self, record: Mapping[str, Any], number: int) -> None:
        """Write the numbers of a step under steps/."""
        for name, value in numbers_of(record).items():
            self.events.add_scalar(f"steps/{name}", value, number)

    def _add_flow(self, epoch: int) -> None:
        """Add pictures of the matching before this epoch, if there was one."""
        newest = matchings.files(self.folder)[-1:]
        with contextlib.suppress(ValueError):  # the report says which file is damaged
            for path in newest:
                matching = matchings.read_matching(path)
                for stage in matching.stages if matching.epoch == epoch else ():
                    if stage.cost is not None:
                        picture = matchings.closeness(matchings.ordered(stage, *PICTURE))
                        self.events.add_image(f"flow/{stage.name.replace(' ', '_')}", picture[None], epoch)

    def close(self) -> None:
        """Close the event file."""
        self.events.close()


class Trackio:
    """A run of trackio, named after the run folder; a run that is resumed continues it.

    Args:
        folder: the run folder.
        options: of the run.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        trackio = importlib.import_module("trackio")
        self.run = trackio.init(
            project="mgd",
            name=folder.resolve().name,
            config={name: value for name, value in options.items() if isinstance(value, (int, float, str))},
            resume="allow",
            embed=False,
        )

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of an epoch, under the tags of TensorBoard."""
        values = {tag_of(name): value for name, value in numbers_of(record).items()}
        self.run.log({"epoch": record["epoch"], **values}, step=record["epoch"])

    def step(self, record: Mapping[str, Any], number: int) -> None:
        """Log the numbers of a step under steps/."""
        self.run.log({f"steps/{name}": value for name, value in numbers_of(record).items()}, step=number)

    def close(self) -> None:
        """Send what is not sent yet."""
        self.run.finish()


def trackers(name: str, folder: Path, start: int, options: Mapping[str, Any]) -> list[Tracker]:
    """Return the trackers of a run: TensorBoard, and the one that --track names.

    Args:
        name: the value of --track.
        folder: the run folder.
        start: first epoch that will be written.
        options: of the run.
    """
    chosen: list[Tracker] = [TensorBoard(folder, start)]
    return [*chosen, Trackio(folder, options)] if name == "trackio" else chosen
