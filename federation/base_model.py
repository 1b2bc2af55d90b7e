"""What the server needs to know of a base model, without loading it: digest, config, shapes.

A safetensors file begins with the shapes of everything in it, so the adapter of a 7B model is laid
out from a few kilobytes. Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from federation.errors import UserError
from federation.lineage import sha256_of_file

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What turns text into token ids."""


class ModelError(UserError):
    """A model directory is missing, incomplete, or does not fit what it is used with."""


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json of a model directory.

    Raises:
        ModelError: The directory or its config is missing or not JSON.
    """
    if not directory.is_dir():
        raise ModelError(
            f"{directory} does not exist: pass a model directory (Hugging Face layout)"
        )
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{path} is missing: {directory} is not a model directory")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON ({error}): fetch the model again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object: fetch the model again")
    return config


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model directory, sorted by name.

    Raises:
        ModelError: There is none.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory} holds no *.safetensors: convert the weights to safetensors")
    return files


def weight_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model, by name, from the file headers alone.

    Raises:
        ModelError: A file is too short for its own header.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(directory):
        with path.open("rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, 100_000_000)))
            except (struct.error, json.JSONDecodeError, UnicodeDecodeError):
                raise ModelError(f"{path} is cut off or damaged: fetch the model again") from None
        header.pop("__metadata__", None)
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
    return shapes


def model_digest(directory: Path) -> str:
    """Return one sha256 over config, weights, tokenizer and chat template.

    Two sites with equal digests turn the same text into the same numbers. It is the digest of the
    lines `sha256  name`, as sha256sum would print them, for those files that there are, sorted by
    kind and name. Costs one read of the weights (about 2 GB/s).
    """
    read_config(directory)
    text = [path for name in TEXT_FILES if (path := directory / name).is_file()]
    files = [directory / "config.json", *weight_files(directory), *text]
    lines = "".join(f"{sha256_of_file(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()
