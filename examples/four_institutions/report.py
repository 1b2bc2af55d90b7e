"""What the demo showed: a table for the terminal, and one self-contained page with the curves."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from federation.atomic import write_atomically

COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#6b7280")
WIDTH, HEIGHT, MARGIN = 560, 260, 44


def print_table(summary: dict[str, Any], console: Console) -> None:
    """Print the sites, the student and the builds as one table."""
    table = Table(title="Held-out perplexity: lower is better")
    for name in ("", "base", "local only", "federated", "pooled"):
        table.add_column(name, justify="left" if not name else "right")
    for site, row in summary["sites"].items():
        table.add_row(site, *(f"{row[f'{kind}_ppl']:.1f}" for kind in _KINDS))
    table.add_section()
    for site, row in summary["cross_site"].items():
        table.add_row(
            f"{site}'s model elsewhere",
            "",
            f"{math.exp(row['local_log_ppl']):.1f}",
            f"{math.exp(row['federated_log_ppl']):.1f}",
            "",
        )
    table.add_row("gap from base to pooled closed", "", "", f"{summary['gap_closed']:.1%}", "")
    table.add_section()
    student = summary["student"]
    table.add_row(
        f"student, {student['params'] / 1e6:.1f} M parameters",
        f"teacher {student['teacher_ppl']:.1f}",
        f"start {student['start_ppl']:.1f}",
        f"end {student['ppl']:.1f}",
        "",
    )
    table.add_section()
    table.add_row("build", "MB", "KL to student", "first token ms", "tokens/s", style="bold")
    for build in summary["builds"]:
        table.add_row(*_build_row(build))
    console.print(table)
    device = summary["device"]
    console.print(
        f"device {device['digest'][:12]}…  {device['prompt']}\n  {escape(device['text'])}"
    )
    console.print(
        f"{summary['wall_s']:.0f} s in all, peak memory of a process "
        f"{summary['peak_bytes'] / 1e9:.2f} GB"
    )


_KINDS = ("base", "local", "federated", "pooled")


def _build_row(build: dict[str, Any]) -> tuple[str, ...]:
    return (
        build["format"],
        f"{build['bytes'] / 1e6:.1f}",
        f"{build['kl']:.4f}",
        f"{build['first_token_ms']:.0f}",
        f"{build['decode_tokens_per_s']:.0f}",
    )


def write_report(
    path: Path, summary: dict[str, Any], run: dict[str, Any], curve: Sequence[dict[str, Any]]
) -> None:
    """Write the page: perplexities, loss curves, builds, the device's answer, the lineage.

    Args:
        path: Where to.
        summary: The demo's summary.
        run: The federation's, from federation.status.summarise.
        curve: The student's training: rows with `step` and `loss`.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in run["rounds"]:
        for site in row["sites"]:
            if site["train_loss"] is not None:
                point = (row["server_round"], site["train_loss"])
                curves.setdefault(site["name"], []).append(point)
    student = summary["student"]
    sections = [
        "<h1>Four institutions, one model, one device</h1>",
        (
            f"<p>{summary['wall_s']:.0f} s in all; peak memory of a process "
            f"{summary['peak_bytes'] / 1e9:.2f} GB. Every figure here was measured by this run.</p>"
        ),
        "<h2>Held-out perplexity</h2>",
        _bars(summary["sites"]),
        (
            f"<p>The federated model closes <b>{summary['gap_closed']:.1%}</b> of the gap between "
            "the base model and one trained on all text pooled (mean log-perplexity).</p>"
        ),
        _table(
            ("site", *_KINDS),
            [
                (site, *(f"{row[f'{kind}_ppl']:.2f}" for kind in _KINDS))
                for site, row in summary["sites"].items()
            ],
        ),
        "<h2>On the other sites' text</h2>",
        "<p>Mean perplexity over the held-out text of all sites but one.</p>",
        _table(
            ("all but", "that site's own model", "federated"),
            [
                (
                    site,
                    f"{math.exp(row['local_log_ppl']):.2f}",
                    f"{math.exp(row['federated_log_ppl']):.2f}",
                )
                for site, row in summary["cross_site"].items()
            ],
        ),
        "<h2>Loss of each site, round by round</h2>",
        _curves(list(curves.values()), list(curves), "round", "training loss (nats)"),
        "<h2>Distillation</h2>",
        (
            f"<p>{student['params'] / 1e6:.1f} M parameters. Held-out perplexity: teacher "
            f"{student['teacher_ppl']:.1f}, pruned start {student['start_ppl']:.1f}, "
            f"end {student['ppl']:.1f}.</p>"
        ),
        _curves(
            [[(row["step"], row["loss"]) for row in curve]],
            ["distillation loss"],
            "step",
            "loss (nats)",
        ),
        "<h2>Builds</h2>",
        _table(
            ("format", "MB", "KL to student (nats)", "first token (ms)", "tokens/s"),
            [_build_row(build) for build in summary["builds"]],
        ),
        "<h2>The device's answer</h2>",
        f"<p>Release {html.escape(summary['device']['digest'])}</p>",
        (
            f"<blockquote><b>{html.escape(summary['device']['prompt'])}</b><br>"
            f"{html.escape(summary['device']['text'])}</blockquote>"
        ),
    ]
    write_atomically(path, _PAGE.format(body="\n".join(sections)))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _curves(
    series: Sequence[Sequence[tuple[float, float]]],
    names: Sequence[str],
    x_label: str,
    y_label: str,
) -> str:
    """Draw lines over shared axes; the y axis starts at 0 only when the data come near it."""
    points = [point for line in series for point in line]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    padding = (y_high - y_low or 1.0) * 0.08
    y_low, y_high = y_low - padding, y_high + padding

    def place(x: float, y: float) -> str:
        across = (x - x_low) / (x_high - x_low or 1)
        down = (y_high - y) / (y_high - y_low)
        return f"{MARGIN + across * (WIDTH - 2 * MARGIN):.1f},{20 + down * (HEIGHT - 64):.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{y_label}">']
    for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = y_low + fraction * (y_high - y_low)
        left, level = place(x_low, value).split(",")
        right = place(x_high, value).split(",")[0]
        parts.append(f'<path class="grid" d="M{left},{level}H{right}"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{level}" class="y">{value:.2f}</text>')
    for value in sorted({x_low, round((x_low + x_high) / 2), x_high}):
        x = place(value, y_low).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - 28}" class="x">{value:g}</text>')
    for index, (line, name) in enumerate(zip(series, names, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(place(x, y) for x, y in line)
        parts.append(f'<polyline points="{path}" stroke="{colour}"/>')
        parts.append(
            f'<text x="{WIDTH - MARGIN}" y="{24 + 14 * index}" class="name" fill="{colour}">'
            f"{html.escape(name)}</text>"
        )
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" class="x">{x_label}</text></svg>')
    return "".join(parts)


def _bars(sites: dict[str, dict[str, Any]]) -> str:
    """Draw the mean log-perplexity of each kind of model at each site."""
    highest = max(math.log(row[f"{kind}_ppl"]) for row in sites.values() for kind in _KINDS)
    group = (WIDTH - 2 * MARGIN) / len(sites)
    bar = group / (len(_KINDS) + 1)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="perplexity">']
    for place, (site, row) in enumerate(sites.items()):
        for index, kind in enumerate(_KINDS):
            height = math.log(row[f"{kind}_ppl"]) / highest * (HEIGHT - 80)
            x, y = MARGIN + place * group + index * bar, HEIGHT - 44 - height
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar * 0.9:.1f}" height="{height:.1f}" '
                f'fill="{COLOURS[index]}"><title>{site}, {kind}: {row[f"{kind}_ppl"]:.1f}</title>'
                f'</rect><text x="{x + bar / 2:.1f}" y="{y - 4:.1f}" class="bar">'
                f"{row[f'{kind}_ppl']:.1f}</text>"
            )
        middle = MARGIN + place * group + 2 * bar
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 26}" class="x">{site}</text>')
    for index, kind in enumerate(_KINDS):
        parts.append(
            f'<text x="{MARGIN + index * 120}" y="{HEIGHT - 6}" fill="{COLOURS[index]}">{kind}'
            "</text>"
        )
    parts.append('<text x="4" y="12">bars: log-perplexity; labels: perplexity</text></svg>')
    return "".join(parts)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Fedge demo</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 680px; margin: 2em auto; padding: 0 1em;
  color: #1f2937; }}
h1 {{ font-size: 1.5em; }} h2 {{ font-size: 1.1em; margin-top: 2em; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 3px 12px 3px 0; text-align: right; border-bottom: 1px solid #e5e7eb; }}
th:first-child, td:first-child {{ text-align: left; }}
svg {{ width: 100%; font-size: 11px; }} polyline {{ fill: none; stroke-width: 2; }}
.grid {{ stroke: #e5e7eb; }} .y {{ text-anchor: end; dominant-baseline: middle; }}
.x, .bar {{ text-anchor: middle; }} .bar {{ font-size: 9px; }} .name {{ text-anchor: end; }}
blockquote {{ border-left: 3px solid #2563eb; margin-left: 0; padding-left: 1em; }}
</style>
{body}
</html>
"""
