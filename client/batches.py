"""Records into tokens into padded batches. Only the response is learned.

Shape letters: B records, T tokens of the longest one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from client.records import DataError, Record

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""Label of a position that is not learned: torch's own default in cross_entropy."""


@dataclass(frozen=True)
class Example:
    """One record as tokens."""

    input_ids: tuple[int, ...]
    num_prompt: int
    """Leading tokens that are given, not learned."""
    is_cut: bool = False
    """The response goes on beyond the longest example."""

    @property
    def num_learned(self) -> int:
        """Tokens that are learned."""
        return len(self.input_ids) - self.num_prompt


def encode_records(
    records: Sequence[Record], tokenizer: Any, max_tokens: int, *, keeps_all: bool = False
) -> list[Example]:
    """Render records with the tokenizer's chat template and tokenise them.

    The prompt is rendered up to and including the assistant's header, the response follows, then
    the end-of-turn that the template writes. A response that does not fit is cut (its end-of-turn
    with it: the model must not learn to stop in mid-sentence); a prompt that leaves no room for
    one token of response is left out.

    Args:
        records: What to encode.
        tokenizer: A transformers tokenizer with a chat template.
        max_tokens: Longest example.
        keeps_all: Whether a record that would be left out becomes an example without a token. For
            private training, where the chance to be drawn, and the cost with it, depends on how
            many records there are: ``max_tokens`` must not change that number.

    Raises:
        DataError: The tokenizer has no chat template or one that does not show where a response
            begins; or no record fits ``max_tokens``, unless ``keeps_all``.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: "
            "use an instruction-tuned model directory, or add chat_template.jinja to it"
        )
    examples = []
    for record in records:
        user = [{"role": "user", "content": record.prompt}]
        turn = [*user, {"role": "assistant", "content": record.response}]
        prompt = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turn, tokenize=False)
        if not whole.startswith(prompt):
            raise DataError(
                f"the chat template of {tokenizer.name_or_path} writes other text before an answer "
                "than before a prompt's end, so what is to be learned cannot be cut out: use a "
                "template whose generation prompt begins the assistant's turn"
            )
        # Tokenised apart: a merge across the border would hide where the response begins,
        # and at generation time the prompt stands alone too.
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        response_ids = tokenizer.encode(whole[len(prompt) :].rstrip("\n"), add_special_tokens=False)
        if len(prompt_ids) < max_tokens:
            ids = (*prompt_ids, *response_ids)
            examples.append(Example(ids[:max_tokens], len(prompt_ids), len(ids) > max_tokens))
        elif keeps_all:
            examples.append(Example((), 0, is_cut=True))
    if not examples:
        raise DataError(f"no record fits {max_tokens} tokens: raise training.max_tokens")
    return examples


def batches_of_like_length(
    examples: Sequence[Example], batch_size: int, *, seed: int, window: int = 8
) -> list[Example]:
    """Reorder a stream so that a batch holds records of like length: less padding to compute.

    Within each window of batches the records are sorted and dealt into batches, and the batches
    shuffled: an example moves by less than ``window`` batches.
    """
    ordered: list[Example] = []
    for start in range(0, len(examples), batch_size * window):
        nearby = sorted(
            examples[start : start + batch_size * window],
            key=lambda example: len(example.input_ids),
        )
        batches = [nearby[i : i + batch_size] for i in range(0, len(nearby), batch_size)]
        random.Random(f"{seed}/{start}").shuffle(batches)  # noqa: S311 - order of data, no secret
        ordered += [example for batch in batches for example in batch]
    return ordered


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Pad examples on the right into one batch.

    Returns:
        `input_ids` [B, T] int64, `attention_mask` [B, T] int64 (1 = real) and `labels` [B, T]
        int64: the input ids where they are learned, -100 elsewhere (not shifted).
    """
    import torch

    longest = max(len(example.input_ids) for example in examples)
    input_ids_BT = torch.full((len(examples), longest), pad_id)
    attention_mask_BT = torch.zeros((len(examples), longest), dtype=torch.long)
    labels_BT = torch.full((len(examples), longest), IGNORED)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids = torch.tensor(example.input_ids)
        input_ids_BT[row, :length] = ids
        attention_mask_BT[row, :length] = 1
        labels_BT[row, example.num_prompt : length] = ids[example.num_prompt :]
    return {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "labels": labels_BT}
