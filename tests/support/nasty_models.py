"""The nasty set: small models, each right in eager training, that break one thing or another in graph capture."""

from __future__ import annotations

import nasty_buffers
import nasty_errors
import nasty_layers
import nasty_numpy
import nasty_sizes
import nasty_transforms
from nasty_args import arguments, results
from nasty_base import Nasty
from nasty_control import control
from nasty_data import data
from nasty_hooks import hooks
from nasty_inplace import inplace, layout
from nasty_modules import modules
from nasty_random import drawn, modes
from nasty_regions import regions
from nasty_shapes import shapes
from nasty_state import state

__all__ = ["NASTY", "Nasty"]

_KINDS = (shapes, control, data, drawn, modes, state, modules, inplace, layout, regions, hooks, arguments, results)

# These add to kinds of other files.
_CONTINUED = (nasty_buffers, nasty_errors, nasty_layers, nasty_numpy, nasty_sizes, nasty_transforms)

NASTY: dict[str, Nasty] = {name: entry for kind in _KINDS for name, entry in kind.entries.items()}
