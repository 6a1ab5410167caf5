"""Values of a model's tensors in safetensors files, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError


class Files:
    """Safetensors files; nothing is read before it is asked for."""

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        """Take the file of each tensor, and its key there."""
        self._places = places

    @classmethod
    def of(cls, files: Iterable[Path]) -> Files:
        """Take all tensors of some files under their names there."""
        return cls({name: (file, name) for file in files for name in _names_in(file)})

    def part(self, names: Iterable[str]) -> Files:
        """Return the places of these."""
        return Files({name: self._places[name] for name in names if name in self._places})

    def agree(self, common: Callable[[int], int]) -> None:
        """Files are the same for everyone."""

    def fill(self, names: Iterable[str], target: torch.Tensor) -> None:
        """Read the values; a tied tensor may be there under any of its names."""
        wanted = list(names)
        known = next((name for name in wanted if name in self._places), None)
        if known is None:
            raise CheckpointError(f"{' = '.join(wanted)} is in none of the files, and on the meta device")
        path, key = self._places[known]
        with _opened(path) as file:
            found = file.get_tensor(key)
        if found.shape != target.shape:
            raise CheckpointError(
                f"{known} has shape {tuple(found.shape)} in {path}, and {tuple(target.shape)} in the model"
            )
        with torch.no_grad():
            target.copy_(found)


def _names_in(file: Path) -> list[str]:
    with _opened(file) as opened:
        return list(opened.keys())


def _opened(file: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError(
            "weights in files need the safetensors package", hint="pip install safetensors"
        ) from error
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file} is no whole safetensors file: {error}") from error
