from dataclasses import replace
from pathlib import Path

import pytest

from distill.shapes import (
    Shape,
    StudentError,
    choose,
    count_parameters,
    distance,
    is_legal,
    legal_shapes,
    read_shape,
)
from distill.student import plan_student
from tests.conftest import write_tiny_model

SMOLLM2 = Shape("llama", 30, 576, 9, 3, 64, 1536, 49152, is_tied=True)
QWEN2_7B = Shape("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, is_tied=False)


def test_count_is_that_of_the_published_models() -> None:
    assert count_parameters(SMOLLM2) == 134_515_008
    assert count_parameters(QWEN2_7B) == 7_615_616_512


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_count_is_that_of_transformers(family: str, is_tied: bool) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    shape = Shape(family, 3, 64, 4, 2, 16, 96, 320, is_tied)
    dimensions = {
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 320,
        "tie_word_embeddings": is_tied,
    }
    with torch.device("meta"):
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**dimensions))
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**dimensions))
    assert count_parameters(shape) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("teacher", "budget"),
    [(SMOLLM2, 57_841_453), (SMOLLM2, 100_000_000), (QWEN2_7B, 3_000_000_000)],
)
def test_every_candidate_is_legal_smaller_and_fills_the_budget(teacher: Shape, budget: int) -> None:
    shapes = legal_shapes(teacher, budget)
    sizes = [count_parameters(shape) for shape in shapes]
    assert max(sizes) <= budget
    assert min(sizes) >= 0.97 * max(sizes)
    assert max(sizes) >= 0.99 * budget
    for shape in shapes:
        assert shape.hidden % shape.num_heads == 0
        assert shape.num_heads % shape.num_kv_heads == 0
        assert shape.head_dim == teacher.head_dim
        assert shape.num_layers >= 2
        for name in ("num_layers", "hidden", "num_heads", "num_kv_heads", "intermediate"):
            assert getattr(shape, name) <= getattr(teacher, name)
        if teacher.family == "qwen2":
            assert shape.hidden == shape.num_heads * shape.head_dim
            assert shape.hidden % 256 == 0
            assert shape.intermediate % 256 == 0


def test_the_shapes_named_dead_by_the_runtimes_are_not_legal() -> None:
    assert not is_legal(replace(SMOLLM2, hidden=384))  # transformers: 384 % 9
    assert not is_legal(replace(QWEN2_7B, hidden=3072))  # llama.cpp: 3072 != 28 * 128
    assert not is_legal(replace(SMOLLM2, intermediate=750))  # Q8_0: 750 % 32
    assert is_legal(replace(QWEN2_7B, hidden=3072, num_heads=24))


def test_choice_cuts_depth_and_width_together() -> None:
    best = choose(legal_shapes(QWEN2_7B, 3_000_000_000), lambda s: distance(QWEN2_7B, s))[0]
    assert best.num_layers < 28
    assert best.hidden < 3584
    assert best.intermediate < 18944


def test_choice_is_by_score_then_by_size() -> None:
    small, large = replace(SMOLLM2, num_layers=10), replace(SMOLLM2, num_layers=20)
    assert choose([small, large], lambda _: 0.0) == [large, small]
    assert choose([large, small], lambda shape: shape.num_layers) == [small, large]


def test_shape_is_read_from_headers_and_checked_against_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    assert read_shape(tiny_model) == Shape("llama", 2, 64, 4, 2, 16, 128, 384, is_tied=True)
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for name in ("config.json", "model.safetensors"):
        (wrong / name).write_bytes((tiny_model / name).read_bytes())
    config = (wrong / "config.json").read_text()
    (wrong / "config.json").write_text(
        config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(StudentError, match="its weights hold .* its config describes"):
        read_shape(wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.7x", 0.7), ("50k", 50_000), ("0.05m", 50_000), ("0.00005B", 50_000), ("50000", 50_000)],
)
def test_sizes_are_read_as_people_write_them(tiny_model: Path, text: str, expected: float) -> None:
    teacher = count_parameters(read_shape(tiny_model))
    budget = expected * teacher if expected < 1 else expected
    plan = plan_student(text, tiny_model)
    assert 0.8 * budget < count_parameters(plan.student) <= budget
    assert is_legal(plan.student)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3b", "not smaller than its teacher"),
        ("1x", "not a fraction of the teacher"),
        ("0x", "not a fraction of the teacher"),
        ("100", "the smallest has [0-9,]+ "),
        ("three", "neither a size nor a model directory"),
        ("3bb", "neither a size nor a model directory"),
    ],
)
def test_impossible_students_are_refused(tiny_model: Path, text: str, message: str) -> None:
    with pytest.raises(StudentError, match=message):
        plan_student(text, tiny_model)


def test_the_smallest_size_named_in_the_refusal_is_possible(tiny_model: Path) -> None:
    with pytest.raises(StudentError) as refusal:
        plan_student("100", tiny_model)
    smallest = str(refusal.value).split("the smallest has ")[1].split(" ")[0].replace(",", "")
    assert count_parameters(plan_student(smallest, tiny_model).student) == int(smallest)


def test_a_student_directory_must_speak_the_teachers_tokens(
    tiny_model: Path, tmp_path: Path
) -> None:
    student = write_tiny_model(tmp_path / "student", hidden=32)
    assert plan_student(str(student), tiny_model).directory == student
    tokenizer = student / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(StudentError, match="another tokenizer"):
        plan_student(str(student), tiny_model)


def test_a_student_directory_larger_than_the_teacher_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    larger = write_tiny_model(tmp_path / "larger", num_layers=3)
    with pytest.raises(StudentError, match="a student is smaller"):
        plan_student(str(larger), tiny_model)
