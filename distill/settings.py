"""Settings of one distillation."""

from typing import Annotated

from pydantic import Field

from client.settings import TrainingSettings
from federation.settings import Settings


class DistillationSettings(Settings):
    """How a student is made and taught. Defaults: `docs/decisions/0005-student-shapes.md`."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of both softmaxes in the KL; above 1 the teacher's unlikely tokens count more."""
    cross_entropy_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the loss that is cross-entropy on the data's own tokens; the rest is KL."""
    calibration_records: Annotated[int, Field(ge=1)] = 64
    """Training records that decide which layers, heads and channels are kept."""
    heldout_records: Annotated[int, Field(ge=1)] = 128
    """Most held-out records that are scored, evenly spaced over what is given."""
    training: TrainingSettings = TrainingSettings(
        num_steps=200,
        batch_size=16,
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=10,
        max_tokens=256,
        checkpoint_every=50,
    )
