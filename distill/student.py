"""What `--student` means: a number of parameters, a share of the teacher, or a model directory.

A size is answered by a pruned teacher, whose shape is chosen here from configs and file headers
alone. A directory is taken as it is, if it speaks the teacher's tokens.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.model import same_tokens
from distill.shapes import (
    Shape,
    StudentError,
    choose,
    count_parameters,
    distance,
    legal_shapes,
    read_shape,
)

SIZE = re.compile(r"(?P<number>\d+(\.\d+)?|\.\d+)(?P<unit>[xkmb]?)", re.IGNORECASE)
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
NUM_RUNNERS_UP = 4


@dataclass(frozen=True)
class Plan:
    """The student that will be made, and why."""

    teacher: Shape
    student: Shape
    directory: Path | None
    """Where the student's weights come from; None: the teacher, pruned."""
    why: str
    runners_up: tuple[Shape, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "teacher": describe(self.teacher),
            "student": describe(self.student),
            "why": self.why,
            "runners_up": [describe(shape) for shape in self.runners_up],
        }


def describe(shape: Shape) -> dict[str, Any]:
    """Return a shape and its number of parameters as JSON values."""
    return {"params": count_parameters(shape), **asdict(shape)}


def plan_student(text: str, teacher_directory: Path) -> Plan:
    """Decide what the student will be. Reads configs, file headers and tokenizers, no weights.

    Args:
        text: `3b`, `57.6m`, `0.43x` (of the teacher's parameters, at most), or a directory. A
            directory that is named like a size is reached by `./3b`.
        teacher_directory: Hugging Face layout.

    Raises:
        ModelError: The teacher is missing or incomplete.
        StudentError: There is no such student of this teacher.
    """
    teacher = read_shape(teacher_directory)
    if match := SIZE.fullmatch(text.strip()):
        return _pruned(teacher, _budget(match, text, teacher))
    directory = Path(text)
    if not directory.is_dir():
        raise StudentError(
            f"--student {text!r} is neither a size nor a model directory: expected a number of "
            "parameters (3b, 57.6m), a fraction of the teacher (0.43x) or a directory"
        )
    return _given(teacher, teacher_directory, directory)


def _budget(match: re.Match[str], text: str, teacher: Shape) -> int:
    number, unit = float(match["number"]), match["unit"].lower()
    size = count_parameters(teacher)
    if unit == "x":
        if not 0 < number < 1:
            raise StudentError(
                f"--student {text} is not a fraction of the teacher: expected more than 0x and "
                "less than 1x"
            )
        return int(number * size)
    return int(number * UNITS[unit])


def _pruned(teacher: Shape, budget: int) -> Plan:
    candidates = legal_shapes(teacher, budget)
    best, *others = choose(candidates, lambda shape: distance(teacher, shape))
    kept = (
        (best.num_layers, teacher.num_layers, "layers"),
        (best.hidden, teacher.hidden, "hidden channels"),
        (best.num_heads, teacher.num_heads, "heads"),
        (best.intermediate, teacher.intermediate, "MLP channels"),
    )
    parts = [f"{of_student} of {of_teacher} {name}" for of_student, of_teacher, name in kept]
    why = (
        f"keeps {', '.join(parts[:-1])} and {parts[-1]}: {count_parameters(best):,} parameters of "
        f"at most {budget:,}. Legal shapes that fill the budget (transformers, llama.cpp, GGUF "
        f"blocks): {len(candidates)}; this one has the most even cut, each kind by its weight."
    )
    return Plan(teacher, best, None, why, tuple(others[:NUM_RUNNERS_UP]))


def _given(teacher: Shape, teacher_directory: Path, directory: Path) -> Plan:
    student = read_shape(directory)
    size, limit = count_parameters(student), count_parameters(teacher)
    if size >= limit:
        raise StudentError(
            f"{directory} has {size:,} parameters, its teacher {limit:,}: a student is smaller"
        )
    for model in (teacher_directory, directory):
        if not (model / "tokenizer.json").is_file():
            raise StudentError(f"{model}: tokenizer.json is missing: copy the model's into it")
    if not same_tokens(teacher_directory, directory):
        raise StudentError(
            f"{directory} has another tokenizer than {teacher_directory}: choose a student with "
            "the teacher's tokens, or give a size to prune the teacher"
        )
    if student.vocab != teacher.vocab:
        raise StudentError(
            f"{directory} embeds {student.vocab} ids, {teacher_directory} {teacher.vocab}: resize "
            "the student's embeddings to the teacher's number"
        )
    why = (
        f"is the model of {directory.name} as it is: {size:,} parameters, the teacher's tokenizer."
    )
    return Plan(teacher, student, directory, why)
