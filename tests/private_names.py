"""Names of flwr that are not public, held to what they were in the versions that were tested."""

import ast
import importlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TESTED = ("1.41.0",)
"""Versions of flwr with which the tests against a real SuperLink were run."""


def found(name: str) -> Any:
    """Return what a dotted name stands for."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return value
    raise AssertionError(name)


def parameters(name: str) -> list[str]:
    """Return the names of a function's parameters."""
    return list(inspect.signature(found(name)).parameters)


def fields(name: str) -> set[str]:
    """Return the names of a protobuf message's fields; ``name`` begins with its module."""
    return {field.name for field in found(f"flwr.proto.{name}").DESCRIPTOR.fields}


def unlisted(source: Path, listed: Iterable[str], public: Iterable[str]) -> list[str]:
    """Return the names of flwr that a file imports and that are neither listed nor public."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    imported = {
        f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        and str(node.module).startswith("flwr.")
        and node.module not in public
        for alias in node.names
    }
    known = tuple(listed)
    return sorted(name for name in imported if not any(n.startswith(name) for n in known))
