"""The zoo's tables can be read, and its checks tell a wrong capture from a right one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from zoo_checks.balance import best_parts, repeated_blocks
from zoo_checks.compare import Run, compare
from zoo_checks.examine import examine
from zoo_checks.judge import Subject, judge, worst
from zoo_checks.tables import EXACT, MODES, markdown, one_line
from zoo_entries import GROUPS, Entry, load_group


class Net(nn.Module):
    """Batch norm and dropout between two layers, so that seeds, buffers and modes matter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = nn.functional.dropout(self.norm(self.first(x)), 0.2, self.training)
        return {"logits": self.last(hidden)}


ENTRY = Entry("nasty", "net", Net, lambda rows: ((torch.randn(rows, 6),), {}))


def verdicts_of(change, entry=ENTRY):
    """Judge a model whose forward is ``change(model, example, x)``."""

    class Changed(nn.Module):
        def __init__(self, model, example):
            super().__init__()
            self.model, self.example = model, example

        def forward(self, x):
            return change(self.model, self.example, x)

    return judge(entry, lambda model, args, kwargs: Subject(Changed(model, args[0]), model))[0]


def failed(verdicts):
    return {name for name, verdict in verdicts.items() if not verdict["ok"]}


def always_dropping(model, example, x):
    hidden = nn.functional.dropout(model.norm(model.first(x)), 0.2, True)
    return {"logits": model.last(hidden)}


def baked_rows(model, example, x):
    hidden = model.norm(model.first(x)).view(len(example), 8)
    return {"logits": model.last(nn.functional.dropout(hidden, 0.2, model.training))}


def test_right_capture_passes_all_checks():
    verdicts = verdicts_of(lambda model, example, x: model(x))
    assert failed(verdicts) == set()
    assert all(verdict["bitwise"] and verdict["decisive"] for verdict in verdicts.values())
    assert worst(verdicts, EXACT)
    assert worst(verdicts, MODES)


def test_baked_input_fails_everywhere():
    assert failed(verdicts_of(lambda model, example, x: model(example))) == {
        *("train", "other_seed", "other_batch", "eval", "train_again"),
    }


def test_baked_number_of_rows_fails_on_another_batch_only():
    assert failed(verdicts_of(baked_rows)) == {"other_batch"}


def test_baked_mode_fails_in_evaluation_only():
    assert failed(verdicts_of(always_dropping)) == {"eval"}


def test_other_draws_fail_in_training_only():
    def change(model, example, x):
        torch.rand(1)
        return model(x)

    assert failed(verdicts_of(change)) == {"train", "other_seed", "other_batch", "train_again"}


def test_lost_gradient_fails_though_the_result_is_right():
    def change(model, example, x):
        return {"logits": model(x)["logits"] + 0 * model.last.bias.sum() - model.last.bias + model.last.bias.detach()}

    assert failed(verdicts_of(change)) == {"train", "other_seed", "other_batch", "train_again"}


def test_unwritten_buffer_fails_though_the_result_is_right():
    def change(model, example, x):
        result = model(x)
        model.norm.num_batches_tracked.fill_(0)
        return result

    details = {verdict["detail"] for verdict in verdicts_of(change).values()}
    assert details == {"buffer norm.num_batches_tracked differs"}


def test_result_of_another_type_fails():
    verdicts = verdicts_of(lambda model, example, x: [model(x)["logits"]])
    assert "built differently" in verdicts["train"]["detail"]


def test_missing_gradient_is_not_a_zero_gradient():
    zero, none = Run(gradients={"w": torch.zeros(2)}), Run(gradients={"w": None})
    assert not compare(zero, none, 1e-4, gradients=True).ok


def test_eager_error_is_not_the_captures_fault():
    entry = Entry(
        "nasty", "narrow", lambda: nn.Linear(6, 2), lambda rows: ((torch.randn(rows, 6 if rows < 3 else 5),), {})
    )
    verdicts = verdicts_of(lambda model, example, x: model(x), entry)
    assert verdicts["other_batch"]["ok"] is None
    assert "the eager model fails" in verdicts["other_batch"]["detail"]


def test_best_parts_finds_the_smallest_largest_part():
    assert best_parts([1.0] * 8) == pytest.approx(1.0)
    assert best_parts([4.0, 1, 1, 1, 1]) == pytest.approx(2.0)
    assert best_parts([0.0, 0.0]) is None


def test_repeated_blocks_are_the_most_frequent_class_with_weights():
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleList(Net() for _ in range(8)), *(nn.ReLU() for _ in range(20)))
    assert repeated_blocks(model) == [f"1.{index}" for index in range(8)]


@pytest.mark.parametrize("method", ["eager", "stagecut", "fx"])
def test_examination_writes_a_record_that_can_be_tabulated(method):
    saved = []
    record = examine(ENTRY, method, saved.append)
    assert saved[-1] is record
    assert worst(record["checks"], EXACT)
    assert one_line(record).startswith("whole")
    about = {"python": "3", "versions": {}}
    entries = {"nasty/net": {"group": "nasty", "name": "net", "methods": {method: record}}}
    assert "nasty set" in markdown(json.loads(json.dumps({"about": about, "entries": entries})))


@pytest.mark.parametrize("group", GROUPS)
def test_tables_of_entries_can_be_read(group):
    table = load_group(group)
    assert table.entries or table.missing
    assert all(entry.group == group for entry in table.entries.values())


@pytest.mark.parametrize("name", ["squeezenet1_1", "mvit_v1_b", "fcos_resnet50_fpn"])
def test_torchvision_entry_builds_and_runs(name):
    entry = load_group("torchvision").entries[name]
    args, kwargs = entry.call(entry.batch)
    with torch.no_grad():
        assert entry.build()(*args, **kwargs) is not None
