"""Load a model and an example batch from one line of text, such as ``demo:unet`` or ``train.py:build``."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StagecutError
from ..vision_compat import import_torchvision
from .mlp import MLP
from .resnet import DigitsResNet
from .transformer import GPT, next_token_loss
from .unet import UNet

# What a small model of the transformers library is built with; each configuration takes the names that it knows.
_HF_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HF_TOKENS = 64
_OWN_FUNCTION = "write a function that returns (module, example_inputs), and give path/to/file.py:FUNCTION"


class ModelSpecError(StagecutError):
    """A model spec cannot be read, or names something that is not there or not installed."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with one batch to capture, plan and try it with.

    ``loss_fn(output, example_target)`` gives a scalar; target and loss are ``None`` where only the model's owner
    knows them.
    """

    name: str
    module: nn.Module
    example_inputs: tuple[Any, ...] = ()
    example_kwargs: dict[str, Any] = field(default_factory=dict)
    example_target: Tensor | None = None
    loss_fn: Callable[[Any, Any], Tensor] | None = None


def load_model(spec: str, *, batch_rows: int | None = None) -> LoadedModel:
    """Build the model that ``spec`` names, with an example batch of ``batch_rows`` rows (each source has a default).

    ========================  ==================================================================================
    ``demo:NAME``             resnet, unet, gpt or mlp of this package
    ``torchvision:NAME``      a classification model with random weights
    ``timm:NAME``             a model of timm with random weights, if timm is installed
    ``hf:NAME``               a small model of that type, or of a configuration file, if transformers is installed
    ``package.module:NAME``   what the function ``NAME`` returns: a module, or a module with its example inputs
    ``path/to/file.py:NAME``  the same from a file
    ========================  ==================================================================================

    Weights come from torch's global generator; the example batch is the same in every call.

    Raises:
        ModelSpecError: the spec has no such form, names what is not there (the hint has the nearest names) or not
            installed, or ``batch_rows`` is not positive or given for a function, which makes its own batch.
    """
    source, colon, name = spec.partition(":")
    if not colon or not source or not name:
        raise ModelSpecError(
            f"{spec!r} is not a model spec: expected SOURCE:NAME",
            hint=_nearest(spec, [f"demo:{demo}" for demo in _DEMOS]),
        )
    if batch_rows is not None and batch_rows < 1:
        raise ModelSpecError(f"batch_rows must be at least 1, got {batch_rows}")
    if source in _SOURCES:
        return _SOURCES[source](name, batch_rows)
    if batch_rows is not None:
        raise ModelSpecError(
            f"batch_rows={batch_rows} has no effect on {spec!r}: the function makes its own example inputs",
            hint="return (module, example_inputs) with that many rows from the function",
        )
    return _load_factory(spec)


def makes_own_batch(spec: str) -> bool:
    """Say whether ``spec`` names a function, whose example inputs have as many rows as it likes."""
    return spec.partition(":")[0] not in _SOURCES


def classification_loss(output: Any, target: Tensor) -> Tensor:
    """Take the cross-entropy of logits ``(B, C)``; auxiliary logits beside them (Inception) count 0.3 each."""
    if isinstance(output, Tensor):
        return F.cross_entropy(output, target)
    main, *auxiliary = (logits for logits in output if logits is not None)
    loss = F.cross_entropy(main, target)
    for logits in auxiliary:
        loss = loss + 0.3 * F.cross_entropy(logits, target)
    return loss


def hf_loss(output: Any, target: Tensor) -> Tensor:
    """Take the cross-entropy of a transformers output's ``logits`` ``(..., C)``; target ``(...)``."""
    return F.cross_entropy(output.logits.flatten(0, -2), target.flatten())


def _demo_resnet(rows: int) -> LoadedModel:
    x, target = _images(rows, (1, 8, 8), 10)
    return LoadedModel("demo:resnet", DigitsResNet(), (x,), {}, target, F.cross_entropy)


def _demo_unet(rows: int) -> LoadedModel:
    x = torch.randn(rows, 3, 64, 64, generator=_generator())
    target = torch.randint(4, (rows, 64, 64), generator=_generator())
    return LoadedModel("demo:unet", UNet(in_channels=3, out_channels=4), (x,), {}, target, F.cross_entropy)


