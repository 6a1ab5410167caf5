"""The fuzz targets in short: readers give a valid object or refuse, whatever the bytes."""

from __future__ import annotations

import importlib.util
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import fuzz_checkpoints
import fuzz_plans
from fuzz_documents import Choices, mutated, only_reading

INPUTS = st.tuples(st.integers(0, 255), st.binary(max_size=24)).map(lambda drawn: bytes([drawn[0]]) + drawn[1])


@pytest.fixture(autouse=True, scope="module")
def _memory_stays_small() -> Iterator[None]:
    """Fail where a reader has taken far more memory than its files."""
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6 << 20, "in KiB"


@pytest.mark.parametrize("module", [fuzz_plans, fuzz_checkpoints], ids=["plan", "checkpoint"])
def test_the_seed_corpus_has_what_is_accepted_and_what_is_refused(module: object) -> None:
    assert {module.run(data) for data in module.seeds().values()} == {True, False}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", fuzz_plans.TARGETS)
def test_the_files_of_each_kind_are_accepted_as_they_stand(name: str) -> None:
    assert fuzz_plans.TARGETS[name](Choices(b""))


@settings(max_examples=400, derandomize=True)
@given(INPUTS)
def test_any_file_gives_a_whole_object_or_is_refused(data: bytes) -> None:
    event("accepted" if fuzz_plans.run(data) else "refused")


@settings(max_examples=150, derandomize=True)
@given(INPUTS)
def test_any_checkpoint_is_read_whole_or_refused(data: bytes) -> None:
    event("accepted" if fuzz_checkpoints.run(data) else "refused")


def test_a_reader_that_runs_or_writes_something_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="more than read"), only_reading():
        eval("1 + 1")
    with pytest.raises(AssertionError, match="more than read"), only_reading():
        (tmp_path / "written").write_text("")


def test_equal_bytes_make_equal_mistakes() -> None:
    document = {"a": [1, 2, {"b": 0.5}], "c": "x"}
    made = [repr(mutated(document, Choices(bytes([n % 7, n % 5, n % 3, n])))) for n in range(200) for _ in range(2)]
    assert made[::2] == made[1::2]
    assert len(set(made)) > 20
    assert document == {"a": [1, 2, {"b": 0.5}], "c": "x"}


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_atheris_drives_a_target(repository: Path, tmp_path: Path) -> None:
    script = repository / "benchmarks" / "fuzz.py"
    command = [sys.executable, str(script), "checkpoint", "--seconds", "1", "--corpus", str(tmp_path / "corpus")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.fullmatch(r"checkpoint: ([\d,]+) runs, coverage .* edges, \d+ inputs kept; nothing found\n", done.stdout)
    assert found is not None, done.stdout
    n_seeds = len(fuzz_checkpoints.seeds())
    assert int(found[1].replace(",", "")) >= n_seeds
    assert len(list((tmp_path / "corpus").iterdir())) >= n_seeds
