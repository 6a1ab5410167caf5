"""The models written to be hard to capture: those of tests/support/nasty_models.py, where that file is there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from .entry import Entry, Table, table_of

_SUPPORT = Path(__file__).resolve().parents[2] / "tests" / "support"
_MODULE = "nasty_models"


def load() -> Table:
    """Wrap the nasty set."""
    if str(_SUPPORT) not in sys.path:
        sys.path.insert(0, str(_SUPPORT))
    if importlib.util.find_spec(_MODULE) is None:
        return table_of([], {"nasty": f"there is no {_MODULE}.py in tests/support"})
    nasty: dict[str, Any] = importlib.import_module(_MODULE).NASTY
    return table_of([_entry(name, case) for name, case in nasty.items()])


def _entry(name: str, case: Any) -> Entry:
    return Entry(
        group="nasty",
        name=name,
        build=case.build,
        call=lambda rows: (tuple(case.args(rows)), dict(case.kwargs(rows))),
        batch=4,
        other_batch=6 if case.other_rows else None,
        modes=case.modes,
        copies=case.copies,
        unjudged="" if case.deterministic else "equal seeds do not give equal results",
        reset=case.reset,
    )