def _demo_gpt(rows: int) -> LoadedModel:
    module = GPT(vocab=256, d_model=128, n_layers=6, n_heads=4, max_len=128, tied=True)
    tokens = torch.randint(256, (rows, 65), generator=_generator())
    inputs, target = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # (B, 65) -> (B, 64) each
    return LoadedModel("demo:gpt", module, (inputs,), {}, target, next_token_loss)


def _demo_mlp(rows: int) -> LoadedModel:
    x, target = _images(rows, (64,), 10)
    return LoadedModel("demo:mlp", MLP(in_features=64, out_features=10), (x,), {}, target, F.cross_entropy)


_DEMOS: dict[str, tuple[Callable[[int], LoadedModel], int]] = {
    "resnet": (_demo_resnet, 64),
    "unet": (_demo_unet, 8),
    "gpt": (_demo_gpt, 8),
    "mlp": (_demo_mlp, 64),
}


def _load_demo(name: str, batch_rows: int | None) -> LoadedModel:
    if name not in _DEMOS:
        raise ModelSpecError(f"there is no demo model {name!r}", hint=_nearest(name, _DEMOS, "demo:"))
    build, default_rows = _DEMOS[name]
    return build(batch_rows or default_rows)


def _load_torchvision(name: str, batch_rows: int | None) -> LoadedModel:
    models: Any = importlib.import_module(f"{import_torchvision().__name__}.models")
    names = models.list_models(module=models)  # the classification models; segmentation and others have own modules
    if name not in names:
        raise ModelSpecError(
            f"torchvision has no classification model {name!r}", hint=_nearest(name, names, "torchvision:")
        )
    # These two warn unless told whether to use their slow truncated-normal initialisation.
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    module = models.get_model(name, weights=None, **options)
    side = 299 if name == "inception_v3" else 224
    x, target = _images(batch_rows or 8, (3, side, side), 1000)
    return LoadedModel(f"torchvision:{name}", module, (x,), {}, target, classification_loss)


def _load_timm(name: str, batch_rows: int | None) -> LoadedModel:
    timm = _import_optional("timm", f"timm:{name}")
    names = timm.list_models()
    if name not in names:
        raise ModelSpecError(f"timm has no model {name!r}", hint=_nearest(name, names, "timm:"))
    module = timm.create_model(name, pretrained=False)
    n_classes = module.num_classes or 1  # 0 in models that end in features
    x, target = _images(batch_rows or 8, tuple(module.default_cfg["input_size"]), n_classes)
    if not module.num_classes:
        return LoadedModel(f"timm:{name}", module, (x,))
    return LoadedModel(f"timm:{name}", module, (x,), {}, target, classification_loss)


def _load_hf(name: str, batch_rows: int | None) -> LoadedModel:
    transformers = _import_optional("transformers", f"hf:{name}")
    config = _hf_config(transformers, name)
    config.use_cache = False
    for task, inputs in _HF_TASKS.items():
        auto = getattr(transformers, task)
        if type(config) in auto._model_mapping and (hasattr(config, "vocab_size") or inputs is _hf_image):
            kwargs, target = inputs(config, batch_rows or 8)
            try:
                module = auto.from_config(config)
            except Exception as error:  # sizes that do not fit this type; transformers checks them by assertions too
                raise ModelSpecError(f"hf:{name} cannot be built: {error}", hint=_OWN_FUNCTION) from error
            return LoadedModel(f"hf:{name}", module, (), kwargs, target, hf_loss)
    raise ModelSpecError(
        f"hf:{name} is none of the kinds that have an example batch here: {', '.join(_HF_TASKS)}", hint=_OWN_FUNCTION
    )


def _hf_config(transformers: Any, name: str) -> Any:
    if Path(name).exists():
        return transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    names = list(transformers.CONFIG_MAPPING)
    if name not in names:
        raise ModelSpecError(
            f"transformers has no model type {name!r}, and there is no such configuration file (nothing is downloaded)",
            hint=_nearest(name, names, "hf:"),
        )
    config_class = transformers.CONFIG_MAPPING[name]
    # Its own defaults tell which of the common sizes a configuration has, under whatever name it stores them.
    defaults = config_class()
    return config_class(**{key: value for key, value in _HF_SIZES.items() if getattr(defaults, key, None) is not None})


