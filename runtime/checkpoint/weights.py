"""A checkpoint as what a model's weights are read from, before there is a pipeline or where each stage runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from ...errors import CheckpointError
from ..weight_files import Files
from . import folder as folders
from .peers import Alone
from .reading import check_names, found


def has_checkpoint(path: Path) -> bool:
    """Say whether a path is a checkpoint, or a folder of them."""
    return path.is_dir() and (folders.is_checkpoint(path) or bool(folders.checkpoints(path)))


class CheckpointWeights:
    """The parameters and buffers of the newest whole checkpoint of a folder, or of one checkpoint.

    Raises:
        CheckpointError: there is none, or it is of another model.
    """

    def __init__(self, folder: str | Path, model: nn.Module) -> None:
        self._folder = Path(folder)
        self._reader, _ = found(self._folder, Alone())
        self._expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
        check_names(self._reader, self._expected)

    def agree(self, common: Callable[[int], int]) -> None:
        """Read the checkpoint that rank 0 found: a newer one may have been finished before this rank looked."""
        step = common(self._reader.manifest.step)
        if step == self._reader.manifest.step:
            return
        self._reader.close()
        self._reader, _ = found(folders.step_folder(self._folder, step), Alone())
        check_names(self._reader, self._expected)

    def part(self, names: Iterable[str]) -> Files:
        """Return the places of these in the checkpoint's files, which have been verified."""
        places = self._reader.places()
        return Files({name: places[name] for name in names if name in places})

    def fill(self, names: Iterable[str], target: torch.Tensor) -> None:
        """Read the values; a tied tensor may be there under any of its names."""
        wanted, there = list(names), self._reader.names()
        known = next((name for name in wanted if name in there), None)
        if known is None:
            raise CheckpointError(f"{' = '.join(wanted)} is not in {self._reader.path}, and on the meta device")
        with torch.no_grad():
            target.copy_(self._reader.tensor(known))

    def fill_all(self, model: nn.Module) -> None:
        """Read the values of all that a model's state has, and let the files go."""
        with self._reader:
            for name, tensor in model.state_dict().items():
                self.fill([name], tensor)
