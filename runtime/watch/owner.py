"""The process that a pipeline belongs to: what is forked from it shares its sockets and must leave them alone."""

from __future__ import annotations

import os

from ...errors import StagecutError


class Owner:
    """The process in which it was made."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    def check(self, what: str) -> None:
        """Refuse ``what`` in a process that was forked from this one.

        Raises:
            StagecutError: it is another process.
        """
        if os.getpid() != self.pid:
            raise StagecutError(
                f"{what} is not for process {os.getpid()}, which was forked from process {self.pid} after "
                f"stagecut.compile: the workers serve process {self.pid} alone",
                hint="call stagecut.compile(...) in the process that trains, after the fork",
            )
