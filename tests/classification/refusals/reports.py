"""What no page can be made of, and places where none can be written."""

from __future__ import annotations

from classification import report
from tests.classification.refusals import Case, Place


def page(place: Place, *more: str, run: str | None = None) -> list[str]:
    """The words of a report on the run; `more` replaces what it names."""
    return [run or str(place.run), "--output", str(place.root / "page.html"), *more]


def parent(place: Place) -> list[str]:
    (place.root / "runs" / "student").mkdir(parents=True)
    place.write("runs/student/config.json", "{}")
    return page(place, run=str(place.root / "runs"))


def unfinished(place: Place) -> list[str]:
    folder = place.root / "begun"
    folder.mkdir()
    place.write("begun/config.json", "{}")
    return page(place, run=str(folder))


def unlabelled(place: Place) -> list[str]:
    folder = place.root / "pictures"
    folder.mkdir()
    first = next((place.photos / "valid").rglob("*.png"))
    place.write("pictures/one.png", first.read_bytes())
    return page(place, "--data", str(folder))


def fewer(place: Place) -> list[str]:
    data = place.copy()
    for split in ("train", "valid"):
        for path in (data / split / "sky").iterdir():
            path.unlink()
        (data / split / "sky").rmdir()
    return page(place, "--data", str(data))


CASES = [
    Case("a run that is not there", lambda p: page(p, run=str(p.root / "none")), report, process=True),
    Case("a file in the place of a run", lambda p: page(p, run=str(p.teacher)), report),
    Case("a folder that holds images", lambda p: page(p, run=str(p.photos)), report),
    Case("a folder that holds runs", parent, report),
    Case("a run without a finished epoch", unfinished, report),
    Case("a page that exists", lambda p: [str(p.run), "--output", p.write("page.html", "mine")], report),
    Case("a page in a folder that does not exist", lambda p: page(p, "--output", str(p.root / "a" / "b.html")), report),
    Case("a page whose name is a folder", lambda p: page(p, "--output", str(p.root)), report),
    Case("a page on a disk that is full", lambda p: page(p, "--output", "/dev/full", "--force"), report),
    Case("--data that is not there", lambda p: page(p, "--data", str(p.root / "none")), report),
    Case("--data without valid/", unlabelled, report),
    Case("--data of fewer classes", fewer, report),
    Case("no --output", lambda p: [str(p.run)], report),
    Case("a mistyped option of report.py", lambda p: page(p, "--dta", "photos"), report),
]
