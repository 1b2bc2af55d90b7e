import warnings
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from client.batches import collate
from client.model import load_model
from distill.calibration import Importance, measure_importance
from distill.pruning import choose_cuts, prune
from distill.shapes import Shape, count_parameters, legal_shapes, read_shape
from tests.conftest import write_tiny_model
from tests.distill.models import examples_of


@pytest.fixture(scope="module")
def teacher_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("teacher") / "model", num_layers=4)


@pytest.fixture
def importance(teacher_directory: Path, tmp_path: Path) -> Importance:
    examples = examples_of(teacher_directory, tmp_path, 8)
    return measure_importance(load_model(teacher_directory, "float32"), examples, pad_id=0)


def test_scores_are_those_of_the_definition(
    teacher_directory: Path, tmp_path: Path, importance: Importance
) -> None:
    model = load_model(teacher_directory, "float32")
    states, inputs = [], []
    for example in examples_of(teacher_directory, tmp_path, 8):
        # One record at a time: no padding, and another way to the same numbers.
        batch = collate([example], pad_id=0)
        seen: list[torch.Tensor] = []
        hook = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            output = model(input_ids=batch["input_ids"], output_hidden_states=True)
        hook.remove()
        states.append([state[0] for state in output.hidden_states])
        inputs.append(seen[0][0])
    before, after = (torch.cat([record[index] for record in states]) for index in (1, 2))
    influence = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
    assert importance.layers_L[1].item() == pytest.approx(influence.item(), rel=1e-3)
    column = model.model.layers[2].mlp.down_proj.weight.norm(dim=0)
    expected = torch.cat(inputs).square().mean(0).sqrt() * column
    torch.testing.assert_close(importance.mlp_LF[2], expected.detach(), rtol=1e-3, atol=1e-6)


def test_measuring_changes_nothing(teacher_directory: Path, tmp_path: Path) -> None:
    model = load_model(teacher_directory, "float32")
    examples = examples_of(teacher_directory, tmp_path, 4)
    batch = collate(examples, pad_id=0)
    with torch.no_grad():
        before = model(**batch).logits
        measure_importance(model, examples, pad_id=0)
        after = model(**batch).logits
    assert torch.equal(before, after)


def test_a_student_of_the_teachers_shape_is_the_teacher(
    teacher_directory: Path, importance: Importance
) -> None:
    teacher = load_model(teacher_directory, "float32")
    student = prune(teacher, read_shape(teacher_directory), importance)
    assert student.config._attn_implementation == teacher.config._attn_implementation
    for (name, one), other in zip(
        teacher.state_dict().items(), student.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_every_legal_shape_becomes_a_model_of_that_size(
    teacher_directory: Path, importance: Importance
) -> None:
    teacher = load_model(teacher_directory, "float32")
    shape = read_shape(teacher_directory)
    candidates = legal_shapes(shape, count_parameters(shape) // 2)
    for candidate in candidates[::5]:
        student = prune(teacher, candidate, importance)
        assert sum(p.numel() for p in student.parameters()) == count_parameters(candidate)
        logits = student(input_ids=torch.tensor([[1, 2, 3]])).logits
        assert torch.isfinite(logits).all()


def test_first_and_last_layers_stay_and_heads_keep_their_groups() -> None:
    shape = Shape("llama", 2, 64, 2, 1, 16, 32, 100, is_tied=True)
    importance = Importance(
        layers_L=torch.tensor([0.0, 0.9, 0.8, 0.0]),
        hidden_D=torch.arange(64.0),
        heads_LGQ=torch.tensor([[[1.0, 5.0, 2.0], [4.0, 3.0, 4.5]]]).expand(4, 2, 3),
        mlp_LF=torch.arange(64.0).expand(4, 64),
    )
    cuts = choose_cuts(shape, importance)
    assert [cut.layer for cut in cuts] == [0, 3]
    # Group 0 offers 5 + 2, group 1 offers 4.5 + 4: its heads are 3 (4.0) and 5 (4.5).
    assert cuts[0].kv_heads == [1]
    assert cuts[0].heads == [3, 5]
    assert cuts[0].mlp.tolist() == list(range(32, 64))


def test_unused_parts_are_what_is_cut(teacher_directory: Path, tmp_path: Path) -> None:
    """Silence some heads and MLP channels: cutting just those leaves the logits as they were."""
    teacher = load_model(teacher_directory, "float32")
    examples = examples_of(teacher_directory, tmp_path, 8)
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.mlp.down_proj.weight[:, 32:96] = 0
            layer.self_attn.v_proj.weight[16:] = 0  # key/value group 1, query heads 2 and 3
    importance = measure_importance(teacher, examples, pad_id=0)
    shape = Shape("llama", 4, 64, 2, 1, 16, 64, 384, is_tied=True)
    student = prune(teacher, shape, importance)
    batch = collate(examples, pad_id=0)
    with torch.no_grad():
        torch.testing.assert_close(
            student(**batch).logits, teacher(**batch).logits, rtol=1e-4, atol=1e-5
        )


def test_qwen2_biases_and_untied_heads_are_cut_with_their_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    teacher = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.self_attn.q_proj.bias.copy_(torch.arange(64.0))
    teacher.save_pretrained(tmp_path / "qwen")
    shape = read_shape(tmp_path / "qwen")
    importance = Importance(
        layers_L=torch.ones(3),
        hidden_D=torch.arange(64.0),
        heads_LGQ=torch.tensor([[[1.0, 2.0], [4.0, 3.0]]]).expand(3, 2, 2),
        mlp_LF=torch.arange(96.0).expand(3, 96),
    )
    small = Shape("qwen2", 2, 32, 2, 2, 16, 64, 320, is_tied=False)
    assert shape.has_bias
    student = prune(teacher, small, importance)
    kept = [*range(16, 32), *range(32, 48)]
    assert student.model.layers[0].self_attn.q_proj.bias.tolist() == kept
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight[:, 32:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student.save_pretrained(tmp_path / "student")
    assert read_shape(tmp_path / "student") == small
