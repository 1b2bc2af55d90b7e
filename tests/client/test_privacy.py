import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from client.batches import Example, collate, encode_records
from client.evaluation import evaluate
from client.model import add_adapter, load_model, load_tokenizer
from client.privacy import (
    _private_gradient,
    noised_mean,
    privacy_event,
    record_losses,
    train_privately,
    train_records,
)
from client.randomness import RandomStream
from client.record_gradients import PrivacyError, clipped_sum, record_gradients
from client.records import read_records
from client.settings import LEAST_CLIP_NORM, TrainingSettings
from client.training import Step, draw, train
from federation.accountant import PrivacyEvent
from federation.adapter import initial_adapter, train_only
from federation.settings import SettingsError, load_settings
from tests.conftest import write_records

KEY = b"0123456789abcdef" * 2
SETTINGS = TrainingSettings(
    num_steps=4,
    batch_size=4,
    learning_rate=1e-2,
    max_tokens=64,
    dtype="float32",
    noise_multiplier=1.0,
)


@pytest.fixture
def examples(tiny_model: Path, tmp_path: Path) -> list[Example]:
    """Records of different lengths, so that a batch of them is padded."""
    records = read_records(write_records(tmp_path / "data.jsonl", 24))
    encoded = encode_records(records, load_tokenizer(tiny_model), 64)
    return [Example(e.input_ids[: 28 + 3 * (i % 5)], e.num_prompt) for i, e in enumerate(encoded)]


def adapted(tiny_model: Path, factors: str = "B", dtype: str = "float32") -> torch.nn.Module:
    adapter = initial_adapter(tiny_model, rank=4, alpha=8.0, targets="all-linear", seed=0)
    model = add_adapter(load_model(tiny_model, dtype), adapter)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # with B = 0 every gradient of A would be 0
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    train_only(model, factors)
    return model


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def settings(**changes: object) -> TrainingSettings:
    return TrainingSettings.model_validate(SETTINGS.model_dump() | changes)


def gradients_of(model: torch.nn.Module, rows: Sequence[Example]) -> list[torch.Tensor]:
    with record_gradients(model) as gradients:
        losses_B, tokens_B = record_losses(model, collate(rows, pad_id=0))
        (losses_B / tokens_B).sum().backward()
        assert all(p.grad is None for p in model.parameters())
        return gradients.take()


def one_by_one(model: torch.nn.Module, rows: Sequence[Example]) -> list[torch.Tensor]:
    """The oracle: each record alone, in float64, through the model as it is."""
    model = model.double()
    weights = [p for p in model.parameters() if p.requires_grad]
    each = []
    for row in rows:
        logits_TV = model(torch.tensor([row.input_ids])).logits[0]
        targets = torch.tensor(row.input_ids[row.num_prompt :])
        log_probs = logits_TV[row.num_prompt - 1 : -1].log_softmax(-1)
        loss = -log_probs[torch.arange(len(targets)), targets].mean()
        each.append(torch.autograd.grad(loss, weights))
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_each_record_has_the_gradient_that_it_has_alone(
    tiny_model: Path, examples: list[Example], factors: str, recomputed: bool
) -> None:
    model = adapted(tiny_model, factors)
    if recomputed:
        model.activation_checkpointing_enable()
        model.train()
    found = gradients_of(model, examples[:5])
    expected = one_by_one(adapted(tiny_model, factors), examples[:5])
    assert len(found) == len(expected) == 2 * 7 * len(factors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("factors", "recomputed"), [("A", False), ("B", False), ("B", True)])
def test_over_a_bfloat16_base_they_are_as_near_as_bfloat16_is(
    tiny_model: Path, examples: list[Example], factors: str, recomputed: bool
) -> None:
    model = adapted(tiny_model, factors, "bfloat16")
    if recomputed:
        model.activation_checkpointing_enable()
        model.train()
    found = gradients_of(model, examples[:5])
    expected = one_by_one(adapted(tiny_model, factors, "bfloat16"), examples[:5])
    for record in range(5):
        one = torch.cat([g[record].flatten() for g in found]).double()
        other = torch.cat([g[record].flatten() for g in expected])
        assert one.dtype == torch.float64
        assert float((one - other).norm() / other.norm()) < 0.03
    assert all(g.dtype == torch.float32 for g in found)


