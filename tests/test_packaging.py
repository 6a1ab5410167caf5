import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_PACKAGED = {"tests", "benchmarks", "examples", "docs", "build", "dist", "demo", "__pycache__"}


def package_folders():
    """List the folders that hold Python files of the package, as dotted names."""
    found = []
    for folder, below, files in os.walk(ROOT):
        parts = Path(folder).relative_to(ROOT).parts
        skipped = NOT_PACKAGED if not parts else {"__pycache__"}
        below[:] = [name for name in below if not name.startswith(".") and name not in skipped]
        below[:] = [name for name in below if not (Path(folder) / name / "pyvenv.cfg").exists()]
        if any(name.endswith(".py") for name in files):
            found.append(".".join(("stagecut", *parts)))
    return sorted(found)


def folder_of(package):
    return ROOT.joinpath(*package.split(".")[1:])


def run(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # A copy, because setuptools leaves build/ and *.egg-info where it builds.
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "build", "dist", "demo", "__pycache__", "*.egg-info", "pyvenv.cfg", ".venv")
    shutil.copytree(ROOT, folder / "tree", ignore=ignore)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
    run(*pip, ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), cwd=folder / "tree")
    (built,) = folder.glob("stagecut-*.whl")
    return built


def test_packages_in_pyproject_are_all_folders_with_python_files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(project["tool"]["setuptools"]["packages"]) == package_folders()


def test_every_package_folder_has_an_init():
    assert [package for package in package_folders() if not (folder_of(package) / "__init__.py").is_file()] == []


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"stagecut"}
    inside = {name for name in names if name.startswith("stagecut/")}
    expected = {
        path.relative_to(ROOT).as_posix() for package in package_folders() for path in folder_of(package).glob("*.py")
    }
    assets = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tools" / "report" / "assets").iterdir()}
    assert inside == {f"stagecut/{name}" for name in {*expected, *assets, "py.typed"}}


def test_unpacked_wheel_imports_from_its_own_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    # An editable install of the checkout puts a finder before the path; without it the wheel has to do.
    code = (
        "import sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in str(finder).lower()]\n"
        "import stagecut\n"
        "print(stagecut.__file__)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(site)
    printed = run(sys.executable, "-c", code, cwd=elsewhere, env=environment)
    assert Path(printed.strip().splitlines()[-1]).resolve() == (site / "stagecut" / "__init__.py").resolve()


@pytest.mark.parametrize("module", ["stagecut.api", "stagecut.runtime.worker"])
def test_importing_it_does_not_import_a_compiler(module: str) -> None:
    """It takes seconds, in every worker too, and only ``compile_stages`` needs it."""
    script = f"import sys, {module}; print([m for m in ('torch._dynamo', 'torch._inductor') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
