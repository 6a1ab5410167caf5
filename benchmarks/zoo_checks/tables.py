"""The zoo's records as text: one line per record, a summary table, a document."""

from __future__ import annotations

import re
from statistics import median
from typing import Any

from zoo_entries import GROUPS, TITLES

from .examine import METHODS
from .judge import worst

EXACT = ("train", "other_seed")
MODES = ("eval", "train_again")
# Parts whose largest is at most this much over their mean count as balanced.
BALANCED = 1.3
_NAMES = {
    "eager": "the eager model itself",
    "stagecut": "stagecut.capture",
    "fx": "torch.fx.symbolic_trace",
    "export": "torch.export.export",
    "pipelining": "torch.distributed.pipelining (2 stages)",
}


def judgement(record: dict[str, Any]) -> dict[str, bool | None]:
    """Reduce a record's checks to: exact, other batch, modes, balanced; ``None`` is not applicable."""
    checks = record.get("checks") or {}
    ran = bool(checks)
    return {
        "exact": worst(checks, EXACT) if ran else False,
        "other batch": worst(checks, ("other_batch",)) if ran else False,
        "train/eval": worst(checks, MODES) if ran else False,
        "balance": None if record.get("balance") is None else record["balance"] <= BALANCED,
    }


def one_line(record: dict[str, Any]) -> str:
    """Say how an examination went."""
    parts = [record["kind"]]
    if record.get("opaque"):
        parts[0] += f" ({len(record['opaque'])} opaque)"
    if record.get("error"):
        return f"{parts[0]}: {record['error'][:160]}"
    for name, verdict in (record.get("checks") or {}).items():
        if verdict["ok"] is False:
            parts.append(f"{name} FAILED: {verdict['detail'][:120]}")
        elif verdict["ok"] is None:
            parts.append(f"{name} not judged: {verdict['detail'][:120]}")
        elif not verdict["decisive"]:
            parts.append(f"{name} not decisive")
    passed = [verdict for verdict in (record.get("checks") or {}).values() if verdict["ok"]]
    bitwise = all(verdict["bitwise"] for verdict in passed)
    parts.append("bitwise" if bitwise else "in float64" if record.get("double") else "within rounding")
    if record.get("balance") is not None:
        parts.append(f"balance {record['balance']:.2f}")
    parts.append(f"capture {record.get('capture_cpu_s', 0):.2f} s, in all {record.get('cpu_s', 0):.1f} s")
    return ", ".join(parts)


def summary(report: dict[str, Any]) -> str:
    """Tabulate methods by groups, as Markdown."""
    lines = []
    for group, title in _columns(report).items():
        lines += [f"### {title}", "", _header(), _rule()]
        for method in METHODS:
            records = _records(report, group, method)
            if records:
                lines.append(_row(_NAMES[method], records))
        lines += [*_on_the_same_entries(report, group), ""]
    return "\n".join(lines)


def _columns(report: dict[str, Any]) -> dict[str, str]:
    present = {entry["group"] for entry in report["entries"].values()}
    return {group: TITLES[group] for group in GROUPS if group in present}


_COLUMNS = (
    *("captured by", "entries", "whole", "with opaque parts", "one opaque op", "refused", "exact", "other batch"),
    *("train/eval", "everything", "balanced", "balance (median)", "seconds (median)"),
)


def _header() -> str:
    return f"| {' | '.join(_COLUMNS)} |"


def _rule() -> str:
    return f"|{'|'.join(['---', *['---:'] * (len(_COLUMNS) - 1)])}|"


def _on_the_same_entries(report: dict[str, Any], group: str) -> list[str]:
    """Tabulate stagecut on the entries that other methods were tried on, where these are fewer."""
    methods = [entry["methods"] for entry in report["entries"].values() if entry["group"] == group]
    ours = [own for own in methods if "stagecut" in own]
    both = [own for own in ours if own.keys() & {"fx", "export", "pipelining"}]
    if not both or len(both) == len(ours):
        return []
    return [_row(f"{_NAMES['stagecut']}, of the entries that others were tried on", [own["stagecut"] for own in both])]