def test_clipping_shortens_each_record_as_a_whole_and_to_the_bound() -> None:
    generator = np.random.default_rng(0)
    sizes = np.array([1e-3, 0.1, 1.0, 10.0, 1e4, 0.0])[:, None, None]
    arrays = [sizes * generator.normal(size=(6, *shape)) for shape in ((3, 4), (5, 2))]
    bound = 0.7
    norms = np.sqrt(sum((array**2).sum(axis=(1, 2)) for array in arrays))
    scale = np.minimum(1, bound / np.maximum(norms, 1e-30))
    tensors = [torch.from_numpy(array).float() for array in arrays]
    sums, found_norms = clipped_sum([t.clone() for t in tensors], bound)
    np.testing.assert_allclose(found_norms, norms, rtol=1e-5)
    for found, array in zip(sums, arrays, strict=True):
        np.testing.assert_allclose(found, (array * scale[:, None, None]).sum(axis=0), rtol=1e-4)
    for record in range(6):
        alone, _ = clipped_sum([t[record : record + 1].clone() for t in tensors], bound)
        length = math.sqrt(sum(float((part.double() ** 2).sum()) for part in alone))
        assert length <= bound * (1 + 1e-6)
        assert length == pytest.approx(min(bound, norms[record]), rel=1e-5)


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-25, 1e-20, 1e-3, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("share", [1e-7, 0.5, 2.0])
def test_a_record_is_cut_to_the_bound_whatever_its_numbers_are(size: float, share: float) -> None:
    """Squares of numbers below 1e-23 or above 1e19 are no float32: 0, or infinite."""
    generator = np.random.default_rng(5)
    arrays = [(size * generator.normal(size=(4, 30, 20))).astype(np.float32) for _ in range(3)]
    exact = [array.astype(np.float64) for array in arrays]  # what float32 left of them
    norms = np.sqrt(sum((array**2).sum(axis=(1, 2)) for array in exact))
    bound = share * float(norms.max())
    scale = np.minimum(1, bound / norms)
    sums, found = clipped_sum([torch.from_numpy(array) for array in arrays], bound)
    np.testing.assert_allclose(found, norms, rtol=1e-12)
    for part, array in zip(sums, exact, strict=True):
        expected = (array * scale[:, None, None]).sum(axis=0)
        np.testing.assert_allclose(part, expected, rtol=1e-9, atol=1e-12 * bound)
    alone, _ = clipped_sum([torch.from_numpy(array[:1].copy()) for array in arrays], bound)
    length = math.sqrt(sum(float((part**2).sum()) for part in alone))
    assert length <= bound * (1 + 1e-9)
    assert length == pytest.approx(min(bound, norms[0]), rel=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero(value: float) -> None:
    gradients = [torch.ones(3, 2, 2), torch.ones(3, 4, 1)]
    gradients[1][1, 2, 0] = value
    sums, norms = clipped_sum(gradients, 1e6)
    assert [bool(norm.isfinite()) for norm in norms] == [True, False, True]
    assert all(torch.equal(each, torch.full_like(each, 2.0)) for each in sums)


def test_neighbours_are_no_further_apart_than_the_bound(
    tiny_model: Path, examples: list[Example]
) -> None:
    """What the noise is measured against: after clipping, summing and rounding.

    The noise of one key is the same for both neighbours, so it is not in their difference.
    """
    clip_norm, model = 0.05, adapted(tiny_model)
    asked = settings(record_clip_norm=clip_norm, batch_size=1)

    def noised_sum(rows: Sequence[Example]) -> torch.Tensor:
        with record_gradients(model) as gradients:
            _private_gradient(model, rows, asked, gradients, RandomStream(KEY), pad_id=0)
            noised = [weight.grad.double().flatten() for weight in gradients.weights]
        model.zero_grad()
        return torch.cat(noised)

    _, norms = clipped_sum(gradients_of(model, examples[:6]), clip_norm)
    assert bool((norms > clip_norm).all()), "every record is clipped here"
    most = clip_norm * (1 - 2**-10)  # the grid may move it by as much again
    whole = noised_sum(examples[:6])
    for removed in range(6):
        rest = [*examples[:removed], *examples[removed + 1 : 6]]
        assert 0.95 * clip_norm < float((whole - noised_sum(rest)).norm()) <= most
        exchanged = [*rest, examples[10 + removed]]
        assert float((whole - noised_sum(exchanged)).norm()) <= 2 * most


def test_the_noise_has_the_deviation_that_was_asked_and_lies_on_a_grid() -> None:
    normal = np.random.default_rng(3).normal(size=(300, 400))
    sums = np.random.default_rng(4).normal(size=(300, 400))
    numbers = {"clip_norm": 0.5, "noise_multiplier": 1.5, "expected": 8, "num_weights": 120_000}
    with_noise = noised_mean(sums, normal, **numbers)
    np.testing.assert_allclose(with_noise, (sums + 0.75 * normal) / 8, atol=1e-6)
    # The released sum is a whole multiple of one step, and numbers between the steps never occur.
    grid = 2.0 ** math.floor(math.log2(min(0.5 / (1024 * math.sqrt(120_000)), 0.75 / 2**20)))
    multiples = with_noise * 8 / grid
    assert np.array_equal(multiples, np.rint(multiples))
    assert np.abs(multiples).max() < 2**53


def test_a_steps_gradient_carries_noise_over_the_expected_batch(
    tiny_model: Path, examples: list[Example]
) -> None:
    """With much noise nothing else is left of a gradient: its length is known to 1 %."""
    model = adapted(tiny_model)
    noisy = settings(num_steps=6, accumulation=2, noise_multiplier=50.0, record_clip_norm=0.3)
    steps = train_privately(model, examples, noisy, pad_id=0, key=KEY).steps
    num_weights = sum(weight.numel() for weight in trained(model).values())
    expected = 50.0 * 0.3 * math.sqrt(num_weights) / 8
    assert len(steps) == 6
    for step in steps:
        assert step.grad_norm == pytest.approx(expected, rel=5 / math.sqrt(2 * num_weights) + 0.002)


def test_a_step_that_draws_no_record_is_noise_only(
    tiny_model: Path, examples: list[Example]
) -> None:
    rare = settings(num_steps=12, batch_size=1)
    model = adapted(tiny_model)
    result = train_privately(model, examples, rare, pad_id=0, key=KEY)
    empty = [step for step in result.steps if step.num_tokens == 0]
    assert 0 < len(empty) < 12
    assert all(step.loss == 0 and step.grad_norm > 1 for step in empty)
    assert all(step.loss > 1 for step in result.steps if step.num_tokens)
    assert result.event == PrivacyEvent(noise_multiplier=1.0, sampling_rate=1 / 24, steps=12)
    assert all(weight.isfinite().all() for weight in trained(model).values())


def test_a_record_without_a_token_to_learn_is_drawn_and_moves_nothing(
    tiny_model: Path, examples: list[Example]
) -> None:
    """The same step with and without such records, when every record is drawn."""
    results = []
    for more in (0, 8):
        model = adapted(tiny_model)
        rows = [*examples[:8], *[Example((), 0, is_cut=True)] * more]
        whole = settings(num_steps=1, batch_size=8 + more, noise_multiplier=1e-13)
        result = train_privately(model, rows, whole, pad_id=0, key=KEY)
        assert result.event == PrivacyEvent(1e-13, 1.0, 1)
        results.append(result.steps[0])
    assert results[0].num_tokens == results[1].num_tokens
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    # Divided by the number of all records, the mean is half as long.
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm / 2, rel=1e-4)


