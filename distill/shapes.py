"""The shape of a decoder, what it weighs, and which smaller shapes would be legal students of it.

A student has to load where it will be used, so a shape is legal only if transformers, llama.cpp and
the block formats of GGUF accept it; a search that ignores one of them makes dead models.
No weights are read here: a config.json and the headers of the safetensors files are enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from federation.base_model import read_config, weight_shapes
from federation.errors import UserError

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
FILLED = 0.97
"""A candidate uses at least this share of what the best-filling one does."""


class StudentError(UserError):
    """No student of that size, shape or tokenizer can be made from this teacher."""


@dataclass(frozen=True)
class Shape:
    """Everything that decides how many parameters a Llama- or Qwen2-family decoder has."""

    family: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    is_tied: bool
    """Input embedding and output head are one matrix."""

    @property
    def has_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return self.family == "qwen2"

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers, hidden {self.hidden}, "
            f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}, "
            f"MLP {self.intermediate}"
        )


def count_parameters(shape: Shape) -> int:
    """Return the exact number of parameters (a tied head is counted once)."""
    q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = 2 * shape.hidden * (q_width + kv_width)
    bias = q_width + 2 * kv_width if shape.has_bias else 0
    mlp = 3 * shape.hidden * shape.intermediate
    norms = 2 * shape.hidden
    embeddings = shape.vocab * shape.hidden * (1 if shape.is_tied else 2)
    return shape.num_layers * (attention + bias + mlp + norms) + embeddings + shape.hidden


def read_shape(directory: Path) -> Shape:
    """Return the shape that a config states, checked against the headers of the weights.

    Raises:
        ModelError: The directory, its config or its weights are missing or damaged.
        StudentError: The family is not supported, or config and weights disagree.
    """
    config = read_config(directory)
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise StudentError(
            f"{directory}: architecture {architecture} cannot be distilled; expected one of "
            f"{', '.join(FAMILIES)}"
        )
    for switch in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(switch):
            raise StudentError(
                f"{directory}/config.json: {switch} is on, which llama.cpp does not run for this "
                "architecture: choose a teacher without it"
            )
    shape = _shape_of(config, FAMILIES[architecture], directory)
    stored = sum(
        math.prod(dimensions)
        for name, dimensions in weight_shapes(directory).items()
        if name.endswith((".weight", ".bias")) and not (shape.is_tied and name == "lm_head.weight")
    )
    if stored != count_parameters(shape):
        raise StudentError(
            f"{directory}: its weights hold {stored:,} parameters, its config describes "
            f"{count_parameters(shape):,}: pass a complete model that is not quantised"
        )
    return shape


def _shape_of(config: dict[str, Any], family: str, directory: Path) -> Shape:
    try:
        num_heads = int(config["num_attention_heads"])
        # Absent keys take the defaults of transformers' LlamaConfig and Qwen2Config.
        kv_default = num_heads if family == "llama" else 32
        return Shape(
            family=family,
            num_layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or kv_default),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // num_heads),
            intermediate=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            is_tied=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise StudentError(
            f"{directory}/config.json: {error} is missing: write the config with save_pretrained"
        ) from None


def is_legal(shape: Shape) -> bool:
    """Tell whether transformers, llama.cpp and GGUF's block formats accept a shape.

    - transformers 5.23 refuses hidden % num_heads != 0 even where head_dim is given;
    - llama.cpp's qwen2 loader builds attn_q and attn_output as hidden x hidden;
    - Q8_0 and Q4_0 rows come in blocks of 32.
    """
    q_width = shape.num_heads * shape.head_dim
    return (
        shape.hidden % shape.num_heads == 0
        and shape.num_heads % shape.num_kv_heads == 0
        and (shape.family != "qwen2" or shape.hidden == q_width)
        and all(row % 32 == 0 for row in (shape.hidden, q_width, shape.intermediate))
    )


def legal_shapes(teacher: Shape, budget: int) -> list[Shape]:
    """Return the legal students within a budget, each filled up with MLP channels.

    Of every combination of depth, hidden width and heads the largest MLP that fits is taken, and
    the combinations that leave more than 3 % of the best-filling one unused are dropped.

    Args:
        teacher: What is cut. No dimension of a student is larger.
        budget: Most parameters.

    Raises:
        StudentError: The budget is as large as the teacher, or below the smallest legal shape.
    """
    size = count_parameters(teacher)
    if budget >= size:
        raise StudentError(
            f"a student of {budget:,} parameters is not smaller than its teacher ({size:,}): "
            "ask for less with --student"
        )
    frames = _frames(teacher)
    filled = [shape for frame in frames if (shape := _fill(frame, teacher, budget))]
    if not filled:
        smallest = min(_frames(teacher), key=count_parameters)
        raise StudentError(
            f"no legal student of this teacher has {budget:,} parameters or less: the smallest "
            f"has {count_parameters(smallest):,} ({smallest})"
        )
    floor = FILLED * max(map(count_parameters, filled))
    return [shape for shape in filled if count_parameters(shape) >= floor]


def distance(teacher: Shape, student: Shape) -> float:
    """Return how much harm a cut is expected to do before any training: lower is better.

    A weighted sum of squared log keep ratios. The square makes several small cuts cheaper than one
    deep cut, which is what is measured (`docs/decisions/0005-student-shapes.md`). The hidden width
    weighs most because every layer reads and writes it; MLP channels are the most redundant.
    """
    ratios = (
        (1.0, student.num_layers / teacher.num_layers),
        (2.0, student.hidden / teacher.hidden),
        (0.5, student.num_heads / teacher.num_heads),
        (0.25, student.num_kv_heads / teacher.num_kv_heads),
        (0.25, student.intermediate / teacher.intermediate),
    )
    return sum(weight * math.log(ratio) ** 2 for weight, ratio in ratios)


def choose(candidates: Sequence[Shape], score: Callable[[Shape], float]) -> list[Shape]:
    """Return the candidates best first: lowest score, then most parameters."""
    return sorted(candidates, key=lambda shape: (score(shape), -count_parameters(shape)))


def _frames(teacher: Shape) -> Iterator[Shape]:
    """Yield every legal combination of depth, hidden width and heads, with the smallest MLP."""
    step = _step(teacher.intermediate)
    # The first and the last layer do most of the work (block influence .98 and .35 in SmolLM2).
    for num_layers in range(min(2, teacher.num_layers), teacher.num_layers + 1):
        for hidden in _widths(teacher.hidden):
            for num_kv_heads in range(1, teacher.num_kv_heads + 1):
                for group in range(1, teacher.group + 1):
                    shape = replace(
                        teacher,
                        num_layers=num_layers,
                        hidden=hidden,
                        num_heads=num_kv_heads * group,
                        num_kv_heads=num_kv_heads,
                        intermediate=min(step, teacher.intermediate),
                    )
                    if is_legal(shape):
                        yield shape


def _fill(frame: Shape, teacher: Shape, budget: int) -> Shape | None:
    """Give a frame the largest MLP that the budget and the teacher allow."""
    room = budget - count_parameters(frame)
    if room < 0:
        return None
    step = frame.intermediate
    more = room // (3 * frame.hidden * frame.num_layers * step)
    return replace(frame, intermediate=min(step * (1 + more), teacher.intermediate))


def _widths(size: int) -> list[int]:
    step = _step(size)
    return sorted({*range(step, size, step), size})


def _step(size: int) -> int:
    """Return 256 (a K-quant block) where that leaves eight choices, else 32 (Q8_0, Q4_0)."""
    return 256 if size >= 8 * 256 else 32
