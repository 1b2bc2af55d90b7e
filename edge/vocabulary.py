"""A tokenizer as GGUF carries it: tokens, merges, and the name of its pre-tokenizer.

A byte-level BPE tokenizer is its merges and the regular expression that cuts text before them.
GGUF stores the expression by a name that llama.cpp knows. We find that name from what the tokenizer
does (its own definition), never from what a model is called: two models of one family may differ.

Not here: SentencePiece tokenizers, and normalisation, which llama.cpp does not do (text that is
not in NFC may be cut differently by a Qwen2 tokenizer there and in transformers).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.source_model import ModelError, SourceModel

# tokenizer.ggml.token_type of GGUF
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_LETTERS_AND_SPACES = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_QWEN2_PATTERN = _CONTRACTIONS + _LETTERS_AND_SPACES + r"\p{N}" + _REST
_LLAMA3_PATTERN = _CONTRACTIONS + _LETTERS_AND_SPACES + r"\p{N}{1,3}" + _REST

_BYTE_LEVEL = ("ByteLevel", "gpt-2 expression")
_PRE_TOKENIZERS: dict[tuple[tuple[tuple[str, str], ...], bool], str] = {
    # (steps, whether a whole word in the vocabulary skips its merges) -> llama.cpp's name
    ((_BYTE_LEVEL,), False): "gpt-2",
    ((("Digits", "one by one"), _BYTE_LEVEL), False): "smollm",
    ((("Split", _QWEN2_PATTERN), ("ByteLevel", "")), False): "qwen2",
    ((("Split", _LLAMA3_PATTERN), ("ByteLevel", "")), True): "llama-bpe",
    # dbrx cuts as Llama 3 does and always merges.
    ((("Split", _LLAMA3_PATTERN), ("ByteLevel", "")), False): "dbrx",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer."""

    tokens: list[str]
    """One for each row of the embedding table; rows without a token are named [PAD<row>]."""
    token_types: list[int]
    merges: list[str]
    pre_tokenizer: str
    """llama.cpp's name of the expression that cuts text before the merges."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    adds_bos: bool
    chat_template: str


def load_tokenizer(directory: Path) -> Any:
    """Return the transformers tokenizer of a model directory.

    Raises:
        ModelError: There is no tokenizer.json or chat template, or it cannot be read.
    """
    if not (directory / "tokenizer.json").is_file():
        hint = "SentencePiece (tokenizer.model) cannot be converted yet: "
        raise ModelError(
            f"{directory / 'tokenizer.json'} is missing: "
            + (hint if (directory / "tokenizer.model").is_file() else "")
            + "save the model's fast tokenizer beside its weights"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the Rust parser of tokenizers raises nothing narrower
        raise ModelError(
            f"{directory / 'tokenizer.json'} cannot be read ({error}): fetch the model again"
        ) from None
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {directory} has no chat template: "
            "use an instruction-tuned model directory, or add chat_template.jinja to it"
        )
    return tokenizer


def read_vocabulary(model: SourceModel, tokenizer: Any) -> Vocabulary:
    """Return the vocabulary of ``tokenizer``, padded to the model's embedding table.

    Args:
        model: The model whose rows the ids point at.
        tokenizer: From ``load_tokenizer``: what transformers really does, not what a file says.

    Raises:
        ModelError: The tokenizer is of a kind llama.cpp has no name for, or has ids for which
            the model has no row.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    pre_tokenizer = pre_tokenizer_name(definition, model.directory / "tokenizer.json")
    num_rows = int(model.config["vocab_size"])
    by_id = {index: token for token, index in definition["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in definition["added_tokens"]}
    by_id |= {index: entry["content"] for index, entry in added.items()}
    if by_id and max(by_id) >= num_rows:
        raise ModelError(
            f"tokenizer mismatch: {model.directory / 'tokenizer.json'} has ids up to {max(by_id)}, "
            f"the model has {num_rows} rows (vocab_size): use the tokenizer it was trained with"
        )
    return Vocabulary(
        tokens=[by_id.get(row, f"[PAD{row}]") for row in range(num_rows)],
        token_types=[_token_type(row, by_id, added) for row in range(num_rows)],
        merges=[_merge(pair) for pair in definition["model"]["merges"]],
        pre_tokenizer=pre_tokenizer,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        adds_bos=_adds_bos(tokenizer),
        chat_template=tokenizer.get_chat_template(),
    )


def pre_tokenizer_name(definition: dict[str, Any], place: Path) -> str:
    """Return llama.cpp's name of the pre-tokenizer that a tokenizer.json defines.

    Raises:
        ModelError: llama.cpp has no such pre-tokenizer among those we know.
    """
    model = definition["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ModelError(
            f"{place}: a {model['type']} tokenizer"
            f"{' with byte fallback' if model.get('byte_fallback') else ''} "
            "cannot be converted yet: expected byte-level BPE (SmolLM2, Qwen2, Llama 3, GPT-2)"
        )
    steps = tuple(_steps(definition.get("pre_tokenizer")))
    name = _PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    normalizer = (definition.get("normalizer") or {}).get("type")
    # A Qwen2 tokenizer composes characters first, and llama.cpp does not: equal for text in NFC.
    if name is None or normalizer not in (None, *(("NFC",) if name == "qwen2" else ())):
        raise ModelError(
            f"{place}: llama.cpp has no name for this pre-tokenizer "
            f"({' + '.join(kind for kind, _ in steps) or 'none'}, normalizer {normalizer}): "
            "expected the definition of SmolLM2, Qwen2, Llama 3 or GPT-2"
        )
    return name


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[tuple[str, str]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    kind = pre_tokenizer["type"]
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return [_BYTE_LEVEL if pre_tokenizer.get("use_regex", True) else ("ByteLevel", "")]
    if kind == "Digits" and pre_tokenizer["individual_digits"]:
        return [("Digits", "one by one")]
    if kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]:
        return [("Split", pre_tokenizer["pattern"].get("Regex", ""))]
    return [(kind, "in a form that llama.cpp does not know")]


def _token_type(row: int, by_id: dict[int, str], added: dict[int, dict[str, Any]]) -> int:
    if row not in by_id:
        return UNUSED
    if row in added:
        return CONTROL if added[row]["special"] else USER_DEFINED
    return NORMAL


def _merge(pair: list[str] | str) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
