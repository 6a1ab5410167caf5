"""Reference models for demos, tests and benchmarks; they know torch, and nothing of the pipeline."""

from ..vision_compat import import_torchvision
from .digits import DigitsData, load_digits
from .mlp import MLP
from .registry import LoadedModel, ModelSpecError, load_model
from .resnet import DigitsResNet
from .transformer import GPT, next_token_loss
from .unet import UNet

__all__ = [
    "GPT",
    "MLP",
    "DigitsData",
    "DigitsResNet",
    "LoadedModel",
    "ModelSpecError",
    "UNet",
    "import_torchvision",
    "load_digits",
    "load_model",
    "next_token_loss",
]
