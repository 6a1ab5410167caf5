"""Architectures of the transformers library, tiny and with random weights: a plain forward, and one with its loss."""

from __future__ import annotations

import importlib.util
import os

from stagecut.vision_compat import import_torchvision

from .entry import Entry, Table, table_of


def load() -> Table:
    """List the architectures that the installed library has."""
    if importlib.util.find_spec("transformers") is None:
        return table_of([], {"hf": "transformers is not installed"})
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import_torchvision()
    from transformers import CONFIG_MAPPING

    from . import hf_audio, hf_causal, hf_encoders, hf_mixed, hf_pairs, hf_sparse, hf_vision

    entries: list[Entry] = []
    missing: dict[str, str] = {}
    for module in (hf_causal, hf_sparse, hf_encoders, hf_pairs, hf_vision, hf_audio, hf_mixed):
        for spec in module.SPECS:
            if spec.model_type in CONFIG_MAPPING:
                entries += spec.entries()
            else:
                missing[spec.model_type] = "not in the installed transformers"
    return table_of(entries, missing)
