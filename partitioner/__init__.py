"""From a model to a plan: capture, op graph, costs, cut, schedule choice, split."""

from .cut import Cut, CutDevice, solve

__all__ = ["Cut", "CutDevice", "solve"]
