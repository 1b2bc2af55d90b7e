import math
from pathlib import Path

import pytest
import torch

from client.batches import Example, collate, encode_records
from client.evaluation import evaluate
from client.model import add_adapter, load_model, load_tokenizer
from client.records import read_records
from client.settings import TrainingSettings
from client.training import (
    Step,
    TrainingError,
    add_proximal_gradient,
    draw,
    learned_positions,
    response_cross_entropy,
    train,
)
from federation.adapter import initial_adapter, train_only
from tests.conftest import write_records

SETTINGS = TrainingSettings(
    num_steps=6,
    batch_size=2,
    learning_rate=1e-2,
    warmup_steps=2,
    schedule="cosine",
    max_tokens=64,
    dtype="float32",
)


@pytest.fixture
def examples(tiny_model: Path, tmp_path: Path) -> list[Example]:
    records = read_records(write_records(tmp_path / "data.jsonl", 24))
    return encode_records(records, load_tokenizer(tiny_model), 64)


def adapted(tiny_model: Path) -> torch.nn.Module:
    adapter = initial_adapter(tiny_model, rank=4, alpha=8.0, targets="all-linear", seed=0)
    return add_adapter(load_model(tiny_model, "float32"), adapter)


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_loss_is_that_of_transformers_itself(tiny_model: Path, examples: list[Example]) -> None:
    model = load_model(tiny_model, "float32")
    batch = collate(examples[:4], pad_id=0)
    expected = model(**batch).loss
    torch.testing.assert_close(response_cross_entropy(model, batch), expected)


def test_training_learns_and_touches_only_the_factors(
    tiny_model: Path, examples: list[Example]
) -> None:
    model = adapted(tiny_model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = evaluate(model, examples, pad_id=0)
    settings = SETTINGS.model_copy(update={"num_steps": 30, "batch_size": 4})
    steps = train(model, draw(examples, 120, seed=0), settings, pad_id=0)
    after = evaluate(model, examples, pad_id=0)
    assert after.loss < before.loss - 0.5
    assert [step.step for step in steps] == list(range(1, 31))
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
        else:
            assert "lora_" in name


def test_accumulation_gives_the_step_of_one_large_batch(
    tiny_model: Path, examples: list[Example]
) -> None:
    """Responses of different lengths: the mean must be over tokens, not over forward passes."""
    rows = [Example(e.input_ids[: 30 + 4 * (i % 3)], e.num_prompt) for i, e in enumerate(examples)]
    results = []
    for batch_size, accumulation in ((6, 1), (2, 3)):
        model = adapted(tiny_model)
        settings = SETTINGS.model_copy(
            update={
                "num_steps": 1,
                "batch_size": batch_size,
                "accumulation": accumulation,
                "warmup_steps": 0,
                "max_grad_norm": 1e9,
            }
        )
        (step,) = train(model, rows[:6], settings, pad_id=0)
        results.append((step, trained(model)))
    (large, large_weights), (small, small_weights) = results
    assert small.num_tokens == large.num_tokens
    assert small.loss == pytest.approx(large.loss, rel=1e-5)
    assert small.grad_norm == pytest.approx(large.grad_norm, rel=1e-4)
    for name, weight in large_weights.items():
        torch.testing.assert_close(small_weights[name], weight, rtol=1e-3, atol=1e-5)


def test_a_killed_run_resumes_to_the_same_bits(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"checkpoint_every": 2})
    rows = draw(examples, 12, seed=0)
    whole = adapted(tiny_model)
    expected = train(whole, rows, settings, pad_id=0)

    class Killed(BaseException):
        """Stands for a signal: no handler of ours or of the Trainer may swallow it."""

    def kill(step: Step) -> None:
        if step.step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(adapted(tiny_model), rows, settings, pad_id=0, checkpoints=tmp_path, on_step=kill)
    resumed = adapted(tiny_model)
    steps = train(resumed, rows, settings, pad_id=0, checkpoints=tmp_path)
    assert [step.step for step in steps] == [5, 6]
    assert [step.loss for step in steps] == [step.loss for step in expected[4:]]
    for name, weight in trained(whole).items():
        assert torch.equal(trained(resumed)[name], weight), name


def test_draw_shows_every_item_once_an_epoch_and_goes_on_where_it_stopped() -> None:
    items = list(range(10))
    whole = draw(items, 25, seed=3)
    assert sorted(whole[:10]) == items
    assert sorted(whole[10:20]) == items
    assert whole[:10] != whole[10:20]
    pieces = [draw(items, 5, seed=3, start=start) for start in range(0, 25, 5)]
    assert [item for piece in pieces for item in piece] == whole
    assert draw(items, 10, seed=4) != whole[:10]


