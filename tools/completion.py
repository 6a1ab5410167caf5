"""The subcommand ``partition-viz completion``: what a shell needs to complete commands, options, models and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import StagecutError
from ..runtime.schedules import TRAINING_SCHEDULES

SHELLS = ("bash", "zsh", "fish")
# What can be completed without importing torch; tests/tools/test_completion.py holds it against the registry.
MODELS = ("demo:gpt", "demo:mlp", "demo:resnet", "demo:unet")
SOURCES = ("hf:", "timm:", "torchvision:")
_MODELS = " ".join(MODELS + SOURCES)
_MODEL_FILES, _ORDER_FILES = ("*.json", "*.py"), ("*.json", "*.csv")
_SCHEDULES = " ".join((*TRAINING_SCHEDULES, "search"))

_EXAMPLES = """examples:
  partition-viz completion bash > ~/.local/share/bash-completion/completions/partition-viz
  source <(partition-viz completion bash)             (for the shell at hand)
  partition-viz completion zsh > ~/.zfunc/_partition-viz      (a folder of fpath)
  partition-viz completion fish > ~/.config/fish/completions/partition-viz.fish

exit codes: 0 done, 2 wrong arguments, or shtab is not installed
"""

_BASH = f"""
_partition_viz_words_or_files() {{ # $1 words, $2 what is typed, then patterns
  local words="$1" typed="$2" pattern
  compgen -W "$words" -- "$typed"
  for pattern in "${{@:3}}"; do
    compgen -f -X "!$pattern" -- "$typed"
  done
  compgen -d -S / -- "$typed"
}}

_partition_viz_specs() {{
  _partition_viz_words_or_files "{_MODELS}" "$1" {" ".join(map(repr, _MODEL_FILES))}
}}

_partition_viz_schedules() {{
  _partition_viz_words_or_files "{_SCHEDULES}" "$1" {" ".join(map(repr, _ORDER_FILES))}
}}
"""

# Readline ends words at colons and equals signs too: demo:resnet is put together again before it is completed, and
# what readline keeps of it is taken off the answers.
_BASH_WORDS = """
_partition_viz() {
  local -a words=("${COMP_WORDS[0]}")
  local rest="${COMP_LINE#*"${COMP_WORDS[0]}"}" index last word
  for ((index = 1; index <= COMP_CWORD; index++)); do
    word="${COMP_WORDS[index]}"
    last=$((${#words[@]} - 1))
    if [[ $rest == [[:space:]]* || $last -eq 0 ]]; then
      words+=("$word")
    elif [[ $word == "=" ]]; then
      words+=("")
    elif [[ -z ${words[last]} || ${words[last]} == *: || $word == :* ]]; then
      words[last]+="$word"
    else
      words+=("$word")
    fi
    rest="${rest#"${rest%%[![:space:]]*}"}"
    rest="${rest#"$word"}"
  done
  local -a COMP_WORDS=("${words[@]}")
  local COMP_CWORD=$((${#words[@]} - 1))
  _shtab_partition_viz
  local current="${words[COMP_CWORD]}"
  if [[ $current == *:* && $COMP_WORDBREAKS == *:* ]]; then
    COMPREPLY=("${COMPREPLY[@]#"${current%"${current##*:}"}"}")
  fi
  if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[:/] ]]; then
    compopt -o nospace 2>/dev/null || :
  fi
}

complete -o bashdefault -F _partition_viz partition-viz
"""

_ZSH = f"""
_partition_viz_specs() {{
  local -a models=({" ".join(MODELS)}) sources=({" ".join(SOURCES)})
  _alternative 'models:model:compadd -a models' 'sources:source of models:compadd -S "" -a sources' \\
    'files:file:_files -g "({"|".join(_MODEL_FILES)})"'
}}

_partition_viz_schedules() {{
  local -a schedules=({_SCHEDULES})
  _alternative 'schedules:schedule:compadd -a schedules' 'files:file:_files -g "({"|".join(_ORDER_FILES)})"'
}}
"""

_FISH = f"""
function _partition_viz_specs
  printf '%s\\n' {_MODELS}
  __fish_complete_suffix {" ".join(pattern.removeprefix("*") for pattern in _MODEL_FILES)}
end

function _partition_viz_schedules
  printf '%s\\n' {_SCHEDULES}
  __fish_complete_suffix {" ".join(pattern.removeprefix("*") for pattern in _ORDER_FILES)}
end
"""

_PREAMBLES = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def add_completion(commands: Any) -> None:
    """Add the subcommand's parser."""
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands, options and models",
        description="Print a script with which a shell completes commands, options, models and files.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def completion_text(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script for ``shell``.

    Raises:
        StagecutError: shtab is not installed.
    """
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise StagecutError(
            "completion needs shtab, which is not installed", hint='pip install "stagecut[completion]"'
        ) from error
    for action in _actions(parser):
        completed = _completed(action, shtab.FILE)
        if completed is not None:
            action.complete = completed  # type: ignore[attr-defined]  # where shtab looks for it
    script: str = shtab.complete(parser, shell, preamble=_PREAMBLES[shell])
    return f"{script.rstrip()}\n{_BASH_WORDS}" if shell == "bash" else f"{script.rstrip()}\n"


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action


def _completed(action: argparse.Action, file: dict[str, Any]) -> dict[str, Any] | None:
    """Say what completes an argument: shell functions of this module, or files."""
    if action.dest == "spec":
        return _function("_partition_viz_specs")
    if action.dest == "schedule" and action.type is None:
        return _function("_partition_viz_schedules")
    return file if action.type is Path or action.dest == "cluster" else None


def _function(name: str) -> dict[str, Any]:
    return {"bash": name, "zsh": name, "fish": f"({name})"}
