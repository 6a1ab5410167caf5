"""The published JSON Schema of plans says what is read, by a validator of its own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

import stagecut
from stagecut.errors import PlanError
from stagecut.partitioner.plan import parse, schema
from stagecut.records import to_json
from stagecut.tools.partition_viz import main


@pytest.fixture(scope="module")
def value() -> Any:
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.Tanh())))
    options: dict[str, Any] = {"replicas": 2, "microbatches": 4, "costs": "analytic", "loss_fn": nn.functional.mse_loss}
    options |= {"example_inputs": (torch.randn(16, 8),), "example_target": torch.randn(16, 8)}
    return to_json(stagecut.plan(model, ["cpu"] * 4, **options))


def test_the_schema_is_published(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = (repository / "docs" / "plan.schema.json").read_text()
    assert json.loads(published) == schema(), "partition-viz schema > docs/plan.schema.json"
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == published


def test_a_plan_satisfies_it(value: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(json.loads(json.dumps(value)), schema())


@pytest.mark.parametrize(
    "damage",
    [
        lambda plan: plan.update(format=1),
        lambda plan: plan.pop("stages"),
        lambda plan: plan.update(unknown=1),
        lambda plan: plan["ops"][0].update(stage="0"),
        lambda plan: plan["ops"][0].update(source=3),
        lambda plan: plan["stages"][0].update(recompute=0),
        lambda plan: plan["timing"].update(loss_s=[1.0]),
        lambda plan: plan["prediction"].update(optimal=None),
        lambda plan: plan["stages"][0]["workers"].append(None),
    ],
)
def test_what_is_refused_does_not_satisfy_it(value: Any, damage: Any) -> None:
    plan = copy.deepcopy(value)
    damage(plan)
    with pytest.raises(PlanError):
        parse(plan)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(plan, schema())
