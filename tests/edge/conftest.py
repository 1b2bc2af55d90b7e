"""Tiny real models of both families, each with a tokenizer of the kind its family uses."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from edge.build import build
from tests.conftest import CHAT_TEMPLATE

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
TEXT = [
    "The patient's heart was checked on day 12, and again on day 345: it's fine, we'll see.",
    "  two  spaces\n\nnewlines\tand tabs, don't   stop 2026-11-22 1234567",
    "Café naïve Straße Ελλάδα 日本語 🙂 the heart the lung the day",
]


def write_tokenizer(directory: Path, kind: str) -> None:
    """Train a byte-level BPE tokenizer with the pre-tokenizer that llama.cpp calls ``kind``."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
    from transformers import PreTrainedTokenizerFast

    def split(pattern: str) -> Any:
        cut = Split(Regex(pattern), behavior="isolated", invert=False)
        return Sequence([cut, ByteLevel(add_prefix_space=False, use_regex=False)])

    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer = {
        "gpt-2": ByteLevel(add_prefix_space=False),
        "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
        "qwen2": split(QWEN2_PATTERN),
        "llama-bpe": split(LLAMA3_PATTERN),
    }[kind]
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    if kind == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)


def write_model(directory: Path, model: Any) -> None:
    """Save ``model`` with wild weights: one in the wrong place must change the logits."""
    import torch

    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    model.save_pretrained(directory)


def llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        **{"tie_word_embeddings": True, **changes},
    )


@pytest.fixture(scope="session")
def llama_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, grouped heads, SmolLM's tokenizer, a licence. Do not change it."""
    from transformers import LlamaForCausalLM

    directory = tmp_path_factory.mktemp("llama")
    write_model(directory, LlamaForCausalLM(llama_config()))
    write_tokenizer(directory, "smollm")
    (directory / "LICENSE").write_text("Apache-2.0\n")
    return directory


@pytest.fixture(scope="session")
def llama3_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, heads wider than hidden / heads, Llama 3's rotary scaling and tokenizer."""
    from transformers import LlamaForCausalLM

    directory = tmp_path_factory.mktemp("llama3")
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    config = llama_config(tie_word_embeddings=False, head_dim=32, rope_parameters=rope)
    write_model(directory, LlamaForCausalLM(config))
    write_tokenizer(directory, "llama-bpe")
    return directory


@pytest.fixture(scope="session")
def qwen2_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention biases, tied embeddings, Qwen2's tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    directory = tmp_path_factory.mktemp("qwen2")
    config = Qwen2Config(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    write_model(directory, Qwen2ForCausalLM(config))
    write_tokenizer(directory, "qwen2")
    return directory


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory, llama_model: Path) -> Path:
    """`gguf-f16`, `gguf-q4_k` and `onnx-fp32` of the Llama. Copy what you want to change."""
    out = tmp_path_factory.mktemp("builds")
    build(llama_model, ["gguf:f16", "gguf:q4_k", "onnx:fp32"], out)
    return out


@pytest.fixture
def gguf_build(builds: Path, tmp_path: Path) -> Path:
    """A copy of `gguf-f16` that a test may damage."""
    return Path(shutil.copytree(builds / "gguf-f16", tmp_path / "gguf-f16"))
