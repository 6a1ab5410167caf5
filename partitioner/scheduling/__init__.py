"""Schedules for given costs: simulated, bounded, and searched."""

from __future__ import annotations

from .costs import PipelineCosts
from .family import family_schedule
from .idle import idle_by_cause
from .score import Scored, score
from .search import search

__all__ = ["PipelineCosts", "Scored", "family_schedule", "idle_by_cause", "score", "search"]
