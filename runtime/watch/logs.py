"""What is logged, and ``STAGECUT_LOGS``, which shows it: one line for each event, with the process it happened in.

The loggers are ``stagecut.plan``, ``.workers``, ``.steps`` and ``.checkpoints``. Nobody's handlers or levels are
touched unless the variable is set.
"""

from __future__ import annotations

import logging
import os
import sys

from ...errors import ConstraintError

VARIABLE = "STAGECUT_LOGS"
COMPONENTS = ("plan", "workers", "steps", "checkpoints")
_LEVELS = {"info": logging.INFO, "debug": logging.DEBUG}
_FORMAT = "stagecut %(asctime)s.%(msecs)03d %(where)s (pid %(process)d) %(component)s: %(message)s"

_TOP = logging.getLogger("stagecut")
_TOP.addHandler(logging.NullHandler())  # else Python prints warnings of a program that has configured no logging
PLAN, WORKERS, STEPS, CHECKPOINTS = (_TOP.getChild(name) for name in COMPONENTS)


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what ``sys.stderr`` is at the time, and says where a record comes from."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.setFormatter(logging.Formatter(_FORMAT, "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        record.where, record.component = self.where, record.name.rpartition(".")[2]
        self.stream = sys.stderr
        super().emit(record)


def parse(text: str) -> dict[str, int]:
    """Read a value of ``STAGECUT_LOGS``: the level of each component.

    ``info`` and ``debug`` mean all components, ``plan`` is that one's events, ``+plan`` its details too; several with
    commas between them.

    Raises:
        ConstraintError: it has another word in it.
    """
    levels = dict.fromkeys(COMPONENTS, logging.WARNING)
    for word in (part.strip() for part in text.split(",")):
        name = word.removeprefix("+")
        if word in _LEVELS:
            levels = {component: min(level, _LEVELS[word]) for component, level in levels.items()}
        elif name in COMPONENTS:
            levels[name] = min(levels[name], logging.INFO if word == name else logging.DEBUG)
        elif word:
            raise ConstraintError(
                f"{VARIABLE}={text!r} has {word!r} in it, and knows info, debug, {', '.join(COMPONENTS)}, "
                "and a component with + before it for its details",
                hint=f"{VARIABLE}=info, or {VARIABLE}=plan,+workers",
            )
    return levels


def configure(text: str | None = None, where: str | None = None) -> str:
    """Show what ``text`` (or else the environment) asks for on stderr; return it.

    ``where`` says what this process is: ``main``, or a rank of torchrun, if None.

    Raises:
        ConstraintError: it is no value of ``STAGECUT_LOGS``.
    """
    text = os.environ.get(VARIABLE, "") if text is None else text
    levels = parse(text)
    where = where or (f"rank {os.environ['RANK']}" if "TORCHELASTIC_RUN_ID" in os.environ else "main")
    attached = next((handler for handler in _TOP.handlers if isinstance(handler, _Handler)), None)
    if not text.strip():
        if attached is not None:
            _TOP.removeHandler(attached)
            _TOP.propagate = True
            for component in COMPONENTS:
                _TOP.getChild(component).setLevel(logging.NOTSET)
        return text
    if attached is None:
        attached = _Handler(where)
        _TOP.addHandler(attached)
        _TOP.propagate = False  # a program that shows all logs would show these twice
    attached.where = where
    for component, level in levels.items():
        _TOP.getChild(component).setLevel(level)
    return text