def test_a_data_set_without_a_token_to_learn_gives_noise_only(tiny_model: Path) -> None:
    rows = [Example((), 0, is_cut=True)] * 8
    result = train_privately(adapted(tiny_model), rows, settings(), pad_id=0, key=KEY)
    assert result.event == PrivacyEvent(1.0, 0.5, 4)
    assert all(step.num_tokens == 0 and step.grad_norm > 1 for step in result.steps)


def test_without_noise_and_bound_a_full_batch_is_plain_training(
    tiny_model: Path, examples: list[Example]
) -> None:
    """Records of one length: only then is the mean over records that over tokens."""
    rows = [Example(e.input_ids[:28], e.num_prompt) for e in examples]
    rows = [row for row in rows if row.num_prompt == rows[0].num_prompt][:8]
    options = {"batch_size": 4, "accumulation": 2, "schedule": "cosine", "weight_decay": 0.1}
    options |= {"max_grad_norm": 1e9, "proximal_mu": 0.3}
    plain, private = adapted(tiny_model), adapted(tiny_model)
    expected = train(plain, rows * 4, settings(**options, noise_multiplier=0), pad_id=0)
    vanishing = settings(**options, noise_multiplier=1e-13, record_clip_norm=1e3)
    found = train_privately(private, rows, vanishing, pad_id=0).steps
    for one, other in zip(found, expected, strict=True):
        assert one.num_tokens == other.num_tokens
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=3e-3)  # CLIP_SLACK is 2e-3
        assert one.learning_rate == other.learning_rate
    for name, weight in trained(plain).items():
        torch.testing.assert_close(trained(private)[name], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 2, "accumulation": 4}, {"batch_size": 8, "gradient_checkpointing": True}],
)
def test_how_a_batch_goes_through_the_model_changes_nothing(
    tiny_model: Path, examples: list[Example], changes: dict[str, object]
) -> None:
    results = []
    for options in ({"batch_size": 8}, changes):
        model = adapted(tiny_model)
        train_privately(model, examples, settings(**options), pad_id=0, key=KEY)
        results.append(trained(model))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=1e-3, atol=1e-5)


