"""What the system says of a child: how it ended, with what memory, and whether it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from stagecut.runtime.processes import is_stopped, peak_bytes, read_at_once, read_until_quiet, wait_for_exit


def child(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


def test_the_end_of_a_process_is_waited_for_with_its_code_and_memory() -> None:
    process = child("import sys; sys.exit(3)")
    most = wait_for_exit(process, 60.0)
    assert process.returncode == 3
    assert most is not None
    assert 2**20 < most <= max(peak_bytes(), 2**28)  # it counts on from here, and does nothing itself
    assert wait_for_exit(process, 0.0) is None, "it was waited for before"


def test_a_process_that_goes_on_is_told_apart_from_one_that_is_stopped() -> None:
    process = child("import threading; threading.Event().wait()")
    try:
        assert wait_for_exit(process, 0.05) is None
        assert process.returncode is None
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert is_stopped(process.pid)
    finally:
        process.kill()
    wait_for_exit(process, 60.0)
    assert process.returncode == -signal.SIGKILL
    assert not is_stopped(process.pid)


def test_a_pipe_is_read_until_it_is_quiet() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    try:
        assert read_at_once(reading) == ""
        assert read_until_quiet(reading, 0.01) == ""
        os.write(writing, b"first\nlast\n")
        assert read_until_quiet(reading, 60.0) == "first\nlast\n"
    finally:
        os.close(reading)
        os.close(writing)
