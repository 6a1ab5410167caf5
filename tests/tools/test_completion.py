import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest

from stagecut.models.registry import _DEMOS, _SOURCES
from stagecut.tools.completion import MODELS, SHELLS, SOURCES
from stagecut.tools.partition_viz import main

TIMEOUT_S = 60
needs_shtab = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('shtab')", reason="shtab is missing")
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")

# What readline makes of a line: it ends words at colons and equals signs too.
ASK = """
source "$1"
COMP_LINE="$2" COMP_POINT=${#2}
COMP_WORDS=("${@:3}") COMP_CWORD=$(($# - 3))
_partition_viz
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def script(tmp_path, capsys):
    def write(shell):
        assert main(["completion", shell]) == 0
        path = tmp_path / f"completion.{shell}"
        path.write_text(capsys.readouterr().out)
        return path

    return write


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a plan, code, a text and a folder."""
    folder = tmp_path / "work"
    (folder / "plots").mkdir(parents=True)
    for name in ("plan.json", "practice.py", "prose.txt"):
        (folder / name).touch()
    return folder


def replies(script, folder, words):
    line = "".join(word if word in (":", "=") else f"\0{word}" for word in words)
    line = line.replace(":\0", ":").replace("=\0", "=").replace("\0", " ").strip(" ")
    line += " " if words[-1] == "" else ""
    command = ["bash", "--norc", "-c", ASK, "bash", str(script), line, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


@needs_shtab
@needs_bash
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sched"], {"schedule"}),
        (["show", "demo", ":", "re"], {"resnet"}),
        (["report", "demo", ":"], {"gpt", "mlp", "resnet", "unet"}),
        (["show", "torch"], {"torchvision:"}),
        (["check", "p"], {"plan.json", "practice.py", "plots/"}),
        (["compare", "plan.json", "pl"], {"plan.json", "plots"}),
        (["export", "plan.json", "-o", "pro"], {"prose.txt"}),
        (["show", "demo", ":", "mlp", "--costs", ""], {"analytic", "measured"}),
        (["show", "demo", ":", "mlp", "--costs", "=", "me"], {"measured"}),
        (["show", "demo", ":", "mlp", "--schedule", "zb"], {"zb-h1", "zb-h2", "zb-v"}),
        (["show", "demo", ":", "mlp", "--cost"], {"--costs"}),
        (["completion", ""], set(SHELLS)),
    ],
)
def test_bash_completes_commands_options_models_and_files(script, folder, words, expected):
    assert replies(script("bash"), folder, ["partition-viz", *words]) == expected


@needs_shtab
@needs_bash
def test_a_tab_in_bash_completes_the_name_after_the_colon(script):
    path = script("bash")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "PS1": "ready> ", "INPUTRC": "/dev/null"}
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        os.write(ours, f"source {path}; echo so''urced\n".encode())
        read_until(ours, b"sourced\r\n")
        os.write(ours, b"partition-viz show demo:res\t")
        assert b"demo:resnet" in read_until(ours, b"demo:resnet")
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


def read_until(descriptor, wanted):
    """Read from a terminal until ``wanted`` was in it."""
    seen, end = b"", time.monotonic() + TIMEOUT_S
    while wanted not in seen and time.monotonic() < end:
        if select.select([descriptor], [], [], 1.0)[0]:
            seen += os.read(descriptor, 4096)
    return seen


@needs_shtab
@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_can_read_its_script(script, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    done = subprocess.run([shell, "-n", script(shell)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@needs_shtab
@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_know_commands_models_and_schedules(script, shell):
    text = script(shell).read_text()
    for part in ("compare", "memory-gib", "demo:resnet", "zb-h1"):
        assert part in text
    assert text == script(shell).read_text()


@needs_shtab
def test_fish_completes_models(script):
    if shutil.which("fish") is None:
        pytest.skip("there is no fish")
    code = f"source {script('fish')}; complete -C 'partition-viz show demo:re'"
    done = subprocess.run(["fish", "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert done.stdout.startswith("demo:resnet")


def test_the_models_are_those_of_the_registry():
    assert [f"demo:{name}" for name in sorted(_DEMOS)] == list(MODELS)
    assert {f"{source}:" for source in _SOURCES} == {*SOURCES, "demo:"}


def test_without_shtab_the_pip_line_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    captured = capsys.readouterr()
    assert 'try: pip install "stagecut[completion]"' in captured.err
    assert captured.out == ""


def test_a_shell_that_is_not_known_names_those_that_are(capsys):
    assert main(["completion", "powershell"]) == 2
    assert "bash" in (said := capsys.readouterr().err)
    assert "zsh" in said


@needs_shtab
def test_the_script_does_not_wait_for_torch():
    code = "import sys; from stagecut.tools.partition_viz import main; main(['completion', 'bash']); "
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=TIMEOUT_S, check=True)
