"""`edge build`: one model directory into build directories, each proven against its source.

A target is made whole under a temporary name, measured with the runtime that will open it, and only
then renamed: what has its name is finished. So a killed build is resumed by the same command.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from edge.atomic import exclusive, new_directory, write_atomically
from edge.errors import UserError
from edge.fidelity import (
    SourceReference,
    check_full_precision,
    check_tokenizer,
    measure_fidelity,
    read_source,
)
from edge.gguf import write_gguf
from edge.heldout import PROBES, Example, encode_examples, read_heldout
from edge.lineage import sha256_of_file, write_lineage
from edge.llama import share_cores
from edge.manifest import (
    MANIFEST,
    BuildManifest,
    Fidelity,
    RuntimeName,
    model_bytes,
    read_manifest,
)
from edge.onnx_model import PRECISIONS, build_onnx
from edge.quantization import MIXES
from edge.runtime import load_model
from edge.source_model import SourceModel, open_source_model
from edge.vocabulary import Vocabulary, load_tokenizer, read_vocabulary

TARGETS = (*(f"gguf:{name}" for name in MIXES), *(f"onnx:{name}" for name in PRECISIONS))

_KL_LIMITS = {"gguf:f32": 1e-3, "gguf:f16": 1e-3, "gguf:bf16": 1e-2, "onnx:fp32": 1e-3}
"""Mean nats that rounding alone may cost. bfloat16 rounds activations to 8 bits as well."""

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done and how much there is."""


@dataclass(frozen=True)
class Built:
    """One target's outcome."""

    directory: Path
    manifest: BuildManifest
    was_there: bool
    """Finished by an earlier run and kept."""

    def as_json(self) -> dict[str, Any]:
        """Return the manifest's fields, and where the build lies."""
        where = {"directory": str(self.directory), "was_there": self.was_there}
        return where | self.manifest.model_dump(mode="json")

    def as_line(self) -> str:
        """Return one line for a person."""
        manifest, fidelity = self.manifest, self.manifest.fidelity
        kept = "  (kept from an earlier run)" if self.was_there else ""
        return (
            f"{self.directory}  {manifest.bytes / 1e6:,.1f} MB  KL {fidelity.kl:.3g} nats, "
            f"top-1 {fidelity.top1_agreement:.1%}, perplexity {fidelity.perplexity:.4g} "
            f"(source {fidelity.source_perplexity:.4g}) over {fidelity.num_tokens} tokens{kept}"
        )


@dataclass(frozen=True)
class Order:
    """All that a run needs to know before it writes: checked, nothing made yet."""

    model: SourceModel
    tokenizer: Any
    vocabulary: Vocabulary
    examples: list[Example]
    data: Literal["heldout", "probe"]
    settings: dict[str, Any]
    """What besides the model shapes a build, as its manifest keeps it."""

    @property
    def context_tokens(self) -> int:
        """Longest sequence the model was trained on."""
        return int(self.model.config["max_position_embeddings"])

    @cached_property
    def reference(self) -> SourceReference:
        """What the source predicts; computed when the first target needs it."""
        return read_source(self.model.directory, self.examples)


@dataclass(frozen=True)
class _Files:
    """What a writer made."""

    runtime: RuntimeName
    path: Path
    tensor_types: dict[str, int]
    num_fallbacks: int


def build(
    model: Path,
    targets: Sequence[str],
    out: Path,
    heldout: Sequence[Path] = (),
    heldout_tokens: int = 2000,
    on_progress: OnProgress = lambda *_: None,
) -> list[Built]:
    """Make every target of ``model`` in its own directory below ``out``.

    Args:
        model: A Hugging Face model directory (Llama or Qwen2 family) with its tokenizer.
        targets: Of ``TARGETS``; ``gguf:q4_k`` becomes ``out/gguf-q4_k``.
        out: Made if missing. Finished targets of the same model and settings are kept.
        heldout: JSONL files of prompts and responses; a few built-in sentences if none.
        heldout_tokens: Response tokens to score.
        on_progress: Told of each step.

    Raises:
        UserError: An argument, the model or a file must be changed; nothing is written.
        EdgeError: A target could not be made faithfully; that target is not there.
    """
    share_cores()  # before torch is loaded: it and llama.cpp take turns on the same cores
    names = [parse_target(target) for target in targets]
    order = _take_order(model, heldout, heldout_tokens)
    finished = {name: _finished(out / _directory(name), order) for name in names}
    built = []
    with exclusive(out / ".lock"):
        for name in dict.fromkeys(names):
            directory = out / _directory(name)
            kept = finished[name]
            manifest = kept or _make(name, directory, order, on_progress)
            built.append(Built(directory, manifest, kept is not None))
    return built


