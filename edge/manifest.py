"""`manifest.json`: what a build directory holds and how faithful it is to its source.

It lets a device open a build without guessing, and lets `edge build` see that a target is finished.
Digests of the files stand in `lineage.json`, not here.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from edge.errors import UserError
from edge.lineage import is_safe_name

MANIFEST = "manifest.json"

RuntimeName = Literal["llama.cpp", "onnxruntime-genai"]


class BuildError(UserError):
    """A build directory is missing, incomplete or damaged."""


def _inside_build(name: str) -> str:
    if name != "." and not is_safe_name(name):
        raise ValueError("expected a name inside the build directory")
    return name


class _Frozen(BaseModel):
    # `model` is a path here: pydantic keeps that prefix for itself otherwise.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Fidelity(_Frozen):
    """How far a build's next-token distributions are from its source's, over scored tokens."""

    kl: Annotated[float, Field(ge=0)]
    """Mean Kullback-Leibler divergence from source to build, in nats."""
    kl_p99: Annotated[float, Field(ge=0)]
    """Its 99th percentile over tokens."""
    kl_max: Annotated[float, Field(ge=0)]
    """Its largest value."""
    top1_agreement: Annotated[float, Field(ge=0, le=1)]
    """Share of tokens where both put the same token first."""
    perplexity: Annotated[float, Field(ge=1)]
    """Of the build on the scored tokens."""
    source_perplexity: Annotated[float, Field(ge=1)]
    """Of the source on the same tokens."""
    num_tokens: Annotated[int, Field(ge=1)]
    """Tokens scored."""
    data: Literal["heldout", "probe"]
    """Records the user gave, or the few sentences that every build is checked with."""


class BuildManifest(_Frozen):
    """One build directory."""

    format: str
    """As asked for: gguf:q4_k, onnx:int4."""
    runtime: RuntimeName
    """What opens it."""
    model: Annotated[str, AfterValidator(_inside_build)]
    """The file or directory inside the build directory that the runtime loads; `.` is all of it."""
    bytes: Annotated[int, Field(gt=0)]
    """Of all files that the runtime loads."""
    architecture: str
    """llama.cpp's name: llama or qwen2."""
    num_parameters: Annotated[int, Field(gt=0)]
    context_tokens: Annotated[int, Field(gt=0)]
    """Longest sequence the model was trained on."""
    tensor_types: dict[str, int]
    """How many tensors are stored in each type."""
    fallbacks: Annotated[int, Field(ge=0)]
    """Tensors whose rows are no multiple of the wanted type's block and took a coarser one."""
    source_digest: str
    """sha256 over the source's config and weights."""
    tokenizer_digest: str
    """sha256 over the source's tokenizer and chat template."""
    settings: dict[str, Any]
    """What else shaped the build: a re-run with the same settings keeps it."""
    fidelity: Fidelity


def read_manifest(build: Path) -> BuildManifest:
    """Return the manifest of a build directory after checking that its files are there, whole.

    Raises:
        BuildError: The directory or its manifest is missing, the manifest is not one, or the
            files are not as long as it says.
    """
    path = build / MANIFEST
    if not build.is_dir():
        raise BuildError(f"{build} does not exist: pass a directory that `edge build` made")
    if not path.is_file():
        raise BuildError(
            f"{path} is missing: {build} is no build directory, "
            "pass one that `edge build` made (OUT/gguf-q4_k, not OUT)"
        )
    try:
        manifest = BuildManifest.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        where = error.errors()[0]["loc"] if isinstance(error, ValidationError) else "not JSON"
        raise BuildError(f"{path} is damaged ({where}): build it again") from None
    found = model_bytes(build / manifest.model)
    if found != manifest.bytes:
        raise BuildError(
            f"{build} holds {found} bytes of model, its manifest says {manifest.bytes}: "
            "a file is missing or cut off, fetch or build it again"
        )
    return manifest


def model_bytes(path: Path) -> int:
    """Return the bytes of what the runtime loads: one file, or every file of a directory."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())
