"""Schedules for given costs: simulated, bounded, and searched."""

from __future__ import annotations

from .costs import PipelineCosts
from .family import family_schedule
from .score import Scored, score
from .search import search

__all__ = ["PipelineCosts", "Scored", "family_schedule", "score", "search"]