def test_evaluation_is_the_mean_over_tokens_whatever_the_batches(
    tiny_model: Path, examples: list[Example]
) -> None:
    model = load_model(tiny_model, "float32")
    rows = [Example(e.input_ids[: 30 + 5 * (i % 4)], e.num_prompt) for i, e in enumerate(examples)]
    total, correct, count = 0.0, 0, 0
    with torch.inference_mode():
        for row in rows:
            log_probs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            for position in range(row.num_prompt, len(row.input_ids)):
                target = row.input_ids[position]
                total -= float(log_probs[position - 1, target])
                correct += int(log_probs[position - 1].argmax()) == target
                count += 1
    for batch_size in (1, 5, 24):
        result = evaluate(model, rows, pad_id=0, batch_size=batch_size)
        assert result.num_tokens == count
        assert result.loss == pytest.approx(total / count, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
        assert result.token_accuracy == correct / count


def test_a_loss_that_is_not_finite_ends_the_training(
    tiny_model: Path, examples: list[Example]
) -> None:
    def broken(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return response_cross_entropy(model, batch) * float("nan")

    with pytest.raises(TrainingError, match="the loss of step 1 is nan"):
        train(adapted(tiny_model), examples[:12], SETTINGS, pad_id=0, loss_function=broken)


def test_a_callers_autocast_holds_over_a_float32_model(
    tiny_model: Path, examples: list[Example]
) -> None:
    model, seen = load_model(tiny_model, "float32"), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.dtype)
    )
    batch = collate(examples[:2], pad_id=0)
    learned_positions(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        learned_positions(model, batch)
    assert seen == [torch.float32, torch.bfloat16]


def test_recomputed_activations_give_the_same_gradients(
    tiny_model: Path, examples: list[Example]
) -> None:
    results = []
    for recomputed in (False, True):
        model = adapted(tiny_model)
        settings = SETTINGS.model_copy(update={"gradient_checkpointing": recomputed})
        (*_, last) = train(model, examples[:12], settings, pad_id=0)
        results.append((last.loss, trained(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, weight in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], weight)


def test_the_proximal_gradient_is_that_of_half_mu_times_the_squared_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 4, generator=generator).double().requires_grad_() for _ in range(2)]
    start = [torch.randn(3, 4, generator=generator).double() for _ in range(2)]
    mu = 0.37

    def data_loss() -> torch.Tensor:
        return sum((weight**3).sum() for weight in weights)

    distance = sum(((w - s) ** 2).sum() for w, s in zip(weights, start, strict=True))
    expected = torch.autograd.grad(data_loss() + mu / 2 * distance, weights)
    data_loss().backward()
    add_proximal_gradient(list(zip(weights, start, strict=True)), mu)
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


def test_a_proximal_term_holds_a_site_at_the_start_and_its_loss_is_the_datas(
    tiny_model: Path, examples: list[Example]
) -> None:
    results = {}
    for mu in (0.0, 1e-4, 1e4):
        model = adapted(tiny_model)
        start = trained(model)
        settings = SETTINGS.model_copy(
            update={"proximal_mu": mu, "accumulation": 2, "warmup_steps": 0, "schedule": "constant"}
        )
        steps = train(model, draw(examples, 24, seed=0), settings, pad_id=0)
        moved = sum(float(((w - start[n]) ** 2).sum()) for n, w in trained(model).items()) ** 0.5
        results[mu] = (steps, moved)
    assert results[1e4][1] < 0.5 * results[0.0][1]
    assert results[1e-4][1] == pytest.approx(results[0.0][1], rel=0.05)
    first = [steps[0] for steps, _ in results.values()]
    assert len({step.loss for step in first}) == 1, "at the start the term is 0"
    losses = [step.loss for step in results[1e4][0]]
    assert max(losses) < 2 * losses[0], "with the term in it the loss would be in the hundreds"
    assert results[1e4][0][-1].grad_norm > 10 * results[0.0][0][-1].grad_norm


def test_an_accumulated_step_pulls_to_the_start_once(
    tiny_model: Path, examples: list[Example]
) -> None:
    """Two forward passes a step, or one of twice the size: the same pull."""
    results = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        model = adapted(tiny_model)
        settings = SETTINGS.model_copy(
            update={
                "num_steps": 3,
                "batch_size": batch_size,
                "accumulation": accumulation,
                "proximal_mu": 3.0,
                "max_grad_norm": 1e9,
            }
        )
        steps = train(model, examples[:12], settings, pad_id=0)
        results.append(([step.grad_norm for step in steps], trained(model)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-3)


@pytest.mark.parametrize("factors", ["A", "B"])
def test_a_frozen_factor_has_no_gradient_and_no_optimizer_state(
    tiny_model: Path, examples: list[Example], tmp_path: Path, factors: str
) -> None:
    model = adapted(tiny_model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # with B = 0 a gradient of A would be 0 anyway
                parameter.add_(0.01)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_only(model, factors)
    settings = SETTINGS.model_copy(update={"checkpoint_every": 6, "weight_decay": 0.1})
    train(model, examples[:12], settings, pad_id=0, checkpoints=tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (f"lora_{factors}" not in name), name
    state = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert len(state["state"]) == 2 * 7
    train_only(model, "AB")
    assert len(trained(model)) == 2 * 2 * 7
