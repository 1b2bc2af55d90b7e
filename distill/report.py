"""The report of a distillation as one HTML file without scripts or links."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, MARGIN = 640, 240, 40

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:44rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%;margin:1rem 0}
th,td{padding:.35rem .6rem;border-bottom:1px solid #d5dbe1;text-align:right}
th:first-child,td:first-child{text-align:left}
svg{width:100%;height:auto}
text{font:11px system-ui,sans-serif;fill:#5a6773}
"""


def render(report: dict[str, Any], name: str) -> str:
    """Return a self-contained page: why this shape, one table, the loss curve.

    Args:
        report: What ``report.json`` holds.
        name: Title of the student.
    """
    share = report["student"]["params"] / report["teacher"]["params"]
    steps = f"{report['steps']} steps over {report['tokens']:,} response tokens"
    losses = [point["loss"] for point in report["curve"]]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title><style>{STYLE}</style>
</head><body>
<h1>{escape(name)}</h1>
<p>{report["student"]["params"]:,} parameters, {share:.0%} of the teacher. The student
{escape(report["why"])}</p>
{_table(report)}
<p>Held out: {report["heldout_tokens"]:,} response tokens. KL(teacher ‖ student) and cross-entropy
in nats a token, at temperature 1. Trained for {steps} in {report["seconds"]:,.0f} s; published
recipes for a full recovery use tens of billions of tokens.</p>
<h2>Training loss</h2>
{_curve(losses)}
</body></html>
"""


def _table(report: dict[str, Any]) -> str:
    teacher, start, end = report["teacher"], report["start"], report["end"]
    students = ((start, "student, cut"), (end, "student, distilled"))
    rows = [("teacher", teacher["params"], "0.000", teacher["ce"], "100.0%")]
    rows += [
        (title, report["student"]["params"], f"{row['kl']:.3f}", row["ce"], f"{row['top1']:.1%}")
        for row, title in students
    ]
    cells = "".join(
        f"<tr><td>{title}</td><td>{params:,}</td><td>{kl}</td><td>{ce:.3f}</td><td>{top1}</td></tr>"
        for title, params, kl, ce, top1 in rows
    )
    return (
        "<table><tr><th></th><th>parameters</th><th>held-out KL</th><th>cross-entropy</th>"
        f"<th>same first token</th></tr>{cells}</table>"
    )


def _curve(losses: Sequence[float]) -> str:
    """Draw the losses as one line; the vertical axis starts at zero."""
    top = max([*losses, 1e-9])
    inner_width, inner_height = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    base = HEIGHT - MARGIN
    points = " ".join(
        f"{MARGIN + inner_width * index / max(len(losses) - 1, 1):.1f},"
        f"{base - inner_height * loss / top:.1f}"
        for index, loss in enumerate(losses)
    )
    right = WIDTH - MARGIN
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="training loss by step">'
        f'<path d="M{MARGIN} {MARGIN}V{base}H{right}" fill="none" stroke="#9aa5b0"/>'
        f'<polyline points="{points}" fill="none" stroke="#0b6e4f" stroke-width="2"/>'
        f'<text x="{MARGIN - 4}" y="{MARGIN}" text-anchor="end">{top:.2f}</text>'
        f'<text x="{MARGIN - 4}" y="{base}" text-anchor="end">0</text>'
        f'<text x="{MARGIN}" y="{HEIGHT - 18}">step 1</text>'
        f'<text x="{right}" y="{HEIGHT - 18}" text-anchor="end">step {len(losses)}</text></svg>'
    )
