"""The cut of torchvision's classification models beside other ways to balance: `python benchmarks/cut_models.py`.

Every model is captured, every op of it timed on one thread (forward and backward), and the graph cut into as many
stages as ``--stages`` says, on equal CPU workers. Listed are the largest load of our cut (compute and transfers, as
``solve`` defines it), the proven lower bound, and the largest load of other splits as a multiple of ours. All loads are
added up by the scorer of the tests, which shares no code with the solver. The other splits are contiguous parts of the
graph's own order, with the boundary in the nearest place where nothing that must stay together is torn:

- parameters, time, ops: equal shares of parameters, of measured seconds, of the number of ops;
- torchgpipe: its block partition of the measured seconds;
- balance_by_time: torchgpipe's own, on the layers, for models that are nn.Sequential when flattened.

Needs ``pip install torchgpipe``. Costs of ops are kept in ``$STAGECUT_CACHE``, so equal ops are timed once.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import networkx as nx
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from rival_splits import by_block_partition, by_shares, by_torchgpipe, parameter_counts, sequential_layers
from score_cut import score_cut
from zoo_entries.torchvision_models import image_entry

import stagecut
from stagecut.partitioner.cut import Cut, CutDevice, solve
from stagecut.partitioner.describe import describe
from stagecut.partitioner.pricing import Pricer
from stagecut.vision_compat import import_torchvision

Split = dict[Hashable, int]
Record = dict[str, Any]
RIVALS = ("parameters", "time", "ops", "torchgpipe", "balance_by_time")
_COLUMNS = ("family", "model", "ops", "load ms", "gap %", "optimal", "solve s", *RIVALS, "notes")


class NotSequential(ValueError):
    """A model is no ``nn.Sequential``, so torchgpipe cannot take it."""


def largest_load(graph: nx.DiGraph, devices: Sequence[CutDevice], stage_of: Mapping[Hashable, int]) -> float:
    """Add up the largest load of a split whose stages run on the devices in order.

    Raises:
        ValueError: the split is none, for the reasons that the scorer gives.
    """
    records = [{"name": device.name, "kind": device.kind} for device in devices]
    score = score_cut(graph, records, stage_of, [device.name for device in devices])
    if score.faults:
        raise ValueError(f"{score.faults[0]}, and {len(score.faults) - 1} more faults")
    return score.max_load


def compare(
    graph: nx.DiGraph, devices: Sequence[CutDevice], cut: Cut, rivals: Mapping[str, Callable[[], Split]]
) -> Record:
    """Score a cut and its rivals; a rival that cannot split the graph leaves the reason instead of a ratio.

    Raises:
        ValueError: the cut is not what it says.
    """
    own = largest_load(graph, devices, cut.stage_of)
    if abs(own - cut.max_load) > 1e-9 * own:
        raise ValueError(f"the cut says that its largest load is {cut.max_load} s, and it is {own} s")
    ratios: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, split in rivals.items():
        try:
            ratios[name] = largest_load(graph, devices, split()) / own
        except Exception as error:  # torchgpipe runs the model's layers, which may raise anything
            reasons[name] = f"{type(error).__name__}: {error}"
    return {
        "n_ops": len(graph),
        "load_s": own,
        "bound_s": cut.lower_bound,
        "optimal": cut.optimal,
        "solve_s": cut.seconds,
        "ratios": ratios,
        "reasons": reasons,
    }


def study(name: str, rows: int, side: int, k: int, time_limit_s: float) -> Record:
    """Capture, price, cut and compare one model."""
    torch.manual_seed(0)
    entry = image_entry(name, side)
    model = entry.build()
    (images,), _ = entry.call(rows)
    captured = stagecut.capture(model, (images,))
    priced = Pricer(captured, [images], describe(["cpu"] * k), "measured").at(rows)
    ((kind, costs),) = priced.costs.items()
    devices = [CutDevice(f"{kind}:{s}", kind) for s in range(k)]
    cut = solve(priced.graph, devices, ordered=True, time_limit_s=time_limit_s)
    n_estimated = sum(cost.source == "analytic" for cost in costs.values())
    notes = [f"{images.shape[-1]} pixels"] if images.shape[-1] != side else []
    notes += [f"kept whole: {call}" for call in captured.opaque]
    notes += [f"ops priced by estimate: {n_estimated}"] if n_estimated else []
    compared = compare(priced.graph, devices, cut, _rivals(model, images, priced.graph, kind, k))
    return {"n_parameters": sum(map(torch.numel, model.parameters())), "notes": notes, **compared}


def _rivals(
    model: nn.Module, images: torch.Tensor, graph: nx.DiGraph, kind: str, k: int
) -> dict[str, Callable[[], Split]]:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    seconds = {node: float(record["compute_s"][kind]) for node, record in graph.nodes.items()}

    def layers() -> Split:
        found = sequential_layers(model, images)
        if found is None:
            raise NotSequential("the layers do not make the model, one after the other")
        return by_torchgpipe(graph, found, images, k)

    return {
        "parameters": lambda: by_shares(graph, parameter_counts(graph, sizes), k),
        "time": lambda: by_shares(graph, seconds, k),
        "ops": lambda: by_shares(graph, dict.fromkeys(graph, 1.0), k),
        "torchgpipe": lambda: by_block_partition(graph, seconds, k),
        "balance_by_time": layers,
    }


def table(records: Mapping[str, Record]) -> str:
    """Write the records as Markdown, by family."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|---|---|{'---:|' * (len(_COLUMNS) - 3)}---|"]
    ordered = sorted(records, key=lambda name: (records[name]["family"], name))
    for family, names in groupby(ordered, key=lambda name: records[name]["family"]):
        lines += [_row(family, name, records[name]) for name in names]
    return "\n".join(lines)


