"""Small real artefacts for the tests of lineage, registry and agent: random bytes, true digests."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from edge.lineage import write_lineage


def noise(seed: int, num_bytes: int) -> bytes:
    """Return bytes that look random and are the same each time."""
    return hashlib.shake_256(str(seed).encode()).digest(num_bytes)


def flip_bit(path: Path, offset: int = -2) -> None:
    """Change one bit of a file, and be sure of it."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    assert bytes(content) != path.read_bytes()
    path.write_bytes(content)


def write_model(directory: Path, seed: int) -> Path:
    """Write what looks like a model directory; the tokenizer is the same for every seed."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text('{"model": {}}')
    (directory / "model.safetensors").write_bytes(noise(seed, 4_000))
    return directory


def write_build(
    directory: Path, *, seed: int = 0, model: Path | None = None, num_bytes: int = 20_000
) -> Path:
    """Write a build directory as `edge build` lays it out."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.gguf").write_bytes(noise(seed, num_bytes))
    (directory / "tokenizer.json").write_text('{"model": {}}')
    fidelity = dict.fromkeys(("kl", "kl_p99", "kl_max", "top1_agreement"), 0.5)
    fidelity |= dict.fromkeys(("perplexity", "source_perplexity"), 12.0)
    manifest = {
        "format": "gguf:q4_k",
        "runtime": "llama.cpp",
        "model": "model.gguf",
        "bytes": num_bytes,
        "architecture": "llama",
        "num_parameters": 1_000,
        "context_tokens": 64,
        "tensor_types": {"q4_k": 1},
        "fallbacks": 0,
        "source_digest": "0" * 64,
        "tokenizer_digest": "0" * 64,
        "settings": {},
        "fidelity": {**fidelity, "num_tokens": 64, "data": "probe"},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    write_lineage(
        directory,
        stage="build",
        directories={"model": model} if model else {},
        digests={},
        parameters={"format": "gguf:q4_k"},
        metrics={"kl": 0.01},
    )
    return directory


@dataclass(frozen=True)
class Chain:
    """A build and everything it came from, each in its own directory."""

    root: Path
    wheel: Path
    base_model: Path
    rounds: tuple[Path, ...]
    student: Path
    build: Path
    updates: dict[str, str]
    """sha256 of each site's update of each round, by "round/site"."""


def write_chain(root: Path, num_rounds: int = 3) -> Chain:
    """Write package, base model, rounds, student and build, each made from the one before."""
    wheel = root / "downloads" / "small_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"a package with a model in it")
    base_model = write_model(root / "base_model", seed=1)
    write_lineage(
        base_model,
        stage="fetch",
        directories={},
        digests={"pkg:pypi/small-model@1.0": hashlib.sha256(wheel.read_bytes()).hexdigest()},
        parameters={},
        metrics={},
    )
    rounds: list[Path] = []
    updates: dict[str, str] = {}
    for server_round in range(1, num_rounds + 1):
        adapter = root / "run" / f"round-{server_round}"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text('{"r": 8}')
        (adapter / "adapter_model.safetensors").write_bytes(noise(server_round, 99))
        own = {
            site: hashlib.sha256(f"{server_round}/{site}".encode()).hexdigest()
            for site in ("clinic", "bank")
        }
        updates |= {f"{server_round}/{site}": digest for site, digest in own.items()}
        write_lineage(
            adapter,
            stage="federate",
            directories={"base_model": base_model}
            | ({"previous_round": rounds[-1]} if rounds else {}),
            digests={f"update of site {site}": digest for site, digest in own.items()},
            parameters={"server_round": server_round},
            metrics={"train_loss": 1.0 / server_round},
        )
        rounds.append(adapter)
    student = write_model(root / "student", seed=2)
    write_lineage(
        student,
        stage="distill",
        directories={"teacher": base_model, "adapter": rounds[-1]},
        digests={},
        parameters={"student": "0.43x"},
        metrics={"kl": 0.4},
    )
    build = write_build(root / "builds" / "gguf-q4_k", seed=3, model=student)
    return Chain(root, wheel, base_model, tuple(rounds), student, build, updates)
