"""A model's own tokenizer.json and chat template, read by the `tokenizers` library alone.

onnxruntime-genai brings a tokenizer too, but it passes over steps that it does not know: with
SmolLM2's it leaves out the cutting of digits, and two spaces before a number become other
tokens than the model was trained on (0.18.0; `edge.fidelity.check_tokenizer` found it).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge.chat import Message, render_chat
from edge.manifest import BuildError


class Tokenizer:
    """Byte-level BPE out of a directory with tokenizer.json, its config and a chat template."""

    def __init__(self, directory: Path) -> None:
        """Read ``directory``.

        Raises:
            BuildError: A file is missing or damaged.
        """
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise BuildError(
                f"{directory / 'tokenizer.json'} cannot be read ({error}): build it again"
            ) from None
        config = _read_json(directory / "tokenizer_config.json")
        self._special_tokens = {
            name: _content(config[name]) for name in ("bos_token", "eos_token") if config.get(name)
        }
        self._template = _read_template(directory, config)
        added = self._tokenizer.get_added_tokens_decoder().items()
        self._added = {token: "" if entry.special else entry.content for token, entry in added}
        ends = _read_json(directory / "genai_config.json")["model"]["eos_token_id"]
        self.end_ids = frozenset(ends if isinstance(ends, list) else [ends])
        """Tokens that end an answer."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation, up to where the answer begins."""
        text = render_chat(self._template, messages, self._special_tokens)
        # A template writes its own beginning-of-sequence token.
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def piece(self, token: int) -> bytes:
        """Return the bytes that ``token`` adds to the text; nothing for a special token."""
        if token in self._added:
            return str(self._added[token]).encode()
        written = self._tokenizer.id_to_token(token) or ""
        return bytes(_BYTES[character] for character in written)


def _byte_alphabet() -> dict[str, int]:
    """Return which byte each character of a byte-level vocabulary stands for (GPT-2's table).

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _read_template(directory: Path, config: dict[str, Any]) -> str:
    path = directory / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if not isinstance(template, str):
        raise BuildError(f"{path} is missing: build it again")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BuildError(f"{path} cannot be read ({error}): build it again") from None
    if not isinstance(value, dict):
        raise BuildError(f"{path} holds no JSON object: build it again")
    return value


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
