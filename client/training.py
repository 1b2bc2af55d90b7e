"""The training loop of every room: a site's round, a run alone, a distillation.

`transformers.Trainer` carries precision, accumulation, clipping, checkpoints and resume. Ours are
the loss (a function), the order of the data (the order given, so that two runs can be paired) and
the normalisation: a step's loss is the mean over the learned tokens of all its forward passes.

Shape letters: B records, T tokens, D hidden, N learned positions, V vocabulary.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from client.batches import IGNORED, Example, batches_of_like_length, collate
from client.settings import TrainingSettings
from federation.errors import FedgeError
from federation.settings import SettingsError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    LossFunction = Callable[[PreTrainedModel, dict[str, Tensor]], Tensor]
    """Model and batch to the mean loss over the batch's learned positions (a float32 scalar)."""
    StepGradient = Callable[[PreTrainedModel], "Gradient"]
    """Puts the gradient of a whole step into ``.grad`` of what is trained."""

Item = TypeVar("Item")


class TrainingError(FedgeError):
    """Training went astray."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    step: int
    loss: float
    """Mean over the step's learned tokens, nats, before the update."""
    learning_rate: float
    grad_norm: float
    """L2 norm before clipping, the proximal term included; with privacy, of noise and all."""
    num_tokens: int
    """Learned tokens."""
    seconds: float


@dataclass(frozen=True)
class Gradient:
    """What the gradient of one step was made from."""

    loss: float
    """Mean over the learned tokens, nats; 0 without any."""
    num_tokens: int


