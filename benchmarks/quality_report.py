"""What the runs of `benchmarks.federation_quality` say: means, spreads, and pairs of one seed.

Runs are the records that `benchmarks.quality_studies.run_plan` returns. Seeds that only one of two
methods has are in no pair, so a study can be looked at while it runs. A spread is the standard
deviation over seeds (n - 1).
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.quality_studies import ATTACKS, CLIPPED, EXACT, FACTORS, PLAIN, REFERENCE, ROBUST

Record = Mapping[str, Any]
Summary = dict[str, Any]


def spread(values: Iterable[float]) -> Summary:
    """Return the mean, the standard deviation (None of one value) and the values themselves."""
    each = list(values)
    return {
        "mean": statistics.mean(each) if each else None,
        "sd": statistics.stdev(each) if len(each) > 1 else None,
        "each": each,
    }


def aggregations(records: Sequence[Record]) -> Summary:
    """Return each method's held-out loss, the gap to pooled that it closes, and its pairs.

    `gap_closed` is (base - x) / (base - pooled) of one seed; `minus_factors` the loss of a seed
    minus that of averaging factors on the same records, so below 0 is better than factors.
    """
    by_name = _losses(records)
    base = by_name.get("base", {}).get(0)
    pooled, factors = by_name.get("pooled", {}), by_name.get(FACTORS, {})
    summary: Summary = {}
    for name, losses in by_name.items():
        gaps = _pairs(losses, pooled, lambda x, p: (base - x) / (base - p)) if base else []
        summary[name] = {"loss": spread(losses.values()), "sites": _mean_by_site(records, name)}
        if name != "base":
            summary[name] |= {
                "gap_closed": spread(gaps),
                "minus_factors": spread(_pairs(losses, factors, lambda x, f: x - f)),
            }
    return summary


def wire(records: Sequence[Record]) -> Summary:
    """Return each format's held-out loss relative to float32 of the same seed, and its bytes.

    `largest_of_a_site` is the largest difference, up or down, of one site's loss in one seed.
    """
    by_name = _losses(records)
    whole = by_name.get(EXACT, {})
    num_bytes = {r["name"]: r["bytes_up"] + r["bytes_down"] for r in records}
    return {
        name: {
            "loss": spread(losses.values()),
            "relative": spread(_pairs(losses, whole, lambda x, w: x / w - 1)),
            "largest_of_a_site": _largest_of_a_site(records, name),
            "bytes": num_bytes[name],
        }
        for name, losses in by_name.items()
    }


def poison(records: Sequence[Record]) -> Summary:
    """Return, by rule and attack, how far the loss is above the run without the liar."""
    reference = next((r for r in records if r["name"] == REFERENCE), None)
    if reference is None:
        return {}
    rows: dict[str, Summary] = {}
    for record in records:
        if record["name"] == REFERENCE:
            continue
        loss = record["loss"]
        rows.setdefault(record["name"], {})[record["attack"] or "none"] = {
            "loss": loss,
            "relative": None if loss is None else loss / reference["loss"] - 1,
            "liar_norms": list(record["change_norms"].values())[-1],
            **({"failed": record["failed"]} if "failed" in record else {}),
        }
    clip = next((r["settings"]["robust.clip_norm"] for r in records if r["name"] == CLIPPED), None)
    return {
        "reference_loss": reference["loss"],
        "honest_norms": reference["change_norms"],
        "clip_norm": clip,
        "rules": rows,
    }


def markdown(study: str, records: Sequence[Record]) -> str:
    """Return the table of a study, as far as its runs are done."""
    tables = {"aggregations": _aggregations_table, "wire": _wire_table, "poison": _poison_table}
    return tables[study](records)


def _aggregations_table(records: Sequence[Record]) -> str:
    summary = aggregations(records)
    sites = sorted({site for row in summary.values() for site in row["sites"]})
    lines = [_row("aggregation", *sites, "mean loss", "gap closed", "minus factors, paired", "n")]
    lines.append(_rule(len(sites) + 5))
    for name, row in summary.items():
        cells = [_number(row["sites"].get(site), "{:.3f}") for site in sites]
        cells.append(_plus_minus(row["loss"], "{:.4f}"))
        cells += [
            _plus_minus(row.get("gap_closed"), "{:.3f}"),
            _plus_minus(row.get("minus_factors"), "{:+.4f}"),
        ]
        lines.append(_row(name, *cells, len(row["loss"]["each"])))
    return "\n".join(lines)


def _wire_table(records: Sequence[Record]) -> str:
    summary = wire(records)
    whole = summary.get(EXACT, {}).get("bytes")
    lines = [
        _row(
            "wire",
            "bytes to float32",
            "mean loss",
            "loss to float32, paired",
            "largest",
            "of a site",
        )
    ]
    lines.append(_rule(6))
    for name, row in summary.items():
        relative = row["relative"]
        lines.append(
            _row(
                "float32" if name == EXACT else name,
                _number(row["bytes"] / whole if whole and row["bytes"] else None, "{:.3f}"),
                _plus_minus(row["loss"], "{:.4f}"),
                _plus_minus(relative, "{:+.2%}"),
                _number(max(relative["each"], default=None), "{:+.2%}"),
                _number(row["largest_of_a_site"], "{:.2%}"),
            )
        )
    return "\n".join(lines)


def _poison_table(records: Sequence[Record]) -> str:
    summary = poison(records)
    rows = summary.get("rules", {})
    attacks = [*ATTACKS, "none"]
    norms = [norm for rounds in summary.get("honest_norms", {}).values() for norm in rounds]
    lines = []
    if norms:
        sentence = (
            f"Loss without the liar {summary['reference_loss']:.4f}; honest changes have norms of "
            f"{min(norms):.3g} to {max(norms):.3g} (median {statistics.median(norms):.3g}); "
            f"clip_norm {summary['clip_norm']}."
        )
        lines += [sentence, ""]
    lines += [_row("rule", *attacks), _rule(len(attacks) + 1)]
    lines += [
        _row(name, *(_poison_cell(rows[name].get(attack)) for attack in attacks))
        for name in (PLAIN, CLIPPED, *ROBUST)
        if name in rows
    ]
    return "\n".join(lines)


def _poison_cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    shown = "not finite" if cell["relative"] is None else f"{cell['relative']:+.2%}"
    return f"{shown}, run failed" if "failed" in cell else shown


def _losses(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Return the finite losses by method and seed, methods in the order of their first run."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        losses = found.setdefault(record["name"], {})
        if record["loss"] is not None:
            losses[record["seed"]] = record["loss"]
    return found


def _largest_of_a_site(records: Sequence[Record], name: str) -> float | None:
    whole = {r["seed"]: r["losses"] for r in records if r["name"] == EXACT}
    differences = [
        abs(loss / whole[record["seed"]][site] - 1)
        for record in records
        if record["name"] == name and record["seed"] in whole
        for site, loss in record["losses"].items()
        if loss is not None and whole[record["seed"]].get(site)
    ]
    return max(differences, default=None)


def _pairs(
    one: Mapping[int, float], other: Mapping[int, float], combine: Callable[[float, float], float]
) -> list[float]:
    return [combine(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())]


def _mean_by_site(records: Sequence[Record], name: str) -> dict[str, float]:
    rows = [r["losses"] for r in records if r["name"] == name and r["loss"] is not None]
    return {site: statistics.mean(row[site] for row in rows) for site in rows[0]} if rows else {}


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _rule(columns: int) -> str:
    return "|---" * columns + "|"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _plus_minus(values: Summary | None, form: str) -> str:
    if values is None or values["mean"] is None:
        return ""
    mean = form.format(values["mean"])
    return mean if values["sd"] is None else f"{mean} ± {form.format(values['sd']).lstrip('+')}"
