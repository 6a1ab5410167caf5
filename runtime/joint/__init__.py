"""Explicit backwards: a stage's joint graph, cut into forward, input gradients, weight gradients and whole backward."""

from .cut import Part, Parts, cut
from .trace import Joint, Untraceable, trace

__all__ = ["Joint", "Part", "Parts", "Untraceable", "cut", "trace"]
