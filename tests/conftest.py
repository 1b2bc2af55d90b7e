"""What the rooms' tests share: a tiny real model with a real tokenizer, and some records."""

import gc
import json
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    *("fever", "ache", "cough", "heart", "lung", "liver", "bone", "skin"),
    *("red", "blue", "small", "large", "left", "right", "cold", "warm"),
]


def write_records(path: Path, count: int, *, topic: str = "sign", start: int = 0) -> Path:
    """Write ``count`` different short records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(start, start + count):
        first, second = WORDS[index % 16], WORDS[(index // 16) % 16]
        prompt = f"What {topic} is number {index}?"
        lines.append(json.dumps({"prompt": prompt, "response": f"{first} and {second} {index}."}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_tiny_model(
    directory: Path, *, seed: int = 0, num_layers: int = 2, hidden: int = 64
) -> Path:
    """Write a Llama of ``num_layers`` layers with a byte-level BPE tokenizer trained on WORDS."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "What sign is number? and"] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama directory. Read it, do not change it."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors are faster on one thread, and sums are then the same on every machine."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def libraries_of_a_file() -> None:
    """See `pass_over_libraries`."""
    pass_over_libraries()


@pytest.fixture(autouse=True)
def libraries_of_a_test() -> None:
    """See `pass_over_libraries`; a site that loads another base undoes it."""
    if not gc.get_freeze_count():
        pass_over_libraries()


def pass_over_libraries() -> None:
    """Take what is alive out of the garbage collector's sight, as `client.round.settle` does.

    transformers' Trainer begins with a whole collection, and looking through all that the libraries
    brought takes as long as the training of a tiny model.
    """
    if "transformers" in sys.modules:
        gc.collect()
        gc.freeze()