def test_a_key_repeats_a_run_to_the_bit_and_without_one_nothing_repeats(
    tiny_model: Path, examples: list[Example]
) -> None:
    results = []
    for key in (KEY, KEY, None, None):
        model = adapted(tiny_model)
        train_privately(model, examples, SETTINGS, pad_id=0, key=key)
        results.append(torch.cat([weight.flatten() for weight in trained(model).values()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[2], results[3])


def test_a_private_run_learns_touches_only_its_factors_and_leaves_the_model_as_it_was(
    tiny_model: Path, examples: list[Example]
) -> None:
    model = adapted(tiny_model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = evaluate(model, examples, pad_id=0)
    mild = settings(num_steps=30, batch_size=12, noise_multiplier=0.02)
    seen: list[Step] = []
    result = train_records(model, examples, mild, pad_id=0, on_step=seen.append, key=KEY)
    assert result.steps == seen
    assert evaluate(model, examples, pad_id=0).loss < before.loss - 0.5
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_proximal_term_comes_after_the_noise(tiny_model: Path, examples: list[Example]) -> None:
    moved = {}
    for mu in (0.0, 1e6):
        model = adapted(tiny_model)
        start = trained(model)
        held = settings(num_steps=8, proximal_mu=mu)
        train_privately(model, examples, held, pad_id=0, key=KEY)
        moved[mu] = sum(float((w - start[n]).square().sum()) for n, w in trained(model).items())
    assert moved[1e6] < 0.5 * moved[0.0]


def test_training_that_is_not_private_spends_nothing_and_draws_as_ever(
    tiny_model: Path, examples: list[Example]
) -> None:
    plain = settings(noise_multiplier=0)
    model = adapted(tiny_model)
    result = train_records(model, examples, plain, pad_id=0, stretch=1)
    assert result.event is None
    assert privacy_event(plain, 1) is None
    rows = draw(examples, 16, seed=0, start=16)
    learned = sum(len(row.input_ids) - row.num_prompt for row in rows)
    assert sum(step.num_tokens for step in result.steps) == learned


def test_a_batch_larger_than_the_data_set_is_refused() -> None:
    with pytest.raises(SettingsError, match="is 24, more than the data set holds") as caught:
        privacy_event(settings(batch_size=8, accumulation=3), 23)
    assert "23" not in str(caught.value)
    event = privacy_event(settings(batch_size=8, accumulation=3), 24)
    assert event == PrivacyEvent(noise_multiplier=1.0, sampling_rate=1.0, steps=4)


def test_checkpoints_of_a_private_run_are_refused() -> None:
    with pytest.raises(SettingsError, match="what a checkpoint holds would tell its noise"):
        load_settings(TrainingSettings, {"noise_multiplier": 1, "checkpoint_every": 2}, "training")


def test_a_bound_below_the_smallest_is_refused() -> None:
    with pytest.raises(SettingsError, match="record_clip_norm"):
        load_settings(TrainingSettings, {"record_clip_norm": 0.99 * LEAST_CLIP_NORM}, "training")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e300])
@pytest.mark.parametrize("name", ["noise_multiplier", "record_clip_norm"])
def test_settings_of_privacy_are_numbers_in_their_range(name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=name):
        load_settings(TrainingSettings, {name: value}, "training")


def test_a_loop_with_records_in_a_given_order_refuses_to_be_called_private(
    tiny_model: Path, examples: list[Example]
) -> None:
    with pytest.raises(SettingsError, match="cannot be private"):
        train(adapted(tiny_model), examples[:16], SETTINGS, pad_id=0)


def test_weights_whose_records_cannot_be_told_apart_are_refused(
    tiny_model: Path, examples: list[Example]
) -> None:
    model = adapted(tiny_model)
    norm = next(p for n, p in model.named_parameters() if "norm" in n)
    norm.requires_grad_()
    with pytest.raises(PrivacyError, match="norm.weight is trained"):
        train_privately(model, examples, SETTINGS, pad_id=0)
