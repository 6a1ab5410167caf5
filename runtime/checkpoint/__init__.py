"""Checkpoints: written whole or not at all, verified before they are used, read by name whatever the plan was."""

from .dcp import from_dcp, read_dcp, to_dcp
from .folder import Manifest
from .placement import by_stage, users_by_name
from .reading import read_state
from .records import Loaded, Placement, Training
from .saving import Saving

__all__ = [
    "Loaded",
    "Manifest",
    "Placement",
    "Saving",
    "Training",
    "by_stage",
    "from_dcp",
    "read_dcp",
    "read_state",
    "to_dcp",
    "users_by_name",
]
