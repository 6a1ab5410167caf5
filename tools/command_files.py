"""The files that a command is told of: looked at before anything is planned or measured, and named in few words."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path, PurePath

from ..errors import StagecutError

PAGES = (".html", ".htm")
EXPORTS = (".svg", ".png", ".dot", ".mmd", ".graphml", ".csv", ".json", ".trace")


def check_files(options: argparse.Namespace) -> None:
    """Refuse what would fail only after minutes: an output that cannot be written, plans beside it that are not there.

    Raises:
        StagecutError: naming the file, and what is wrong with it.
    """
    output: Path | None = getattr(options, "output", None)
    if output is not None:
        if output.is_dir():
            raise StagecutError(f"{output} is a folder", hint=f"-o {output / 'plan.html'}")
        if not output.parent.is_dir():
            missing = f"there is no folder {output.parent} to write {output.name} into"
            raise StagecutError(missing, hint=f"mkdir -p {output.parent}")
        known = {"report": (*PAGES, *EXPORTS), "export": EXPORTS}.get(options.command, ())
        if known and output.suffix.lower() not in known:
            raise StagecutError(f"{output} ends in no format that is known", hint=f"one of {', '.join(known)}")
    for path in getattr(options, "beside", None) or ():
        if not path.is_file():
            raise StagecutError(
                f"{path} is no file, and what stands beside the first is compared from files",
                hint=f"partition-viz show {path} --json > other.json",
            )


def short_names(paths: Sequence[str]) -> list[str]:
    """Name files by their ends, as short as tells them apart: pages that are passed on say no more of where they were.

    >>> short_names(["runs/a/plan.json", "runs/b/plan.json", "demo:unet"])
    ['a/plan.json', 'b/plan.json', 'demo:unet']
    """
    parts = [PurePath(path).parts or (path,) for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)
