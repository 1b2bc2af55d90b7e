"""`distill`: a teacher into a student that is a fraction of its size."""

from pathlib import Path
from typing import Annotated, Any

import typer

from federation.command import print_result, run_command

app = typer.Typer(
    help="Compress a teacher into a student.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def distill(
    teacher: Annotated[Path, typer.Option(help="Model directory (Hugging Face layout).")],
    student: Annotated[
        str, typer.Option(help="Parameters (3b, 57.6m), fraction (0.43x) or model directory.")
    ],
    data: Annotated[
        list[Path] | None, typer.Option(help="JSONL: prompt and response a line; repeat.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New directory for the student.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="PEFT adapter directory, merged into the teacher.")
    ] = None,
    heldout: Annotated[
        list[Path] | None,
        typer.Option(help="Held-out JSONL; repeat. Default: the last tenth of each data file."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records in a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak; cosine to 0.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of both softmaxes in the KL.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest record.")] = None,
    seed: Annotated[int | None, typer.Option(help="Order of the data.")] = None,
    settings_file: Annotated[
        Path | None, typer.Option("--settings", help="TOML with every setting.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the shape and stop; loads no weights.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Cut the teacher to size, then train it on the teacher's own predictions.

    The same command after a kill continues from the last checkpoint.
    """
    if plan:
        from distill.student import plan_student

        planned = plan_student(student, teacher).as_json()
        print_result(planned, as_json, lambda: _print_plan(planned))
        return
    from distill.distillation import Inputs, distil
    from federation.errors import UserError

    if not data or out is None:
        missing = "--out DIR" if data else "--data DATA.jsonl"
        raise UserError(f"{missing} is missing: only --plan works without it")
    flags = {
        "temperature": temperature,
        "training.num_steps": steps,
        "training.batch_size": batch_size,
        "training.learning_rate": learning_rate,
        "training.max_tokens": max_tokens,
        "training.seed": seed,
    }
    inputs = Inputs(teacher, adapter, student, tuple(data), tuple(heldout or ()), out)
    report = distil(inputs, _settings(settings_file, flags))
    print_result({"out": str(out), **report}, as_json, lambda: _print_report(report, out))


def _settings(path: Path | None, flags: dict[str, Any]) -> Any:
    """Return the defaults, changed by the file, changed by the flags."""
    from distill.settings import DistillationSettings
    from federation.settings import SettingsError, load_settings, read_toml

    values = DistillationSettings().model_dump()
    training = values.pop("training")
    if path is not None:
        from_file = read_toml(path)
        table = from_file.pop("training", {})
        if not isinstance(table, dict):
            raise SettingsError(f"{path}: training is {table!r}: expected a table, [training]")
        training |= table
        values |= from_file
    given = {name: value for name, value in flags.items() if value is not None}
    flat = {f"training.{name}": value for name, value in training.items()}
    return load_settings(DistillationSettings, {**values, **flat, **given}, str(path or "distill"))


def _print_plan(planned: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("", "parameters", "layers", "hidden", "heads", "MLP"):
        table.add_column(column, justify="left" if not column else "right")
    named = [("teacher", planned["teacher"]), ("student", planned["student"])]
    named += [("runner-up", shape) for shape in planned["runners_up"]]
    for name, shape in named:
        table.add_row(
            name,
            f"{shape['params']:,}",
            str(shape["num_layers"]),
            str(shape["hidden"]),
            f"{shape['num_heads']}/{shape['num_kv_heads']} x {shape['head_dim']}",
            str(shape["intermediate"]),
        )
    console = Console()
    console.print(table)
    console.print(f"The student {planned['why']}")


def _print_report(report: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{out}: {report['student']['params']:,} parameters")
    for column in ("held out", "KL to the teacher", "cross-entropy", "same first token"):
        table.add_column(column, justify="left" if column == "held out" else "right")
    table.add_row("teacher", "0.0000", f"{report['teacher']['ce']:.4f}", "100.0%")
    for name, title in (("start", "student, cut"), ("end", "student, distilled")):
        row = report[name]
        table.add_row(title, f"{row['kl']:.4f}", f"{row['ce']:.4f}", f"{row['top1']:.1%}")
    console = Console()
    console.print(table)
    console.print(f"{report['tokens']:,} tokens in {report['seconds']:.0f} s. {out}/report.html")


def main() -> None:
    """Entry point of the console script."""
    run_command(app)


if __name__ == "__main__":
    main()
