"""Explicit backwards: a stage's joint graph, cut into forward, input gradients, weight gradients and whole backward."""

from .cut import cut
from .trace import Joint, trace

__all__ = ["Joint", "cut", "trace"]