def train(
    model: PreTrainedModel,
    examples: Sequence[Example],
    settings: TrainingSettings,
    *,
    pad_id: int,
    loss_function: LossFunction | None = None,
    checkpoints: Path | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> list[Step]:
    """Train ``model`` in place on ``examples`` in the order given; return every step.

    With ``checkpoints`` and ``settings.checkpoint_every`` a run that was killed continues from its
    last checkpoint (weights, optimizer, schedule, data position) and ends with the same weights as
    an uninterrupted one; the steps before it are not in the returned list.

    Args:
        model: Its parameters with ``requires_grad`` are trained; keep them in float32.
        examples: Exactly num_steps x accumulation x batch_size of them: see ``draw_batches``.
        settings: Steps, batch, learning rate.
        pad_id: Token id to pad with.
        loss_function: Default: cross-entropy of the response.
        checkpoints: Directory for checkpoints.
        on_step: Called after each step, for a progress bar or an event log.

    Raises:
        TrainingError: A step's loss is not finite.
        SettingsError: The settings ask for privacy, which needs the whole data set.
    """
    refuse_privacy(settings)
    expected = settings.num_steps * settings.accumulation * settings.batch_size
    if len(examples) != expected:
        raise ValueError(f"{len(examples)} examples for {expected} places: use draw_batches()")
    with tempfile.TemporaryDirectory() as scratch:  # without checkpoints the Trainer writes nothing
        trainer = _build_trainer(
            model,
            examples,
            settings,
            collator=lambda rows: collate(rows, pad_id),
            loss_function=loss_function or response_cross_entropy,
            place=checkpoints or Path(scratch),
            saves=checkpoints is not None and settings.checkpoint_every > 0,
            on_step=on_step or (lambda _: None),
        )
        trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
    model.eval()
    steps: list[Step] = trainer.steps
    return steps


def train_with(
    step_gradient: StepGradient,
    model: PreTrainedModel,
    settings: TrainingSettings,
    *,
    on_step: Callable[[Step], None] | None = None,
) -> list[Step]:
    """Train ``model`` in place with gradients that the caller makes; return every step.

    Optimizer, schedule and proximal term are those of ``train``. The gradient is not clipped.

    Args:
        step_gradient: Called once a step.
        model: Its parameters with ``requires_grad`` are trained.
        settings: Steps, learning rate; batch and accumulation are the caller's business.
        on_step: Called after each step.
    """
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        trainer = _build_trainer(
            model,
            range(settings.num_steps),
            # Measured against infinity, a norm is on record and changes nothing.
            settings.model_copy(
                update={"batch_size": 1, "accumulation": 1, "max_grad_norm": math.inf}
            ),
            # The Trainer counts the tokens of what it believes to train on.
            collator=lambda rows: {"input_ids": torch.tensor([rows])},
            step_gradient=step_gradient,
            place=Path(scratch),
            saves=False,
            on_step=on_step or (lambda _: None),
        )
        trainer.train()
    model.eval()
    steps: list[Step] = trainer.steps
    return steps


def refuse_privacy(settings: TrainingSettings) -> None:
    """Refuse settings that ask for privacy where records are taken in a given order.

    Raises:
        SettingsError: They do. `client.privacy` draws records by itself.
    """
    if settings.noise_multiplier > 0:
        raise SettingsError(
            f"training.noise_multiplier is {settings.noise_multiplier:g} where records are taken "
            "in a given order, which cannot be private: set it to 0; only the rounds of a "
            "federation are private"
        )


def draw(items: Sequence[Item], count: int, *, seed: int, start: int = 0) -> list[Item]:
    """Return ``count`` items of an endless, seeded sequence of shuffled epochs, from ``start`` on.

    A round draws where the one before it stopped, so that over the rounds a site sees every record
    once before it sees one twice.
    """
    drawn: list[Item] = []
    epoch, offset = divmod(start, len(items))
    while len(drawn) < count:
        order = list(range(len(items)))
        random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311 - order of data, no secret
        drawn += [items[index] for index in order[offset : offset + count - len(drawn)]]
        epoch, offset = epoch + 1, 0
    return drawn


def draw_batches(
    examples: Sequence[Example], settings: TrainingSettings, *, stretch: int = 0
) -> list[Example]:
    """Return the examples of one stretch of training (a round, or a whole run), batch by batch."""
    count = settings.num_steps * settings.accumulation * settings.batch_size
    drawn = draw(examples, count, seed=settings.seed, start=stretch * count)
    return batches_of_like_length(drawn, settings.batch_size, seed=settings.seed)


def response_cross_entropy(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean next-token cross-entropy of the response, in nats.

    Only learned positions reach the head: a [B, T, V] tensor of logits is never made.
    """
    from torch.nn.functional import cross_entropy

    hidden_ND, targets_N = learned_positions(model, batch)
    head = decoder_of(model).lm_head
    logits_NV = head(hidden_ND.to(head.weight.dtype)).float()
    return cross_entropy(logits_NV, targets_N)


def add_proximal_gradient(start: Sequence[tuple[Any, Tensor]], mu: float) -> None:
    """Add the gradient of ``mu / 2 * ||w - w_start||^2`` (FedProx, arXiv:1812.06127).

    Args:
        start: Trained parameters with their gradients, and their values at the start.
        mu: Weight of the term, >= 0.
    """
    import torch

    with torch.no_grad():
        for parameter, origin in start:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - origin, alpha=mu)


def learned_positions(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run the decoder without its head; return hidden states [N, D] and their targets [N]."""
    import torch

    decoder = decoder_of(model)
    dtype = decoder.lm_head.weight.dtype
    # Over a bfloat16 base the float32 factors are multiplied in bfloat16 too: a fifth faster.
    # Over a float32 one nothing is said here, so that a caller's own autocast holds.
    narrow = nullcontext() if dtype == torch.float32 else torch.autocast(model.device.type, dtype)
    with narrow:
        output = decoder.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )
    targets_BT = batch["labels"][:, 1:]
    is_learned_BT = targets_BT != IGNORED
    hidden_ND = output.last_hidden_state[:, :-1][is_learned_BT]
    return hidden_ND, targets_BT[is_learned_BT]


def decoder_of(model: Any) -> Any:
    """Return the ...ForCausalLM inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _last_checkpoint(checkpoints: Path | None) -> str | None:
    if checkpoints is None or not checkpoints.is_dir():
        return None
    from transformers.trainer_utils import get_last_checkpoint

    found: str | None = get_last_checkpoint(str(checkpoints))
    return found


def _build_trainer(
    model: PreTrainedModel,
    rows: Sequence[Any],
    settings: TrainingSettings,
    *,
    collator: Callable[[Any], dict[str, Tensor]],
    place: Path,
    saves: bool,
    on_step: Callable[[Step], None],
    loss_function: LossFunction = response_cross_entropy,
    step_gradient: StepGradient | None = None,
) -> Any:
    """Return a Trainer that takes a loss, or gradients that are made elsewhere."""
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    start = [
        (parameter, parameter.detach().clone())
        for parameter in model.parameters()
        if parameter.requires_grad and settings.proximal_mu > 0
    ]

    class OrderedTrainer(Trainer):  # type: ignore[misc]  # transformers is not followed by mypy
        """Trainer with our loss, the data in the order given, and its steps on record."""

        loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.model_accepts_loss_kwargs = True  # asks for num_items_in_batch
            self.steps: list[Step] = []
            self._num_tokens = 0
            self._share = 1.0
            self._started = time.perf_counter()

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset or self.train_dataset)

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Tensor],
            return_outputs: bool = False,  # noqa: ARG002 - the Trainer's signature
            num_items_in_batch: Any = None,
        ) -> Tensor:
            learned = int((inputs["labels"][:, 1:] != IGNORED).sum())
            self._num_tokens += learned
            self._share = learned / int(num_items_in_batch)
            return loss_function(model, inputs) * self._share

        def training_step(
            self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None
        ) -> Tensor:
            if step_gradient is not None:
                model.train()
                made = step_gradient(model)
                self._num_tokens += made.num_tokens
                add_proximal_gradient(start, settings.proximal_mu)
                return torch.tensor(made.loss, device=self.args.device)
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            # The shares of a step sum to 1, so this is one proximal gradient a step, before the
            # clipping. The loss that is logged stays that of the data.
            add_proximal_gradient(start, settings.proximal_mu * self._share)
            return loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:  # noqa: ARG002
            if "loss" not in logs:
                return
            now = time.perf_counter()
            if not math.isfinite(logs["loss"]):
                raise TrainingError(
                    f"the loss of step {self.state.global_step} is {logs['loss']}: lower the "
                    "learning rate, or look for damaged records"
                )
            step = Step(
                step=self.state.global_step,
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                grad_norm=float(logs.get("grad_norm", 0.0)),
                num_tokens=self._num_tokens,
                seconds=now - self._started,
            )
            self._num_tokens, self._started = 0, now
            self.steps.append(step)
            on_step(step)

    arguments = TrainingArguments(
        output_dir=str(place),
        max_steps=settings.num_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule
        if settings.schedule != "constant"
        else "constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        activation_checkpointing=settings.gradient_checkpointing,
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="steps" if saves else "no",
        save_steps=max(settings.checkpoint_every, 1),
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,  # with it a loss that is NaN is logged as 0
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # no silent DataParallel: it would hide the decoder
    return OrderedTrainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        data_collator=collator,
    )
