"""The soak: after faults of several kinds in one training all losses are those of the undisturbed run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from soak import soak

KINDS = ("kill in a backward", "raise in a forward", "save and load")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_several_faults_in_one_training() -> None:
    figures = soak(steps=30, every=8, seed=6, tell=lambda text: None, kinds=KINDS)
    assert set(figures["faults"]) == set(KINDS)
    assert figures["different losses"] == 0
