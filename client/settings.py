"""Settings of one site's training. The same keys under `[training]` of a run config."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from federation.settings import Settings

LEAST_CLIP_NORM = 1e-6
"""Smallest bound on a record's gradient. Far below it no training learns anything, and the weights'
float32 begins to round away the noise that is in proportion to it."""


class TrainingSettings(Settings):
    """One stretch of training: a round of a federation, or a whole run alone."""

    num_steps: Annotated[int, Field(ge=1)] = 8
    """Optimizer steps."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Records in one forward pass."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Forward passes in one optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine end at 0."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """L2 norm to which the gradient of a step is clipped. Not under privacy, where each record's
    is."""
    noise_multiplier: Annotated[float, Field(ge=0, le=1e4)] = 0.0
    """Record-level differential privacy: standard deviation of the noise on the sum of the records'
    gradients, in units of ``record_clip_norm``. Each step then draws every record with probability
    batch_size x accumulation / records. 0 = no noise and no privacy."""
    record_clip_norm: Annotated[float, Field(ge=LEAST_CLIP_NORM, le=1e6)] = 1.0
    """L2 bound on the gradient of one record over all trained factors. Only with noise."""
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    """FedProx (Li et al., arXiv:1812.06127): mu / 2 * ||w - w_start||^2 over all trained factors is
    added to the loss, so that a site stays nearer to what it was sent. 0 = off."""
    max_tokens: Annotated[int, Field(ge=8)] = 512
    """Longest record, prompt and response together; a longer response is cut. A record whose prompt
    alone is as long teaches nothing: without noise it is left out, with noise it is drawn like any
    other and its gradient is 0."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of the frozen base. Trained weights are always float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints. 0 = none."""
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _privacy_keeps_no_noise(self) -> Self:
        if self.noise_multiplier > 0 and self.checkpoint_every > 0:
            raise ValueError(
                f"noise_multiplier is {self.noise_multiplier:g} and checkpoint_every "
                f"{self.checkpoint_every}: a private run that is killed starts over, since what a "
                "checkpoint holds would tell its noise; set checkpoint_every to 0"
            )
        return self
