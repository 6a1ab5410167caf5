import subprocess
import sys
import textwrap

import pytest
import torch

from stagecut.errors import StagecutError
from stagecut.vision_compat import import_torchvision


def run(code, *path):
    """Run ``code`` in a process that has not imported torchvision yet; return the words it prints."""
    setup = f"import sys; sys.path[:0] = {[*path, *filter(None, sys.path)]!r}\n"
    result = subprocess.run(
        [sys.executable, "-c", setup + textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.fixture
def fake_torchvision(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchvision").mkdir()
    yield tmp_path / "torchvision" / "__init__.py"
    sys.modules.pop("torchvision", None)


def test_import_gives_usable_models_and_the_same_module_again():
    code = """
        import torch
        from stagecut.vision_compat import import_torchvision
        first = import_torchvision()
        import torchvision
        assert first is import_torchvision() is torchvision
        print(*torchvision.models.squeezenet1_1().eval()(torch.zeros(1, 3, 32, 32)).shape)
    """
    assert run(code) == ["1", "1000"]


def test_only_the_missing_operator_is_declared_also_after_a_plain_import_failed(tmp_path):
    (tmp_path / "torchvision.py").write_text(
        "import torch\n"
        "if not hasattr(torch.ops.torchvision, 'qnms'):\n"
        "    raise RuntimeError('operator torchvision::qnms does not exist')\n"
    )
    code = """
        import torch
        own = torch.library.Library("torchvision", "FRAGMENT")
        own.define("nms(Tensor dets) -> Tensor")
        try:
            import torchvision
        except RuntimeError:
            pass
        from stagecut.vision_compat import import_torchvision
        import_torchvision()
        for operator in (torch.ops.torchvision.nms, torch.ops.torchvision.qnms):
            print(len(operator.default._schema.arguments))
    """
    assert run(code, str(tmp_path)) == ["1", "3"]


def test_a_torchvision_that_works_gets_no_declarations(fake_torchvision, monkeypatch):
    fake_torchvision.write_text("value = 7")
    monkeypatch.setattr(torch.library, "Library", lambda *_: pytest.fail("declared an operator"))
    assert import_torchvision().value == 7


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("raise RuntimeError('compiled with different CUDA major versions')", RuntimeError),
        ("import a_module_that_is_not_there", ModuleNotFoundError),
    ],
)
def test_other_failures_of_torchvision_are_not_hidden(fake_torchvision, source, error):
    fake_torchvision.write_text(source)
    with pytest.raises(error, match=r"different CUDA|a_module_that_is_not_there"):
        import_torchvision()


def test_a_missing_torchvision_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(StagecutError) as caught:
        import_torchvision()
    assert caught.value.hint == "pip install torchvision"
