"""What a build directory says of itself, read from its files and not only from its manifest."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from edge.manifest import BuildError, read_manifest

_SUMMARY = (
    "general.architecture",
    "general.name",
    "general.file_type",
    "fedge.source_digest",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
)


def inspect_build(build: Path) -> dict[str, Any]:
    """Return the manifest, the digest of the lineage and, for GGUF, what the file itself says.

    Raises:
        BuildError: The build is missing or damaged.
    """
    manifest = read_manifest(build)
    lineage = build / "lineage.json"
    found: dict[str, Any] = manifest.model_dump(mode="json")
    found["lineage_sha256"] = (
        hashlib.sha256(lineage.read_bytes()).hexdigest() if lineage.is_file() else None
    )
    if manifest.runtime == "llama.cpp":
        found |= _read_gguf(build / manifest.model)
    return found


def inspection_lines(found: dict[str, Any]) -> list[str]:
    """Return ``found`` as lines for a person."""
    fidelity = found["fidelity"]
    types = ", ".join(f"{count} {kind}" for kind, count in sorted(found["tensor_types"].items()))
    lines = [
        f"format        {found['format']} for {found['runtime']}",
        f"size          {found['bytes']:,} bytes, {found['num_parameters']:,} parameters",
        f"tensors       {types} ({found['fallbacks']} fallbacks)",
        f"divergence    KL {fidelity['kl']:.3g} nats, 99th percentile {fidelity['kl_p99']:.3g}",
        f"top-1         {fidelity['top1_agreement']:.1%} the same",
        f"perplexity    {fidelity['perplexity']:.4g}, source {fidelity['source_perplexity']:.4g}",
        f"scored        {fidelity['num_tokens']} {fidelity['data']} tokens",
        f"source        {found['source_digest']}",
        f"lineage       {found['lineage_sha256'] or 'none'}",
    ]
    return lines + [f"  {key} = {value}" for key, value in found.get("metadata", {}).items()]


def _read_gguf(path: Path) -> dict[str, Any]:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise BuildError(f"{path} is no GGUF file ({error}): build it again") from None
    prefix = f"{reader.fields['general.architecture'].contents()}."
    metadata = {
        key: field.contents()
        for key, field in reader.fields.items()
        if key in _SUMMARY or key.startswith(prefix)
    }
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    return {"metadata": metadata, "tensor_types": dict(types)}
