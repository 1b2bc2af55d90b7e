"""What `federation plan` and `federation status` look like in a terminal.

A site chooses its own name and the words of its errors, so both are shown without control
characters: they must not be able to write over what a person reads.
"""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from federation.plan import Plan, PrivacyCost
from federation.traffic import Traffic

_MB = 1e6


def plan_view(plan: Plan) -> RenderableType:
    """Return a plan for a person: this run, then the other choices beside it."""
    notes = [Text(f"! {note}", style="yellow") for note in plan.notes]
    return Group(
        _run_table(plan), _aggregation_table(plan), _wire_table(plan), *notes, Text(plan.privacy)
    )


def _privacy_rows(table: Table, cost: PrivacyCost) -> None:
    table.add_section()
    shown = "no bound" if cost.epsilon is None else f"{cost.epsilon:.3g}"
    said = f"delta {cost.delta:g}; {cost.steps} steps of {cost.sampling_rate:.3%} of the records"
    table.add_row(f"epsilon, noise {cost.noise_multiplier:g}", shown, said)
    if cost.noise_for_target is not None:
        said = f"noise multiplier, for epsilon {cost.target_epsilon:g}"
        table.add_row("noise", f"{cost.noise_for_target:.4g}", said)


def _run_table(plan: Plan) -> Table:
    table = Table(
        title=f"{plan.num_rounds} rounds, {plan.num_asked} of {plan.num_sites} sites a round, "
        f"{plan.aggregation}, rank {plan.rank}",
        title_justify="left",
        show_header=False,
    )
    table.add_column("what", no_wrap=True)
    table.add_column("how much", justify="right", no_wrap=True)
    table.add_column("of what")
    down, up = plan.down, plan.up
    table.add_row("adapter", f"{plan.num_parameters / 1e6:.2f} M", f"{plan.num_modules} modules")
    if down.site.first == down.site.even:
        table.add_row("down, a site, a round", _mb(down.site.first), plan.downlink)
    else:
        table.add_row("down, a site, round 1", _mb(down.site.first), "float32, and to newcomers")
        table.add_row("  later rounds", _mb(down.site.even), plan.downlink)
    if up.site.odd == up.site.even:
        table.add_row("up, a site, a round", _mb(up.site.odd), plan.uplink)
    else:
        table.add_row("up, a site, odd rounds", _mb(up.site.odd), f"{plan.uplink}, B only")
        table.add_row("  even rounds", _mb(up.site.even), f"{plan.uplink}, A only")
    table.add_row("down, all sites, a round", _mb(down.all_sites.even), _unlike(down, "first"))
    table.add_row("up, all sites, a round", _mb(up.all_sites.odd), _unlike(up, "even"))
    table.add_row("whole run", _mb(down.run + up.run), f"down {_mb(down.run)}, up {_mb(up.run)}")
    table.add_section()
    disk, memory = plan.disk_bytes, plan.memory_bytes
    table.add_row("server disk", _mb(sum(disk.values())), f"MB: {_parts(disk)}")
    table.add_row("server memory", _mb(max(memory.values())), f"above torch; MB: {_parts(memory)}")
    table.add_row("averaging, a round", f"{plan.aggregation_s:.2f} s", "one core")
    if plan.privacy_cost is not None:
        _privacy_rows(table, plan.privacy_cost)
    return table


def _unlike(traffic: Traffic, which: str) -> str:
    """Say what all sites move in the rounds that are not like the others."""
    other = getattr(traffic.all_sites, which)
    name = {"first": "round 1", "even": "even rounds"}[which]
    return f"{name}: {_mb(other)}" if other != traffic.all_sites.odd else ""