def parse_target(target: str) -> str:
    """Return the target's own name; `q4_k_m`, as llama.cpp's users call it, is `q4_k`.

    Raises:
        UserError: There is no such target.
    """
    name = "gguf:q4_k" if target == "gguf:q4_k_m" else target
    if name not in TARGETS:
        raise UserError(f"--to {target} is unknown: expected {', '.join(TARGETS)}")
    return name


def _take_order(model: Path, heldout: Sequence[Path], heldout_tokens: int) -> Order:
    if heldout_tokens < 1:
        raise UserError(f"--heldout-tokens is {heldout_tokens}: expected at least 1")
    source = open_source_model(model)
    records = read_heldout(heldout) if heldout else list(PROBES)
    tokenizer = load_tokenizer(model)
    vocabulary = read_vocabulary(source, tokenizer)
    return Order(
        source,
        tokenizer,
        vocabulary,
        encode_examples(records, tokenizer, heldout_tokens),
        "heldout" if heldout else "probe",
        {
            "heldout": [sha256_of_file(path) for path in heldout],
            "heldout_tokens": heldout_tokens,
        },
    )


def _finished(directory: Path, order: Order) -> BuildManifest | None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    manifest = read_manifest(directory)
    source = order.model
    for what, there, here in (
        ("another model", manifest.source_digest, source.digest),
        ("another tokenizer", manifest.tokenizer_digest, source.tokenizer_digest),
        ("other settings", manifest.settings, order.settings),
    ):
        if there != here:
            raise UserError(
                f"{directory} was built from {what} ({_short(there)} there, {_short(here)} now): "
                "remove it or choose another --out"
            )
    return manifest


def _make(name: str, directory: Path, order: Order, on_progress: OnProgress) -> BuildManifest:
    for leftover in directory.parent.glob(f".{directory.name}.*"):
        shutil.rmtree(leftover)  # of a killed run: we hold the lock, so nobody is at work on it
    write = _write_gguf if name.startswith("gguf:") else _write_onnx
    with new_directory(directory) as place:
        files = write(name, place, order, on_progress)
        fidelity = _prove(name, files, order, on_progress)
        manifest = BuildManifest(
            format=name,
            runtime=files.runtime,
            model=files.path.name,
            bytes=model_bytes(files.path),
            architecture=order.model.architecture,
            num_parameters=order.model.num_parameters,
            context_tokens=order.context_tokens,
            tensor_types=files.tensor_types,
            fallbacks=files.num_fallbacks,
            source_digest=order.model.digest,
            tokenizer_digest=order.model.tokenizer_digest,
            settings=order.settings,
            fidelity=fidelity,
        )
        write_atomically(place / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        _copy_licences(order.model.directory, place)
        _write_lineage(place, manifest, order)
    return manifest


def _write_gguf(name: str, place: Path, order: Order, on_progress: OnProgress) -> _Files:
    path = place / "model.gguf"
    mix = MIXES[name.removeprefix("gguf:")]
    written = write_gguf(
        path,
        order.model,
        order.vocabulary,
        mix,
        lambda done, total: on_progress(f"{name}: writing", done, total),
    )
    return _Files("llama.cpp", path, written.tensor_types, written.num_fallbacks)


def _write_onnx(name: str, place: Path, order: Order, on_progress: OnProgress) -> _Files:
    path = place / "onnx"
    path.mkdir()
    on_progress(f"{name}: building", 0, 1)
    tensor_types = build_onnx(order.model.directory, name.removeprefix("onnx:"), path)
    on_progress(f"{name}: building", 1, 1)
    return _Files("onnxruntime-genai", path, tensor_types, 0)


def _prove(name: str, files: _Files, order: Order, on_progress: OnProgress) -> Fidelity:
    step = f"{name}: comparing with its source"
    on_progress(step, 0, 1)
    with load_model(files.runtime, files.path, order.context_tokens) as runtime:
        check_tokenizer(runtime, order.tokenizer, name)
        fidelity = measure_fidelity(order.reference, runtime, order.data)
    if name in _KL_LIMITS:
        check_full_precision(fidelity, name, _KL_LIMITS[name])
    on_progress(step, 1, 1)
    return fidelity


def _copy_licences(model: Path, place: Path) -> None:
    for pattern in ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*"):
        for file in sorted(model.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, place / file.name)


def _write_lineage(place: Path, manifest: BuildManifest, order: Order) -> None:
    makers = ("gguf", "xllamacpp") if manifest.runtime == "llama.cpp" else ("onnxruntime-genai",)
    write_lineage(
        place,
        stage="build",
        directories={"model": order.model.directory},
        digests={f"heldout_{i}": digest for i, digest in enumerate(order.settings["heldout"])},
        parameters={
            "format": manifest.format,
            "heldout_tokens": order.settings["heldout_tokens"],
            "made_with": {package: version(package) for package in makers},
        },
        metrics={"bytes": manifest.bytes, "fidelity": manifest.fidelity.model_dump()},
    )


def _directory(name: str) -> str:
    return name.replace(":", "-")


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
