import doctest
import importlib
from dataclasses import replace

import pytest

from stagecut.tools.words import clean, columns, memory, shorten, size

MODULES = ("words", "fold", "graph_layout", "style", "svg_parts", "draw_timeline", "report.tree", "compare")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name):
    result = doctest.testmod(importlib.import_module(f"stagecut.tools.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(("n_bytes", "said"), [(999, "999 B"), (1000, "0.977 KiB"), (1 << 20, "1 MiB")])
def test_sizes_have_three_digits_and_a_unit(n_bytes, said):
    assert size(n_bytes) == said


@pytest.mark.parametrize("name", ["a\x00b", "\x1b]0;title\x07", "line\nbreak", "\ud800", "\u202ebackwards"])
def test_clean_names_are_printable_and_can_be_written(name):
    assert clean(name).isprintable()
    assert clean(clean(name)) == clean(name)
    assert clean(name).encode()


def test_wide_characters_count_twice_when_a_name_is_cut():
    assert columns(shorten("模型模型模型", 6)) <= 6


def test_a_limit_that_is_none_is_said(plan):
    assert memory(replace(plan.stages[0], memory_bytes=1024, memory_limit_bytes=2.0**62)) == "1 KiB, no limit"
