"""Random pipelines for tests of schedules."""

from __future__ import annotations

from hypothesis import strategies as st

from stagecut.partitioner.scheduling import PipelineCosts

SECONDS = st.floats(0.05, 2.0)


@st.composite
def pipelines(draw: st.DrawFn, n_stages: int, n_workers: int, *, limited: bool | None = None) -> PipelineCosts:
    """Stages of random length and size, on workers that hold 1 to 4 microbatches or any number."""

    def column(each: st.SearchStrategy[float]) -> tuple[float, ...]:
        return tuple(draw(st.lists(each, min_size=n_stages, max_size=n_stages)))

    activation_bytes = column(st.floats(0.5, 2.0))
    shares = column(st.floats(0.0, 1.0))
    limits = None
    if draw(st.booleans()) if limited is None else limited:
        per_worker = n_stages // n_workers * max(activation_bytes)
        limits = tuple(draw(st.lists(st.floats(1.0, 4.0), min_size=n_workers, max_size=n_workers)))
        limits = tuple(limit * per_worker for limit in limits)
    return PipelineCosts(
        column(SECONDS),
        column(SECONDS),
        column(SECONDS),
        activation_bytes,
        tuple(share * own for share, own in zip(shares, activation_bytes)),
        tuple(draw(st.lists(st.floats(0.0, 0.5), min_size=n_stages - 1, max_size=n_stages - 1))),
        limits,
        draw(st.sampled_from([0.0, 0.01])),
        draw(st.booleans()),
    )
