"""Proof that a build is its source: divergence, agreement and perplexity on scored tokens.

The source runs once in float32 under transformers; of each scored position only the last hidden
state is kept, and its distribution is made again, a chunk at a time, for every build that is
compared. So a 150k-token vocabulary costs no more memory than a chunk.

Shape letters: P scored positions, K of them in one chunk, E embedding width, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge.errors import EdgeError
from edge.heldout import Example
from edge.manifest import Fidelity
from edge.runtime import Runtime

_CHUNK = 32
"""Positions compared at once: 32 x 150k x 8 bytes = 38 MB a distribution."""

_TOKENIZER_PROBES = (
    "It's 3.14159, isn't it? We'll pay $1,234,567.89 on 2026-11-22.",
    "  two spaces,\ttab,\n\nnewlines\r\n   and trailing   ",
    "Café naïve Straße Ελλάδα Кириллица 日本語テスト 한국어 العربية ½ ²",
    "🙂👩‍👩‍👧 emoji, <|im_end|> and </s> written out",
    "def f(x):\n    return {'a': x**2}  # comment",
)


class FidelityError(EdgeError):
    """A build does not do what its source does."""


@dataclass(frozen=True)
class SourceReference:
    """What the source predicts at every scored position."""

    examples: Sequence[Example]
    hidden_PE: Any
    """torch float32: last hidden states, normed, in the examples' order."""
    head_VE: Any
    """torch float32: the output matrix."""

    @property
    def targets(self) -> list[int]:
        """The token that really follows each scored position."""
        return [
            example.token_ids[position + 1]
            for example in self.examples
            for position in example.positions
        ]


def read_source(model: Path, examples: Sequence[Example]) -> SourceReference:
    """Run the source in float32 over ``examples``. Its weights are in memory until this returns."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a hundred lines of it where stderr is a file
    source = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, local_files_only=True
    ).eval()
    hidden = []
    with torch.inference_mode():
        for example in examples:
            output = source.get_decoder()(input_ids=torch.tensor([example.token_ids]))
            hidden.append(output.last_hidden_state[0, example.positions].clone())
    head_VE = source.get_output_embeddings().weight.detach().clone()
    return SourceReference(examples, torch.cat(hidden), head_VE)


def measure_fidelity(
    reference: SourceReference, runtime: Runtime, data: Literal["heldout", "probe"]
) -> Fidelity:
    """Return how far the build that ``runtime`` has loaded is from its source.

    KL(source || build) = sum over V of p (log p - log q), in float64, at every scored position.

    Args:
        reference: From ``read_source``.
        runtime: The very thing that will answer on the device.
        data: Where the examples come from.

    Raises:
        FidelityError: The build gave numbers that are not finite.
    """
    divergences, same_first, build_losses, source_losses = [], [], [], []
    targets = np.asarray(reference.targets)
    start = 0
    for build_KV in _chunks(reference, runtime):
        stop = start + len(build_KV)
        q_KV, p_KV = _log_softmax(build_KV), _source_log_probabilities(reference, start, stop)
        rows = np.arange(stop - start)
        divergences.append((np.exp(p_KV) * (p_KV - q_KV)).sum(axis=-1))
        same_first.append(p_KV.argmax(axis=-1) == q_KV.argmax(axis=-1))
        build_losses.append(-q_KV[rows, targets[start:stop]])
        source_losses.append(-p_KV[rows, targets[start:stop]])
        start = stop
    # Rounding may leave a hair below zero where both distributions are the same.
    kl_P = np.maximum(np.concatenate(divergences), 0.0)
    if not np.isfinite(kl_P).all():
        raise FidelityError("the build's logits are not finite numbers: the export is wrong")
    return Fidelity(
        kl=float(kl_P.mean()),
        kl_p99=float(np.quantile(kl_P, 0.99)),
        kl_max=float(kl_P.max()),
        top1_agreement=float(np.concatenate(same_first).mean()),
        perplexity=math.exp(float(np.concatenate(build_losses).mean())),
        source_perplexity=math.exp(float(np.concatenate(source_losses).mean())),
        num_tokens=len(kl_P),
        data=data,
    )


def check_full_precision(fidelity: Fidelity, target: str, limit: float) -> None:
    """Refuse a build whose weights are floats and whose answers are not its source's.

    Raises:
        FidelityError: The mean divergence is above ``limit`` nats.
    """
    if fidelity.kl > limit:
        raise FidelityError(
            f"{target} diverges from its source by {fidelity.kl:.3g} nats on average over "
            f"{fidelity.num_tokens} tokens, at most {limit:g} is rounding: the conversion of this "
            "model is wrong, nothing was written; please report its config.json"
        )


def check_tokenizer(runtime: Runtime, tokenizer: Any, target: str) -> None:
    """Refuse a build that cuts a conversation into other tokens than its source does.

    Raises:
        FidelityError: The ids of a probe conversation differ.
    """
    for number, text in enumerate(_TOKENIZER_PROBES, start=1):
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        expected = tokenizer.encode(rendered, add_special_tokens=False)
        found = runtime.encode_chat(messages)
        if found != expected:
            raise FidelityError(
                f"{target} makes {len(found)} tokens of probe conversation {number}, its source "
                f"makes {len(expected)} other ones: the runtime cannot carry this tokenizer or "
                "chat template, nothing was written"
            )


def _chunks(reference: SourceReference, runtime: Runtime) -> Iterator[NDArray[np.float32]]:
    rows: list[NDArray[np.float32]] = []
    for example in reference.examples:
        for logits_V in runtime.logits(example.token_ids, example.positions):
            rows.append(logits_V.copy())  # a row is the runtime's own memory
            if len(rows) == _CHUNK:
                yield np.stack(rows)
                rows.clear()
    if rows:
        yield np.stack(rows)


def _source_log_probabilities(
    reference: SourceReference, start: int, stop: int
) -> NDArray[np.float64]:
    logits_KV = reference.hidden_PE[start:stop] @ reference.head_VE.T
    return _log_softmax(logits_KV.numpy())


def _log_softmax(logits_KV: NDArray[np.float32]) -> NDArray[np.float64]:
    # float64: the divergence of a float32 build is near float32's own rounding.
    shifted_KV = logits_KV.astype(np.float64)
    shifted_KV -= shifted_KV.max(axis=-1, keepdims=True)
    shifted_KV -= np.log(np.exp(shifted_KV).sum(axis=-1, keepdims=True))
    return shifted_KV
