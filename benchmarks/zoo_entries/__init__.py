"""The models of the capture zoo, in four groups. A group whose library is not installed is empty and says so."""

from __future__ import annotations

import importlib

from .entry import Entry, Table

GROUPS = {"torchvision": "torchvision_models", "timm": "timm_models", "hf": "hf_models", "nasty": "nasty_models"}
TITLES = {"torchvision": "torchvision", "timm": "timm", "hf": "Hugging Face", "nasty": "nasty set"}


def load_group(group: str) -> Table:
    """Return the entries of one group; loading builds no model."""
    # A full name, because the modules of tests/support share these folders' search path.
    table: Table = importlib.import_module(f"{__name__}.{GROUPS[group]}").load()
    return table


__all__ = ["GROUPS", "TITLES", "Entry", "Table", "load_group"]