def _row(name: str, records: list[dict[str, Any]]) -> str:
    kinds = [record["kind"] for record in records]
    opened = [record for record in records if record["kind"] in ("whole", "parts")]
    judged = [judgement(record) for record in records]
    balances = [record["balance"] for record in opened if record.get("balance") is not None]
    seconds = [record["capture_cpu_s"] for record in records if "capture_cpu_s" in record]
    cells = [
        name,
        len(records),
        kinds.count("whole"),
        kinds.count("parts"),
        kinds.count("opaque"),
        len(records) - sum(kinds.count(kind) for kind in ("whole", "parts", "opaque")),
        *(_share([item[name] for item in judged]) for name in ("exact", "other batch", "train/eval")),
        sum(complete(record) for record in records),
        f"{sum(balance <= BALANCED for balance in balances)}/{_n_balanceable(records)}",
        f"{median(balances):.2f}" if balances else "",
        f"{median(seconds):.2f}" if seconds else "",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def complete(record: dict[str, Any]) -> bool:
    """Say whether the model was opened (not one opaque op) and passed every check that applies."""
    item = judgement(record)
    checks = (item["exact"], item["other batch"], item["train/eval"])
    return record["kind"] in ("whole", "parts") and all(check is not False for check in checks)


def _share(values: list[bool | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known)}/{len(known)}"


def _n_balanceable(records: list[dict[str, Any]]) -> int:
    return sum(record.get("n_blocks", 0) >= 8 for record in records)


def _records(report: dict[str, Any], group: str, method: str) -> list[dict[str, Any]]:
    entries = [entry for entry in report["entries"].values() if entry["group"] == group]
    return [entry["methods"][method] for entry in entries if method in entry["methods"]]


def markdown(report: dict[str, Any]) -> str:
    """Write the document: what was measured, the summary, what is not fully captured, and what failed."""
    versions = ", ".join(f"{name} {version}" for name, version in report["about"]["versions"].items())
    lines = [
        "# Coverage",
        "",
        "Written by `python benchmarks/zoo.py --json FILE --report --markdown docs/coverage.md`; every number is",
        f"measured, with {versions}, Python {report['about']['python']}.",
        "",
        _EXPLANATION,
        "",
        summary(report),
        *_not_fully_captured(report),
        *_failures(report),
        *_out_of_balance(report),
        *_left_out(report),
    ]
    return "\n".join(lines).rstrip() + "\n"


_EXPLANATION = """\
Models have random weights; each is captured in training mode by one example call. *Exact*: result, every
parameter's gradient and every buffer equal those of an eager copy, under the same seed, for two seeds and two inputs.
*Other batch*: the same capture, another number of rows. *Train/eval*: the captured module switched to evaluation, and
back. *Everything*: opened (not one opaque op) and right in all of that. *Balanced*: four contiguous parts of the graph
whose largest has at most 30% more FLOPs than their mean, of models that repeat a block at least 8 times. A count `a/b`
is of `b` entries to which the check applies. *Seconds* are of one processor."""
_PLACE = re.compile(r"\S*/(?:site-packages|benchmarks|tests)/")


def _not_fully_captured(report: dict[str, Any]) -> list[str]:
    lines = ["## Not fully captured by stagecut", ""]
    for label, entry in report["entries"].items():
        record = entry["methods"].get("stagecut")
        if record is None or record["kind"] == "whole":
            continue
        reasons = record.get("opaque") or [record.get("error", record["kind"])]
        lines.append(f"- `{label}`: {_grouped(reasons)}")
    return [*(lines if len(lines) > 2 else [*lines, "Nothing."]), ""]


def _grouped(reasons: list[str]) -> str:
    """Join reasons; the same reason in many places is said once, with the first place and their number."""
    seen: dict[str, list[str]] = {}
    for reason in reasons:
        place, colon, why = reason.partition("): ")
        seen.setdefault(why if colon else reason, []).append(f"{place})" if colon else "")
    said = []
    for why, places in seen.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        said.append(f"{places[0]}{more}: {why}" if places[0] else why)
    return _PLACE.sub("", "; ".join(said).replace("\n", " "))


def _failures(report: dict[str, Any]) -> list[str]:
    lines = ["## Checks that failed", ""]
    for label, entry in report["entries"].items():
        checks = entry["methods"].get("stagecut", {}).get("checks") or {}
        failed = [f"{name}: {verdict['detail']}" for name, verdict in checks.items() if verdict["ok"] is False]
        if failed:
            lines.append(f"- `{label}`: {'; '.join(failed)}")
    return [*(lines if len(lines) > 2 else [*lines, "None."]), ""]


def _out_of_balance(report: dict[str, Any]) -> list[str]:
    """List what cannot be cut evenly; one op may be heavier than a part should be, and no cut divides it."""
    lines = ["## Out of balance", ""]
    for label, entry in report["entries"].items():
        record = entry["methods"].get("stagecut", {})
        balance, heaviest = record.get("balance"), record.get("heaviest", 0.0)
        if balance is not None and balance > BALANCED:
            kind = "its heaviest op alone is" if record["kind"] == "whole" else "its heaviest op, or opaque module, is"
            lines.append(f"- `{label}`: {balance:.2f}; {kind} {heaviest:.2f} of a part")
    return [*(lines if len(lines) > 2 else [*lines, "None."]), ""]


def _left_out(report: dict[str, Any]) -> list[str]:
    lines = [f"- `{name}`: {why}" for name, why in report.get("missing", {}).items()]
    for label, entry in report["entries"].items():
        for record in entry["methods"].values():
            checks = record.get("checks") or {}
            unjudged = {verdict["detail"] for verdict in checks.values() if verdict["ok"] is None}
            lines += [f"- `{label}`: {detail}" for detail in unjudged]
    return ["## Not judged", "", *(dict.fromkeys(lines) or ["Nothing."]), ""]
