"""ONNX builds, by the builder that comes with onnxruntime-genai.

The builder runs in a process of its own: it loads the whole model (plan for its size in float32),
changes import paths, prints freely, and its peak memory is given back when it ends.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge.child_process import run_child
from edge.errors import EdgeError

PRECISIONS = ("fp32", "int4")
MODEL_FILE = "model.onnx"

_BLOCK_SIZE = 32
"""Weights that share a scale: the builder's default."""
_BLOCK_QUANTIZED = ("MatMulNBits", "GatherBlockQuantized")


class OnnxBuilderError(EdgeError):
    """onnxruntime-genai's builder did not make a model."""


def build_onnx(model: Path, precision: str, out: Path) -> dict[str, int]:
    """Write an onnxruntime-genai model directory and return how many tensors of each type it has.

    ``int4`` is `k_quant_mixed`: 4-bit blocks with the sensitive matrices in 8 bits (less divergence
    than the builder's default: docs/decisions/0004-gguf-written-by-us.md has the figures), or
    `rtn_last` where the shapes forbid that: see ``int4_algorithm``.

    Args:
        model: A model directory whose tokenizer and weights transformers can load.
        precision: Of ``PRECISIONS``.
        out: A directory that exists and is empty.

    Raises:
        OnnxBuilderError: The builder failed; the message holds its last line.
    """
    with tempfile.TemporaryDirectory(prefix="fedge-onnx-") as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(model), "-o", str(out), "-p", precision, "-e", "cpu", "-c", cache]
        if precision == "int4":
            algorithm = int4_algorithm(json.loads((model / "config.json").read_text()))
            command += ["--extra_options", f"algo_config={algorithm}"]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": cache}
        done = run_child(
            command,
            env={**os.environ, **offline},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    if done.returncode or not (out / MODEL_FILE).is_file():
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        raise OnnxBuilderError(
            f"onnxruntime-genai's builder could not make onnx:{precision} of {model} (exit code "
            f"{done.returncode}): {lines[-1] if lines else 'it said nothing'}"
        )
    return _tensor_types(out / MODEL_FILE)


def int4_algorithm(config: Mapping[str, Any]) -> str:
    """Return the builder's algorithm for a model's shapes.

    The zero points of k-quants are packed two to a byte; onnxruntime-genai 0.18 leaves out the
    padding of a row with an odd number of blocks and fails ("cannot reshape array"). Rounding to
    nearest has no zero points.
    """
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rows = (config["hidden_size"], config["intermediate_size"], heads * head_dim)
    is_odd = any(-(-row // _BLOCK_SIZE) % 2 for row in rows)
    return "rtn_last" if is_odd else "k_quant_mixed"


def _tensor_types(path: Path) -> dict[str, int]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    types: Counter[str] = Counter()
    parts: set[str] = set()
    for node in graph.node:
        if node.op_type in _BLOCK_QUANTIZED:
            bits = next(item.i for item in node.attribute if item.name == "bits")
            types[f"int{bits}"] += 1
            # Its scales and zero points are parts of it, not tensors of their own.
            parts.update(node.input)
    for tensor in graph.initializer:
        if tensor.name not in parts and len(tensor.dims):
            types[onnx.TensorProto.DataType.Name(tensor.data_type).lower()] += 1
    return dict(types)
