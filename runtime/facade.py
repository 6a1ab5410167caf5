"""What a pipeline shows of its model: names, state, gradients, checkpoints, as if it were the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ..errors import CheckpointError, StagecutError
from ..representation import html_of
from .checkpoint import Loaded, Placement, Saving, Training, by_stage
from .checkpoint.peers import Alone, Peers, together
from .checkpoint.reading import Reader, Tensors, check_fits, check_names, found, has_checkpoints, restore
from .checkpoint.saving import snapshot, taken_together, write
from .engine import Engine
from .gradients import clip, own_norm
from .program import PipelineSpec
from .spmd import under_torchrun
from .unsplit import unsplit
from .watch.logs import CHECKPOINTS
from .watch.owner import Owner


class Facade(nn.Module):
    """The part of a pipeline that is about the model and not about how it runs."""

    _engine: Engine | None
    _spec: PipelineSpec | None
    _saving: Saving | None = None

    def __init__(self) -> None:
        super().__init__()
        self._owner = Owner()

    @property
    def model(self) -> nn.Module:
        """Return the model that was compiled; its parameters are this pipeline's."""
        model: nn.Module = self.__dict__["_model"]
        return model

    def train(self, mode: bool = True) -> Self:
        """Put the model into training (or evaluation) mode."""
        self.training = mode
        self.model.train(mode)
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over the model's parameters under their own names."""
        return self.model.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over the model's buffers under their own names."""
        return self.model.named_buffers(prefix, recurse, remove_duplicate)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over the model's modules under their own names."""
        yield from self.model.named_modules(memo, prefix, remove_duplicate)

    def get_submodule(self, target: str) -> nn.Module:
        """Return a module of the model by its path; ``get_parameter`` and ``get_buffer`` follow."""
        return self.model.get_submodule(target)

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """Apply ``fn`` to every module of the model."""
        self.model.apply(fn)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the model's state under its own names: it loads into the plain model, and the other way round.

        Under torchrun this is a collective call: every rank receives the whole state.
        """
        state = {} if self._engine is None else self._engine.full_state()
        own: dict[str, Any] = self.model.state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for name in list(own):
            found = state.get(name.removeprefix(prefix))
            if found is not None:
                own[name] = found.detach()
        return own

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the model's state, from a pipeline or from the plain model."""
        if assign:
            raise StagecutError("assign=True would replace parameters that workers share", hint="leave assign=False")
        load = getattr(self._engine, "load_state", None)
        if load is not None:
            return load(state_dict, strict)
        return self.model.load_state_dict(state_dict, strict)

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Scale all gradients, in place, so that the norm of the whole model's is at most ``max_norm``.

        As ``torch.nn.utils.clip_grad_norm_`` on the unsplit model: one norm over all stages, in which tied parameters
        count once, and replicas' too. Under torchrun this is a collective call; torch's own function would see the
        rank's gradients alone there.

        Returns:
            The norm before, 0-dim.

        Raises:
            StagecutError: the norm is not finite, and ``error_if_nonfinite``.
        """
        engine, parameters = self._engine, list(self.model.parameters())
        norm = own_norm(parameters, norm_type) if engine is None else engine.gradient_norm(norm_type)
        return clip(parameters, norm, max_norm, norm_type, error_if_nonfinite)

    def local_parameters(self) -> list[nn.Parameter]:
        """List the parameters that this process holds: all of the model's, or those of a rank's stages under torchrun.

        Sharded optimizers take these, with :attr:`replica_group`:
        ``ZeroRedundancyOptimizer(pm.local_parameters(), torch.optim.AdamW, process_group=pm.replica_group, lr=3e-4)``.
        """
        self._require_plan()
        own = getattr(self._engine, "local_parameters", None)
        return list(self.model.parameters()) if own is None else own()

    @property
    def replica_group(self) -> Any:
        """Return the process group of the ranks that hold the same stages as this one; None if there is no other."""
        self._require_plan()
        return getattr(self._engine, "replica_group", None)

    def _require_plan(self) -> None:
        if self._engine is None:
            raise StagecutError(
                "who holds what is known once the pipeline is planned, and it is not yet",
                hint="stagecut.compile(..., example_inputs=(x,)) plans at once",
            )

    def save(
        self,
        folder: str | Path,
        step: int,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        data: Any = None,
        keep: int | None = None,
        wait: bool = True,
    ) -> Saving:
        """Write a checkpoint, ``FOLDER/step-00000012``: whole, on the disk, checked when it is loaded; or not at all.

        It holds the model under its own names (a file for each stage), the optimizer's state and settings, and the
        state of the random generators, in safetensors and JSON; nothing in it is ever executed. None is ever
        overwritten. Under torchrun all ranks call this, on a folder that they share; each writes what it owns.

        Args:
            folder: where the checkpoints of a run are.
            step: the optimizer steps that were done.
            optimizer: over ``pm.parameters()``.
            scheduler, scaler: learning rate scheduler and GradScaler: their ``state_dict()``.
            data: where the loop is in its data: numbers, text, lists and dicts of them, or what has such a
                ``state_dict()``.
            keep: how many of the newest checkpoints to keep; all if None.
            wait: False copies all of it now, and writes it beside training: ``saving.wait()`` says when it is there,
                the next save and ``close`` wait for it.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are as they were.
        """
        self._owner.check("pm.save()")
        if step < 0 or (keep is not None and keep < 1):
            raise CheckpointError(f"a step is 0 or more and keep 1 or more, got step={step} and keep={keep}")
        self._finish_saving()
        peers, placement = self._writers()
        training = Training(optimizer, scheduler, scaler, data)
        layout = None if self._spec is None else self._spec.layout
        replicas = () if layout is None else tuple(map(len, layout.workers))
        shape = ("" if self._spec is None else self._spec.fingerprint, replicas)
        taken = taken_together(
            peers, lambda: snapshot(self.model, placement, training, step, shape, peers.rank, copy=not wait)
        )
        saving = Saving(lambda: write(Path(folder), taken, peers, keep), in_background=not wait)
        if not wait:
            self._saving = saving
        return saving

    def load(
        self,
        folder: str | Path,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        data: Any = None,
    ) -> Loaded:
        """Go on from the newest whole checkpoint of a folder, or from one: model, optimizer, random generators.

        The plan may be another than the one that wrote it: stages, replicas and launch do not matter. One that is not
        whole is passed over with a warning that says why. Under torchrun all ranks call this.

        Args:
            folder: where the checkpoints of a run are, or one of them.
            optimizer, scheduler, scaler: to be set to what was saved.
            data: what has a ``load_state_dict()``, to be set too; anything else that was saved is in ``loaded.data``.

        Raises:
            CheckpointError: there is none, or it does not fit the model or the optimizer; nothing was changed then.
        """
        self._owner.check("pm.load()")
        self._finish_saving()
        peers, placement = self._writers()
        reader, passed = found(folder, peers)
        with reader:
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            training = Training(optimizer, scheduler, scaler, data)
            together(peers, lambda: check_fits(reader, training, names))
            self._fill(reader)
            kept = restore(reader, training, names, placement.holds, peers.rank)
            CHECKPOINTS.info("loaded %s", reader.path)
            return Loaded(reader.path, reader.manifest.step, kept, tuple(passed))

    def resume(
        self,
        folder: str | Path,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        data: Any = None,
    ) -> Loaded:
        """Go on as :meth:`load` does, or begin, where there is no checkpoint yet: one script starts and starts again.

        ``loaded.step`` is the step to go on from: 0, with ``loaded.path`` None and nothing changed, where the folder is
        empty or not there. Checkpoints of which none is whole are an error, and no reason to begin again.

        Args:
            folder, optimizer, scheduler, scaler, data: as for :meth:`load`.

        Raises:
            CheckpointError: no checkpoint is whole, or the newest that is does not fit; the folder is a file, or not
                the same one for all ranks.
        """
        self._finish_saving()
        if has_checkpoints(folder, self._writers()[0]):
            return self.load(folder, optimizer=optimizer, scheduler=scheduler, scaler=scaler, data=data)
        return Loaded(None, 0, None, ())

    def _fill(self, reader: Reader) -> None:
        """Write a checkpoint's values into the model, after looking that all are there and fit."""
        state = self.model.state_dict(keep_vars=True)
        fill = getattr(self._engine, "load_state", None)
        if fill is not None:  # which knows the shapes: a rank has no memory for what it does not own
            check_names(reader, dict.fromkeys(state))
            fill(Tensors(reader), True)
            return
        check_names(reader, {name: tuple(tensor.shape) for name, tensor in state.items()})
        with torch.no_grad():
            for name, tensor in state.items():  # under all names: what was shared then need not be shared here
                tensor.copy_(reader.tensor(name))

    def _writers(self) -> tuple[Peers, Placement]:
        """Return who writes a checkpoint, and what of it this process does."""
        own = getattr(self._engine, "placement", None)
        if own is None:
            if self._engine is None and under_torchrun():
                self._require_plan()
            return Alone(), by_stage(self._spec, self.model)
        peers: Peers = self._engine.peers  # type: ignore[union-attr]  # which has a placement
        return peers, own()

    def _finish_saving(self) -> None:
        """Wait for a checkpoint that is being written in the background; what it failed at is raised."""
        saving, self._saving = self._saving, None
        if saving is not None and not saving.told:
            saving.wait()

    def to_module(self) -> nn.Module:
        """Return the unsplit model as a module of its own, with the weights of now: to export, evaluate, or average.

        Under torchrun this is a collective call, and every rank receives the whole model.
        """
        return unsplit(self.model, {} if self._engine is None else self._engine.full_state())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        kinds = {(tensor.dtype, tensor.device): tensor for tensor in tensors}.values()
        if all(fn(empty := torch.empty(0, dtype=t.dtype, device=t.device)) is empty for t in kinds):
            return self  # trainers call .to(device) for good measure
        raise StagecutError(
            "a compiled pipeline cannot change its dtype or device: its workers own the placement",
            hint="change the model first, then call stagecut.compile(model, devices=[...])",
        )

    def _repr_html_(self) -> str | None:
        return html_of("Pipeline", self)

    def extra_repr(self) -> str:
        """Describe the pipeline in one line."""
        where = (
            "not planned yet" if self._spec is None else f"{self._spec.layout.n_stages} stages on {self._spec.devices}"
        )
        return f"{type(self.model).__name__}, {where}"