def _hf_tokens(config: Any, rows: int) -> tuple[dict[str, Any], Tensor]:
    length = min(_HF_TOKENS, getattr(config, "max_position_embeddings", _HF_TOKENS))
    tokens = torch.randint(config.vocab_size, (rows, length + 1), generator=_generator())
    return {"input_ids": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()  # (B, T + 1) -> (B, T) each


def _hf_seq2seq(config: Any, rows: int) -> tuple[dict[str, Any], Tensor]:
    kwargs, target = _hf_tokens(config, rows)
    return {"input_ids": target, "decoder_input_ids": kwargs["input_ids"]}, target


def _hf_image(config: Any, rows: int) -> tuple[dict[str, Any], Tensor]:
    side = getattr(config, "image_size", 224)
    shape = (getattr(config, "num_channels", 3), *(side if isinstance(side, (list, tuple)) else (side, side)))
    x, target = _images(rows, shape, config.num_labels)
    return {"pixel_values": x}, target


# Tried in this order: encoders with two heads (bert) are masked models first.
_HF_TASKS: dict[str, Callable[[Any, int], tuple[dict[str, Any], Tensor]]] = {
    "AutoModelForSeq2SeqLM": _hf_seq2seq,
    "AutoModelForMaskedLM": _hf_tokens,
    "AutoModelForCausalLM": _hf_tokens,
    "AutoModelForImageClassification": _hf_image,
}


_SOURCES: dict[str, Callable[[str, int | None], LoadedModel]] = {
    "demo": _load_demo,
    "torchvision": _load_torchvision,
    "timm": _load_timm,
    "hf": _load_hf,
}


def _import_optional(package: str, spec: str) -> Any:
    try:
        if importlib.util.find_spec(package) is not None:
            import_torchvision()  # both packages import torchvision where it is installed, and fail where it fails
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModelSpecError(
            f"{spec} needs {package}, which is not installed", hint=f"pip install {package}"
        ) from error


def _load_factory(spec: str) -> LoadedModel:
    place, _, name = spec.rpartition(":")  # the last colon: a Windows path has one of its own
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    factory = getattr(module, name, None)
    if not callable(factory):
        found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelSpecError(f"{place} has no function {name!r}", hint=_nearest(name, found, f"{place}:"))
    made = factory()
    inputs: Any = ()
    if isinstance(made, tuple) and len(made) == 2:
        made, inputs = made
    if not isinstance(made, nn.Module):
        raise ModelSpecError(
            f"{spec} returned {type(made).__name__}; expected nn.Module or (nn.Module, example_inputs)"
        )
    return LoadedModel(spec, made, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,))


def _import_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ModelSpecError(
            f"{name!r} is neither a source of models, nor the name of a module, nor a .py file",
            hint=_nearest(name, [f"{source}:" for source in _SOURCES]),
        )
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))  # an installed command has its own folder there instead
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing != name and not name.startswith(f"{missing}."):
            raise
        hint = _nearest(missing, _modules_beside(missing))
        raise ModelSpecError(f"there is no module or source of models {missing!r}", hint=hint) from error


def _modules_beside(missing: str) -> list[str]:
    parent, dot, _ = missing.rpartition(".")
    path = getattr(sys.modules.get(parent), "__path__", []) if parent else None
    found = [parent + dot + info.name for info in pkgutil.iter_modules(path)]
    return found if parent else [*(f"{source}:" for source in _SOURCES), *(set(found) - set(_SOURCES))]


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        found = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ModelSpecError(f"there is no file {str(path)!r}", hint=_nearest(str(path), found))
    path = path.resolve()
    name = f"stagecut_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None, "a .py file always has a loader"
    assert module_spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and inspect look classes up there
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as `python file.py` does, for imports of its neighbours
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    # No other process can import this name, so workers are sent its classes by value.
    cloudpickle.register_pickle_by_value(module)
    return module


def _images(rows: int, shape: tuple[int, ...], n_classes: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, *shape, generator=_generator())  # (B, *shape)
    return x, torch.randint(n_classes, (rows,), generator=_generator())  # (B,)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _nearest(name: str, names: Iterable[str], prefix: str = "") -> str | None:
    """List the up to three of ``names`` that look most like ``name``, or all of a short list when none does.

    One that ``name`` begins with comes first: names of a hub say more (``google/bert-base``, ``resnet50.a1_in1k``).
    """
    known = sorted(names)
    last = name.rpartition("/")[2].lower()
    begun = sorted((other for other in known if last.startswith(other.lower())), key=len)[-1:]
    near = list(dict.fromkeys([*begun, *difflib.get_close_matches(name, known, n=3)]))[:3]
    near = near or (known if len(known) <= 6 else [])
    return ", ".join(prefix + other for other in near) or None
