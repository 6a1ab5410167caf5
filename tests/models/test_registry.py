import dataclasses
import pickle
import sys
from types import SimpleNamespace

import cloudpickle
import pytest
import torch
from torch import nn

from stagecut.errors import StagecutError
from stagecut.models import LoadedModel, ModelSpecError, load_model
from stagecut.models.registry import classification_loss, makes_own_batch

FILE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn
from neighbour_of_the_model import WIDTH

@dataclass
class Config:
    width: int = WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(Config().width, 2)
    def forward(self, x):
        return self.layer(x)

def build():
    return Net()

def build_with_inputs():
    return Net(), (torch.ones(4, WIDTH),)

def build_number():
    return 3

limit = 5
"""


@pytest.fixture
def model_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "neighbour_of_the_model", None)
    del sys.modules["neighbour_of_the_model"]
    (tmp_path / "neighbour_of_the_model.py").write_text("WIDTH = 3\n")
    path = tmp_path / "network.py"
    path.write_text(FILE)
    return path


def refused(spec, **options):
    with pytest.raises(ModelSpecError) as caught:
        load_model(spec, **options)
    return caught.value


@pytest.mark.parametrize("name", ["resnet", "unet", "gpt", "mlp"])
def test_demo_batch_runs_through_model_and_loss(name):
    loaded = load_model(f"demo:{name}", batch_rows=3)
    assert loaded.name == f"demo:{name}"
    assert len(loaded.example_inputs[0]) == len(loaded.example_target) == 3
    loss = loaded.loss_fn(loaded.module(*loaded.example_inputs, **loaded.example_kwargs), loaded.example_target)
    loss.backward()
    assert loss.shape == ()
    assert loss.isfinite()


def test_demo_has_a_default_batch_that_is_always_the_same():
    first, second = load_model("demo:resnet"), load_model("demo:resnet")
    assert first.example_inputs[0].shape == (64, 1, 8, 8)
    assert torch.equal(first.example_inputs[0], second.example_inputs[0])


def test_loading_leaves_the_example_batch_out_of_the_global_generator():
    torch.manual_seed(0)
    small = load_model("demo:mlp", batch_rows=1).module
    torch.manual_seed(0)
    large = load_model("demo:mlp", batch_rows=9).module
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), large.parameters()))


def test_loaded_model_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoadedModel("one", nn.Identity()).name = "two"


@pytest.mark.parametrize("name", ["resnet", "unet", "gpt", "mlp"])
def test_demo_loss_can_be_sent_to_a_worker(name):
    loss_fn = load_model(f"demo:{name}", batch_rows=1).loss_fn
    assert pickle.loads(pickle.dumps(loss_fn)) is loss_fn


def test_torchvision_model_comes_with_an_image_batch():
    loaded = load_model("torchvision:squeezenet1_1", batch_rows=2)
    assert type(loaded.module).__name__ == "SqueezeNet"
    assert loaded.example_inputs[0].shape == (2, 3, 224, 224)
    assert load_model("torchvision:mnasnet0_5").example_inputs[0].shape[0] == 8


def test_inception_gets_the_larger_images_it_needs():
    with torch.device("meta"):
        loaded = load_model("torchvision:inception_v3", batch_rows=1)
    assert loaded.example_inputs[0].shape[2:] == (299, 299)


def test_classification_loss_adds_auxiliary_logits_at_a_smaller_weight():
    zeros, target = torch.zeros(2, 4), torch.tensor([0, 1])
    single = classification_loss(zeros, target)
    torch.testing.assert_close(classification_loss((zeros, zeros, None), target), 1.3 * single)


@pytest.mark.parametrize(
    ("spec", "suggestion"),
    [
        ("demo:rsnet", "demo:resnet"),
        ("demo:something-else-entirely", "demo:unet"),
        ("torchvision:resnet5", "torchvision:resnet50"),
        ("torchvison:resnet18", "torchvision:"),
        ("torch.nm:Linear", "torch.nn"),
        ("torch.nn:Linea", "torch.nn:Linear"),
        ("resnet", "demo:resnet"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest_ones(spec, suggestion):
    assert suggestion in refused(spec).hint.split(", ")


@pytest.mark.parametrize(
    ("package", "spec", "suggestion"),
    [
        ("transformers", "hf:google-bert/bert-base-uncased", "hf:bert"),
        ("transformers", "hf:meta-llama/Llama-2-7b", "hf:llama"),
        ("transformers", "hf:gpt-2", "hf:gpt2"),
        ("timm", "timm:resnet50.a1_in1k", "timm:resnet50"),
        ("timm", "timm:resnt18", "timm:resnet18"),
    ],
)
def test_a_name_of_a_hub_is_answered_with_the_type_or_model_it_begins_with(package, spec, suggestion):
    pytest.importorskip(package)
    assert suggestion in refused(spec).hint.split(", ")


def test_a_spec_error_is_a_stagecut_error_that_prints_its_hint():
    error = refused("demo:mpl")
    assert isinstance(error, StagecutError)
    assert str(error) == "there is no demo model 'mpl'\n  try: demo:mlp"


@pytest.mark.parametrize("spec", ["", ":", "demo:", ":resnet"])
def test_a_spec_without_source_or_name_is_refused(spec):
    assert "expected SOURCE:NAME" in refused(spec).message


def test_a_batch_without_rows_is_refused():
    assert "got 0" in refused("demo:mlp", batch_rows=0).message


@pytest.mark.parametrize(("spec", "package"), [("timm:resnet18", "timm"), ("hf:gpt2", "transformers")])
def test_a_missing_optional_package_is_named_with_its_pip_line(spec, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert refused(spec).hint == f"pip install {package}"


def test_timm_model_gets_images_of_its_own_size(monkeypatch):
    module = nn.Conv2d(1, 2, 3)
    module.default_cfg, module.num_classes = {"input_size": (1, 40, 40)}, 2
    timm = SimpleNamespace(__spec__=object(), list_models=lambda: ["tiny"], create_model=lambda *_, **__: module)
    monkeypatch.setitem(sys.modules, "timm", timm)
    loaded = load_model("timm:tiny", batch_rows=3)
    assert loaded.module is module
    assert loaded.example_inputs[0].shape == (3, 1, 40, 40)
    assert refused("timm:tinny").hint == "timm:tiny"


def test_file_function_gives_the_module(model_file):
    loaded = load_model(f"{model_file}:build")
    assert type(loaded.module).__name__ == "Net"
    assert loaded.example_inputs == ()
    assert loaded.loss_fn is None


def test_file_function_may_add_example_inputs(model_file):
    loaded = load_model(f"{model_file}:build_with_inputs")
    assert loaded.module(*loaded.example_inputs).shape == (4, 2)


def test_file_is_read_again_after_a_change(model_file):
    load_model(f"{model_file}:build")
    model_file.write_text(FILE.replace("nn.Linear(Config().width, 2)", "nn.Linear(7, 6)"))
    assert load_model(f"{model_file}:build").module.layer.in_features == 7


def test_module_from_a_file_can_be_sent_to_a_process_that_does_not_have_the_file(model_file):
    module = load_model(f"{model_file}:build").module
    sent = cloudpickle.dumps(module)
    model_file.unlink()
    del sys.modules[type(module).__module__]
    assert cloudpickle.loads(sent)(torch.ones(5, 3)).shape == (5, 2)


def test_module_function_is_found_by_dotted_name(model_file, monkeypatch):
    monkeypatch.syspath_prepend(model_file.parent)
    assert type(load_model("network:build").module).__name__ == "Net"


def test_module_function_is_found_in_the_current_folder(model_file, monkeypatch):
    (model_file.parent / "only_in_this_folder.py").write_text("from torch.nn import Identity as build\n")
    monkeypatch.chdir(model_file.parent)
    assert isinstance(load_model("only_in_this_folder:build").module, nn.Identity)


def test_wrong_file_and_function_names_are_answered_with_the_nearest_ones(model_file):
    assert refused(f"{model_file.parent}/netwrk.py:build").hint.split(", ")[0] == str(model_file)
    assert refused(f"{model_file}:biuld").hint.split(", ")[0] == f"{model_file}:build"
    assert "no function 'limit'" in refused(f"{model_file}:limit").message


def test_a_function_that_returns_no_module_is_refused(model_file):
    assert "returned int" in refused(f"{model_file}:build_number").message


def test_a_missing_import_inside_the_file_is_shown_as_it_is(model_file):
    model_file.write_text("import a_module_that_is_not_there")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        load_model(f"{model_file}:build")


def test_a_batch_size_for_a_function_is_refused(model_file):
    assert "makes its own example inputs" in refused(f"{model_file}:build", batch_rows=2).message


@pytest.mark.parametrize(
    ("spec", "own"), [("demo:mlp", False), ("hf:bert", False), ("train.py:build", True), ("package.module:build", True)]
)
def test_functions_make_their_own_batch(spec, own):
    assert makes_own_batch(spec) is own