def _row(family: str, name: str, record: Record) -> str:
    if "error" in record:
        return f"| {family} | {name} |{' |' * (len(_COLUMNS) - 3)} {_cell(record['error'])} |"
    cells = [
        family,
        name,
        str(record["n_ops"]),
        f"{record['load_s'] * 1e3:.2f}",
        f"{100 * _gap(record):.2f}",
        "yes" if record["optimal"] else "no",
        f"{record['solve_s']:.2f}",
        *(f"{record['ratios'][rival]:.3f}" if rival in record["ratios"] else "" for rival in RIVALS),
        _cell("; ".join([*record["notes"], *_refusals(record)])),
    ]
    return f"| {' | '.join(cells)} |"


def _refusals(record: Record) -> list[str]:
    """Say why a rival has no number; that of most models is that they are no ``nn.Sequential``, as the text says."""
    return [f"{name}: {why}" for name, why in record["reasons"].items() if not why.startswith(NotSequential.__name__)]


def _gap(record: Record) -> float:
    return 0.0 if record["optimal"] else float(record["load_s"] / record["bound_s"] - 1)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:300]


def summary(records: Mapping[str, Record]) -> str:
    """Say how many cuts are proven, and how the other splits compare."""
    done = {name: record for name, record in records.items() if "error" not in record}
    lines = [f"{len(done)} of {len(records)} models cut, {sum(r['optimal'] for r in done.values())} proven optimal"]
    if done:
        seconds = [record["solve_s"] for record in done.values()]
        lines[0] += f", largest gap {max(map(_gap, done.values())):.2%}"
        lines[0] += f", solved in {median(seconds):.2f} s (median), {max(seconds):.2f} s (most)"
    for rival in RIVALS:
        ratios = {name: record["ratios"][rival] for name, record in done.items() if rival in record["ratios"]}
        if ratios:
            worst = max(ratios, key=ratios.__getitem__)
            lines.append(
                f"{rival}: median {median(ratios.values()):.3f}, worst {ratios[worst]:.3f} ({worst}), "
                f"best {min(ratios.values()):.3f} times our load, of {len(ratios)} models"
            )
    return "\n".join(f"- {line}" for line in lines)


def family_of(name: str) -> str:
    """Return the module of torchvision that a model is in."""
    models: Any = importlib.import_module("torchvision.models")
    return str(models.get_model_builder(name).__module__).rpartition(".")[2]


def _one_line(record: Record) -> str:
    if "error" in record:
        return f"{record['error']} ({record['total_s']:.1f} s)"
    ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in record["ratios"].items())
    return (
        f"{record['load_s'] * 1e3:.2f} ms, {'optimal' if record['optimal'] else 'not proven'} "
        f"in {record['solve_s']:.2f} s; {ratios} ({record['total_s']:.1f} s)"
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these; default: all of torchvision.models")
    parser.add_argument("--rows", type=int, default=4, help="samples of a microbatch")
    parser.add_argument("--size", type=int, default=64, help="pixels of an image's side, where a model is free in that")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--time-limit", type=float, default=20.0, help="seconds to solve each model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every record, as the run goes on")
    options = parser.parse_args()
    if importlib.util.find_spec("torchgpipe") is None:
        parser.error("torchgpipe is not installed: pip install torchgpipe")
    import_torchvision()
    models: Any = importlib.import_module("torchvision.models")
    known = models.list_models(module=models)
    options.models = options.models or known
    unknown = set(options.models) - set(known)
    if unknown:
        parser.error(f"unknown models: {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    """Study the chosen models and print table and summary."""
    options = parse()
    torch.set_num_threads(1)
    records: dict[str, Record] = {}
    for n_done, name in enumerate(options.models, 1):
        start = time.perf_counter()
        record: Record = {"family": family_of(name)}
        try:
            record |= study(name, options.rows, options.size, options.stages, options.time_limit)
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"
        gc.collect()  # a captured model is a cycle, and some have gigabytes
        record["total_s"] = time.perf_counter() - start
        records[name] = record
        print(f"[{n_done}/{len(options.models)}] {name}: {_one_line(record)}", file=sys.stderr, flush=True)
        if options.json is not None:
            about = {key: getattr(options, key) for key in ("rows", "size", "stages", "time_limit")}
            options.json.write_text(json.dumps({"about": about, "models": records}, indent=1))
    print(f"{table(records)}\n\n{summary(records)}")


if __name__ == "__main__":
    main()
