"""How objects look in a notebook: a drawing by whatever is installed for that, else IPython's text."""

from __future__ import annotations

GROUP = "stagecut.representations"


def html_of(kind: str, value: object) -> str | None:
    """Draw ``value`` by what the entry point ``kind`` of the group ``stagecut.representations`` names.

    None where no installed package has such an entry point; IPython then shows the object's text.
    """
    from importlib.metadata import entry_points  # a tenth of a second that only a notebook has to wait for

    for point in sorted(entry_points(group=GROUP, name=kind), key=lambda point: point.value):
        drawn: str | None = point.load()(value)
        return drawn
    return None
