"""STAGECUT_LOGS: one line for each event, from every process; without it nobody's logging is touched."""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from spoiled import batch, spoiled

import stagecut
from stagecut.runtime.watch import logs

pytestmark = pytest.mark.usefixtures("no_workers_left")
LINE = re.compile(r"stagecut \d\d:\d\d:\d\d\.\d{3} (main|worker \d) \(pid (\d+)\) (\w+): (.+)")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    logs.configure("")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "WWWW"),
        ("info", "IIII"),
        ("debug", "DDDD"),
        ("plan", "IWWW"),
        ("plan, +workers", "IDWW"),
        ("+plan,plan", "DWWW"),
        ("info,+steps", "IIDI"),
        (" checkpoints ,", "WWWI"),
    ],
)
def test_levels_of_components(text: str, expected: str) -> None:
    assert "".join(logging.getLevelName(level)[0] for level in logs.parse(text).values()) == expected


@pytest.mark.parametrize("text", ["verbose", "+info", "plans", "plan;workers", "INFO"])
def test_other_words_are_refused_before_anything_starts(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, text)
    with pytest.raises(stagecut.ConstraintError, match="knows info, debug, plan, workers, steps, checkpoints"):
        spoiled("none", "local")


def test_a_program_that_configures_its_own_logging_hears_of_events_once(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    root = list(logging.getLogger().handlers)
    with caplog.at_level(logging.DEBUG, "stagecut"), spoiled("none", "inline") as pm:
        x, y = batch(marked=False)
        pm.step(x, target=y)
    said = [record.getMessage() for record in caplog.records]
    for start in ("captured Chain: ", "planned Chain: 3 stages", "train 1 done in ", "closed"):
        assert len([text for text in said if text.startswith(start)]) == 1, start
    assert capfd.readouterr().err == ""
    assert logging.getLogger().handlers == root


def test_a_program_without_logging_sees_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with spoiled("raise", "inline") as pm, pytest.raises(ZeroDivisionError):
        pm.step(batch(marked=True)[0], target=batch(marked=True)[1])
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:stagecut. a checkpoint was passed over")
def test_a_line_for_each_event_of_every_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stagecut.end_workers()  # new ones write to where this test looks
    monkeypatch.setenv(logs.VARIABLE, "info,+steps")
    with spoiled("raise", "local", n_stages=2) as pm:
        x, y = batch(marked=False)
        pm.step(x, target=y)
        for step in (1, 2):
            pm.save(tmp_path, step)
        (tmp_path / "step-00000002" / "manifest.json").write_text("{}")
        pm.load(tmp_path)
        pids = [w.pid for w in pm.stats().workers]
        psutil.Process(pids[1]).send_signal(signal.SIGKILL)
        with pytest.warns(UserWarning, match="the step is done again"):
            pm.step(x, target=y)
        with pytest.raises(ZeroDivisionError):
            pm.step(batch(marked=True)[0], target=batch(marked=True)[1])
        pm.restart()
    err = capfd.readouterr().err
    lines = [match.groups() for match in map(LINE.fullmatch, err.splitlines()) if match]
    assert len(lines) == len(err.splitlines()), err

    def told(where: str, component: str, start: str) -> list[str]:
        return [pid for w, pid, c, text in lines if (w, c) == (where, component) and text.startswith(start)]

    for worker, pid in enumerate(pids):
        assert told("main", "workers", f"worker {worker} started: pid {pid}")
        assert told("main", "workers", f"worker {worker} (pid {pid}) is ready")
        assert told(f"worker {worker}", "workers", "set up: stages ")[0] == str(pid)
    for component, start in (
        ("plan", "captured Chain"),
        ("plan", "planned Chain: 2 stages"),
        ("workers", "all workers set up in "),
        ("steps", "train 1 done in "),
        ("checkpoints", f"saved {tmp_path / 'step-00000002'}"),
        ("checkpoints", "passed over: "),
        ("checkpoints", f"loaded {tmp_path / 'step-00000001'}"),
        ("workers", f"worker 1 (pid {pids[1]}) lost: killed by SIGKILL"),
        ("workers", "step 2 is done again by new workers"),
        ("steps", "train 2 done in "),
        ("steps", "train 3 failed: ZeroDivisionError: "),
        ("workers", "started again after an error"),
        ("workers", "closed"),
    ):
        assert told("main", component, start), (start, err)
