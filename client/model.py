"""A model directory into memory: base, tokenizer, adapter on top.

Llama- and Qwen2-family decoders in the Hugging Face layout. Weights come from safetensors only and
no code is taken from a model directory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from federation.adapter import Adapter, read_adapter, write_into_model
from federation.base_model import ModelError, read_config

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def load_model(directory: Path, dtype: str) -> Any:
    """Load a decoder in evaluation mode, on the GPU if there is one.

    Args:
        directory: Hugging Face layout.
        dtype: "float32" or "bfloat16".

    Raises:
        ModelError: The directory is missing, incomplete, or of another family.
    """
    architecture = (read_config(directory).get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise ModelError(
            f"{directory}: architecture {architecture} is not supported; expected one of "
            f"{', '.join(FAMILIES)}"
        )
    import torch
    from transformers import AutoModelForCausalLM

    _silence_progress_bars()
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=getattr(torch, dtype),
        # On a CPU the backward pass of torch's fused attention takes longer than plain products.
        attn_implementation="sdpa" if torch.cuda.is_available() else "eager",
        local_files_only=True,
        use_safetensors=True,
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a model directory and check that the model can embed every id.

    Raises:
        ModelError: There is none, or it knows more tokens than the model (a tokenizer mismatch).
    """
    config = read_config(directory)
    if not (directory / "tokenizer.json").is_file():
        raise ModelError(
            f"{directory}: tokenizer.json is missing: copy the model's tokenizer into it"
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    largest = max(tokenizer.get_vocab().values())
    if largest >= config["vocab_size"]:
        raise ModelError(
            f"{directory}: tokenizer mismatch: it knows token id {largest}, the model embeds ids "
            f"below {config['vocab_size']}: use the tokenizer that belongs to this model"
        )
    return tokenizer


def padding_id(tokenizer: Any) -> int:
    """Return the id to pad with: any will do, since padding is masked."""
    return int(tokenizer.pad_token_id or tokenizer.eos_token_id or 0)


def new_adapter(model: Any, *, rank: int, alpha: float, target_modules: Sequence[str]) -> Any:
    """Put an untrained LoRA adapter on a frozen base; return the peft model, factors in float32.

    Args:
        model: From ``load_model``.
        rank: Of every module.
        alpha: LoRA alpha.
        target_modules: Last parts of module names, such as "q_proj".
    """
    import warnings

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft looks the base model up on a hub to compare vocabularies; ours is a directory.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        # peft 0.21 asks transformers 5.23 for an attribute that was renamed there.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, config)


def add_adapter(model: Any, adapter: Adapter) -> Any:
    """Put a LoRA adapter on a frozen base; return the peft model, factors in float32.

    Raises:
        ModelError: The adapter was made for another base model.
    """
    adapted = new_adapter(
        model, rank=adapter.rank, alpha=adapter.alpha, target_modules=adapter.target_modules
    )
    write_into_model(adapted, adapter)
    return adapted


class ResidentModel:
    """A base that stays in memory; the factors on it are laid out anew when their layout changes.

    A site of another rank, or a served rank that grows, costs new factors and never a new base.
    """

    def __init__(self, base: Any) -> None:
        """Own ``base``, from ``load_model``."""
        self._model = base
        self._layout: tuple[object, ...] | None = None

    def laid_out_for(self, adapter: Adapter) -> Any:
        """Return the peft model with factors of this adapter's rank, scale and modules.

        Their values are arbitrary: ``write_into_model`` sets them.
        """
        layout = (adapter.rank, adapter.alpha, *adapter.target_modules)
        if layout != self._layout:
            if self._layout is not None:
                self._model, self._layout = self._model.unload(), None
            self._model = new_adapter(
                self._model,
                rank=adapter.rank,
                alpha=adapter.alpha,
                target_modules=adapter.target_modules,
            )
            self._layout = layout
        return self._model


def merged_model(base: Path, adapter: Path, dtype: str) -> Any:
    """Return the base with a PEFT adapter directory merged into its weights.

    The sum is taken in float32 and rounded once: merging in bfloat16 would lose updates smaller
    than 1/256 of a weight.

    Raises:
        ModelError: Either directory is missing or they do not fit each other.
    """
    import torch

    adapted = add_adapter(load_model(base, "float32"), read_adapter(adapter))
    return adapted.merge_and_unload().to(getattr(torch, dtype)).eval()


def same_tokens(one: Path, other: Path) -> bool:
    """Tell whether two model directories map every token string to the same id."""
    vocabularies = []
    for directory in (one, other):
        tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
        vocabularies.append({**tokenizer["model"]["vocab"], **added})
    return vocabularies[0] == vocabularies[1]


def _silence_progress_bars() -> None:
    """Keep the library's bars out of our output: a command draws its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
