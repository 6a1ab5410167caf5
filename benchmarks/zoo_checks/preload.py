"""Imported once by the server that forks the zoo's processes, so that none of them has to import it all again."""

import contextlib
import importlib

import torch

torch.set_num_threads(1)

for _name in ("torchvision.models", "timm", "transformers.modeling_utils", "transformers.models.llama.modeling_llama"):
    # A group without its library is empty; what else an import raises is shown by the entry that needs it.
    with contextlib.suppress(Exception):
        importlib.import_module("stagecut.vision_compat").import_torchvision()
        importlib.import_module(_name)

with contextlib.suppress(Exception):
    importlib.import_module("zoo_checks.examine")