def _aggregation_table(plan: Plan) -> Table:
    table = Table(title="Each aggregation (MB up: a site, a round)", title_justify="left")
    table.add_column("aggregation", no_wrap=True)
    for column in ("MB up", "s", "MB mem"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("exact mean", "secure sum", "mixed ranks", "liars borne"):
        table.add_column(column)
    for row in plan.aggregations:
        table.add_row(
            row.aggregation,
            f"{row.up_bytes / _MB:.1f}",
            f"{row.aggregation_s:.2f}",
            f"{row.memory_bytes / _MB:.0f}",
            "yes" if row.is_exact else "no",
            "yes" if row.is_sum else "no",
            row.mixed_ranks,
            str(row.num_liars or "none"),
            style="bold" if row.aggregation == plan.aggregation else "",
        )
    return table


def _wire_table(plan: Plan) -> Table:
    table = Table(
        title="Number formats, both ways (MB: a site, a round)",
        title_justify="left",
    )
    table.add_column("format", no_wrap=True)
    for column in ("MB down", "MB up", "whole run", "to float32"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in plan.wires:
        table.add_row(
            row.dtype,
            f"{row.down_bytes / _MB:.1f}",
            f"{row.up_bytes / _MB:.1f}",
            _mb(row.run_bytes),
            f"{row.ratio:.3f}",
            style="bold" if row.dtype == plan.downlink == plan.uplink else "",
        )
    return table


def status_view(summary: dict[str, Any]) -> RenderableType:
    """Return where a run stands: its rounds, its sites, what failed and why."""
    parts: list[RenderableType] = [Text(_headline(summary)), _round_table(summary)]
    if summary["site_rows"]:
        parts.append(_site_table(summary))
    if "reason" in summary:
        parts.append(Text(_plain(summary["reason"]), style="red"))
    for failure in summary["failures"]:
        place = f"round {failure['server_round']}, site {_plain(failure['site'])}"
        parts.append(Text(f"{place}: {_plain(failure['reason'])}", style="yellow"))
    return Group(*parts)


def _headline(summary: dict[str, Any]) -> str:
    total = summary["num_rounds"] if summary["num_rounds"] is not None else "?"
    line = f"{summary['state']}: round {summary['rounds_done']} of {total}"
    if summary["aggregation"] is not None:
        line += f", {summary['aggregation']}, rank {summary['rank']}"
    if summary["resumed"]:
        line += f", resumed {summary['resumed']} times" if summary["resumed"] > 1 else ", resumed"
    line += f"; {_mb(summary['bytes_down'])} down, {_mb(summary['bytes_up'])} up"
    if summary["idle_s"] is not None:
        line += f"; last event {_ago(summary['idle_s'])} ago"
    return line


def _round_table(summary: dict[str, Any]) -> Table:
    table = Table()
    columns = ("round", "asked", "came", "failed", "late", "MB down", "MB up", "loss")
    for column in (*columns, "mean error", "s"):
        table.add_column(column, justify="right")
    for row in [*summary["rounds"], *([summary["current"]] if summary["current"] else [])]:
        again = f" (try {row['attempt']})" if row["attempt"] > 1 else ""
        seconds = "…" if row is summary["current"] else "not known"
        table.add_row(
            f"{row['server_round']}{again}",
            str(row["num_asked"]),
            str(row["num_updates"]),
            str(row["num_failed"]),
            str(row["num_late"]),
            f"{row['bytes_down'] / _MB:.1f}",
            f"{row['bytes_up'] / _MB:.1f}",
            _loss(row["train_loss"]) if "train_loss" in row else "",
            f"{row['aggregation_error']:.2%}" if "aggregation_error" in row else "",
            f"{row['seconds']:.1f}" if "seconds" in row else seconds,
        )
    return table


def _site_table(summary: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("site")
    columns = ("last round", "behind", "came", "failed", "late", "MB down", "MB up", "last loss")
    for column in columns:
        table.add_column(column, justify="right")
    for row in summary["site_rows"]:
        table.add_row(
            Text(_plain(row["name"] or row["site"])),
            str(row["last_round"] or "never"),
            str(row["rounds_behind"]),
            str(row["num_updates"]),
            str(row["num_failed"]),
            str(row["num_late"]),
            f"{row['bytes_down'] / _MB:.1f}",
            f"{row['bytes_up'] / _MB:.1f}",
            _loss(row["last_loss"]) if row["num_updates"] else "",
        )
    return table


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4f}"


def _parts(named_bytes: dict[str, int]) -> str:
    return ", ".join(f"{name} {count / _MB:.1f}" for name, count in named_bytes.items() if count)


def _mb(count: int) -> str:
    return f"{count / _MB:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


def _plain(text: str) -> str:
    """Return ``text`` with a ? for every character that does not print."""
    return "".join(character if character.isprintable() else "?" for character in text)
