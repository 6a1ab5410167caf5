"""The choice among plans: the first as predicted, the ones too close to it to tell, and the one that trials settle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .explain import describe_shape, reasons
from .plan import Plan
from .ranking import rank, simplest_first, simplest_of_close

_KEPT = 12
_WORTH_TRYING = 0.25  # costs measured at a bad moment are off by up to 20 % (docs/planner.md)
_AS_FAST = 0.01  # of measured steps; below, the simpler plan is taken


@dataclass(frozen=True)
class Choice:
    """What a planner found.

    Attributes:
        plans: all that may be chosen, best first as predicted.
        rivals: one device and data parallelism where the user's wishes leave them out, to compare.
        failures: why configurations were no choice.
        recompute_asked_for: recompute was the user's wish.
    """

    plans: tuple[Plan, ...]
    rivals: tuple[Plan, ...]
    failures: tuple[Exception, ...]
    recompute_asked_for: bool

    def predicted(self, untried: str | None = None) -> Plan:
        """Return the plan to take if nothing is tried; ``untried`` says why nothing was, where that was meant to be."""
        return self._taken(simplest_of_close(self.plans), (), () if untried is None else (untried,))

    def contenders(self) -> list[Plan]:
        """List the plans that only trials can tell apart: the one to take, then the best of each other shape near it.

        Plans of one shape (devices in a row, and replicas) differ less from each other than trials are noisy.
        """
        first = simplest_of_close(self.plans)
        found = {_shape(first): first}
        most_s = self.plans[0].prediction.step_s * (1 + _WORTH_TRYING)
        for plan in self.plans:
            if plan.prediction.step_s <= most_s:
                found.setdefault(_shape(plan), plan)
        return list(found.values())

    def settled(self, contenders: Sequence[Plan], step_s: Sequence[float], n_steps: int) -> tuple[int, Plan]:
        """Take one of the contenders by the seconds that its steps took: the simplest of those as fast as the fastest.

        Returns:
            Its index, and the plan with its alternatives and the reasons for it.
        """
        most_s = min(step_s) * (1 + _AS_FAST)
        fast = [index for index, own_s in enumerate(step_s) if own_s <= most_s]
        taken = min(fast, key=lambda index: simplest_first(contenders[index]))
        notes = (f"medians of {n_steps} steps each",)
        return taken, self._taken(contenders[taken], tuple(zip(contenders, step_s)), notes)

    def _taken(self, taken: Plan, tried: Sequence[tuple[Plan, float]], notes: Sequence[str]) -> Plan:
        others = [plan for plan in self.plans if plan is not taken]
        alone = [plan.prediction.step_s for plan in (*self.plans, *self.rivals) if len(plan.devices) == 1]
        one_device_s = min([*alone, taken.prediction.one_device_s])
        taken = replace(
            taken,
            prediction=replace(taken.prediction, one_device_s=one_device_s),
            alternatives=tuple(plan.as_alternative() for plan in _kept(sorted([*others, *self.rivals], key=rank))),
        )
        why = reasons(taken, others, self.rivals, self.failures, self.recompute_asked_for, tried, notes)
        return replace(taken, reasons=why)


def _shape(plan: Plan) -> tuple[int, ...]:
    """Return the replicas of each group of workers, in the order of the stages."""
    return tuple(map(len, dict.fromkeys(stage.workers for stage in plan.stages)))


def _kept(ranked: Sequence[Plan]) -> list[Plan]:
    """Leave out what is far behind, except one device and data parallelism, which everything is compared with."""
    kept = list(ranked[:_KEPT])
    for plan in ranked[_KEPT:]:
        if len(plan.stages) == 1 and all(describe_shape(plan) != describe_shape(other) for other in kept):
            kept.append(plan)
    return kept
