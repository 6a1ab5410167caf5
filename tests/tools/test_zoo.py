"""Models of libraries that are not always installed, through the whole command."""

import importlib.util
import json
import sys

import pytest

from stagecut.partitioner.plan import parse
from stagecut.tools.partition_viz import main

PLACE = ["--devices", "2", "--stages", "2", "--microbatches", "2", "--schedule", "1f1b", "--batch", "4"]


@pytest.mark.parametrize(
    ("package", "spec", "model"),
    [
        ("transformers", "hf:gpt2", "GPT2LMHeadModel"),
        ("transformers", "hf:bert", "BertForMaskedLM"),
        ("transformers", "hf:t5", "T5ForConditionalGeneration"),
        ("timm", "timm:resnet18", "ResNet"),
        ("timm", "timm:vit_tiny_patch16_224", "VisionTransformer"),
    ],
)
def test_a_model_of_a_library_is_planned_and_stdout_is_the_plan(package, spec, model, capfd):
    pytest.importorskip(package)
    assert main(["show", spec, *PLACE, "--json"]) == 0
    plan = parse(json.loads(capfd.readouterr().out))
    assert plan.model == model
    assert len(plan.stages) == 2
    assert all(any(op.stage == stage.index for op in plan.ops) for stage in plan.stages)
    assert plan.wires


@pytest.mark.parametrize(
    ("package", "spec", "near"), [("transformers", "hf:gptt2", "hf:gpt2"), ("timm", "timm:resnt18", "timm:resnet18")]
)
def test_an_unknown_name_is_2_with_the_nearest_ones(package, spec, near, capsys):
    pytest.importorskip(package)
    assert main(["show", spec, *PLACE]) == 2
    captured = capsys.readouterr()
    assert near in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(("package", "spec"), [("transformers", "hf:gpt2"), ("timm", "timm:resnet18")])
def test_a_library_that_is_not_installed_is_2_with_its_pip_line(package, spec, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["show", spec, *PLACE]) == 2
    assert f"try: pip install {package}" in capsys.readouterr().err
