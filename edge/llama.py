"""llama.cpp through ctypes: the C functions that the `xllamacpp` wheel's shared object exports.

We call the C API rather than xllamacpp's HTTP server: no port is opened, token ids and logits are
ours to read, and one file carries both the proof at build time and the device's runtime.

The parameter structs change with llama.cpp's version, so they are treated as opaque: the defaults
that the library returns are passed back in a buffer larger than any of them, and only the first
three fields (context and batch sizes) are set, checked by asking the library afterwards.

Shape letters: V vocabulary, P positions asked for.
"""

import ctypes
import functools
import importlib.util
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edge.errors import EdgeError

_ERROR_LEVEL = 4
_BATCH_TOKENS = 256
"""Tokens decoded at once: llama.cpp reserves this many rows of logits."""


class LlamaError(EdgeError):
    """llama.cpp could not load or run a file."""


class _Parameters(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * 1024),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_VOID, _INT, _BOOL, _TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_char_p
_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, _VOID, _VOID, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _VOID],
    ),
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG_CALLBACK, _VOID]),
    "llama_model_default_params": (_Parameters, []),
    "llama_context_default_params": (_Parameters, []),
    "llama_model_load_from_file": (_VOID, [_TEXT, _Parameters]),
    "llama_model_free": (None, [_VOID]),
    "llama_model_get_vocab": (_VOID, [_VOID]),
    "llama_model_n_ctx_train": (_INT, [_VOID]),
    "llama_model_chat_template": (_TEXT, [_VOID, _TEXT]),
    "llama_init_from_model": (_VOID, [_VOID, _Parameters]),
    "llama_free": (None, [_VOID]),
    "llama_n_ctx": (ctypes.c_uint32, [_VOID]),
    "llama_n_batch": (ctypes.c_uint32, [_VOID]),
    "llama_n_ubatch": (ctypes.c_uint32, [_VOID]),
    "llama_set_n_threads": (None, [_VOID, _INT, _INT]),
    "llama_get_memory": (_VOID, [_VOID]),
    "llama_memory_clear": (None, [_VOID, _BOOL]),
    "llama_batch_init": (_Batch, [_INT, _INT, _INT]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (_INT, [_VOID, _Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [_VOID, _INT]),
    "llama_vocab_n_tokens": (_INT, [_VOID]),
    "llama_vocab_is_eog": (_BOOL, [_VOID, _INT]),
    "llama_vocab_bos": (_INT, [_VOID]),
    "llama_vocab_eos": (_INT, [_VOID]),
    "llama_vocab_get_text": (_TEXT, [_VOID, _INT]),
    "llama_tokenize": (_INT, [_VOID, _TEXT, _INT, ctypes.POINTER(_INT), _INT, _BOOL, _BOOL]),
    "llama_token_to_piece": (_INT, [_VOID, _INT, _TEXT, _INT, _INT, _BOOL]),
}

_errors: list[str] = []
"""The last complaint of the call under way: cleared before each call that can fail."""


def _keep_error(level: int, text: bytes, _user: object) -> None:
    # llama.cpp writes pages on every load; only its errors matter, and only when a call fails.
    if level == _ERROR_LEVEL:
        _errors.append(text.decode("utf-8", "replace").strip())
        del _errors[:-1]


# Held here for as long as the library lives: ctypes does not keep a callback alive.
_log_callback = _LOG_CALLBACK(_keep_error)


def share_cores() -> None:
    """Let OpenMP's threads sleep while they wait for each other, unless the environment says else.

    They spin by default. Beside other busy processes that made two threads 10 times slower than
    one (5 against 60 tokens/s, SmolLM2-135M Q8_0). Heeded by libraries that are loaded after.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@functools.cache
def load_library() -> ctypes.CDLL:
    """Return llama.cpp's C API, silenced.

    Raises:
        LlamaError: xllamacpp is not installed.
    """
    found = importlib.util.find_spec("xllamacpp")
    folders = [Path(folder) for folder in (found.submodule_search_locations or ())] if found else []
    files = [file for folder in folders for file in sorted(folder.glob("xllamacpp*.so"))]
    if not files:
        raise LlamaError("xllamacpp is not installed: pip install 'fedge[device]'")
    share_cores()
    library = ctypes.CDLL(str(files[0]))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_log_callback, None)
    library.llama_backend_init()
    return library


def usable_threads() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0))


class Llama:
    """One loaded GGUF file with one sequence in its context. Close it, or use it in a `with`.

    The rule it keeps: ``num_decoded`` tokens are in the context, never more than it holds.
    """

    def __init__(self, path: Path, *, context_tokens: int = 0, threads: int | None = None) -> None:
        """Load ``path``.

        Args:
            path: A GGUF file.
            context_tokens: Longest sequence; 0 for what the model was trained on, at most 4096.
            threads: Cores to use; all that this process may use if None.

        Raises:
            LlamaError: The file is missing, damaged, or of a kind llama.cpp does not know.
        """
        self._library = load_library()
        _errors.clear()
        self._model = self._library.llama_model_load_from_file(
            os.fsencode(path), self._library.llama_model_default_params()
        )
        if not self._model:
            raise LlamaError(f"{path} cannot be loaded by llama.cpp ({_last_error()})")
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self.num_vocab = int(self._library.llama_vocab_n_tokens(self._vocab))
        trained = int(self._library.llama_model_n_ctx_train(self._model))
        self.context_tokens = context_tokens or min(trained, 4096)
        self._context = self._new_context(path)
        self._library.llama_set_n_threads(self._context, *[threads or usable_threads()] * 2)
        self._batch = self._library.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self.num_decoded = 0

    def _new_context(self, path: Path) -> int:
        parameters = self._library.llama_context_default_params()
        sizes = (self.context_tokens, _BATCH_TOKENS, _BATCH_TOKENS)
        struct.pack_into("<III", parameters.bytes, 0, *sizes)
        _errors.clear()
        context = self._library.llama_init_from_model(self._model, parameters)
        if not context:
            self._library.llama_model_free(self._model)
            raise LlamaError(f"{path}: llama.cpp made no context ({_last_error()})")
        library = self._library
        # llama.cpp pads the context upwards and cuts the batches to it.
        if (
            library.llama_n_ctx(context) < self.context_tokens
            or library.llama_n_batch(context) < min(_BATCH_TOKENS, self.context_tokens)
            or library.llama_n_ubatch(context) > _BATCH_TOKENS
        ):
            library.llama_free(context)
            library.llama_model_free(self._model)
            raise LlamaError(
                "this xllamacpp lays out llama.cpp's parameters in another way: "
                "install the version in constraints.txt"
            )
        return int(context)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back. Calling it twice is harmless."""
        if self._model:
            self._library.llama_batch_free(self._batch)
            self._library.llama_free(self._context)
            self._library.llama_model_free(self._model)
            self._model = None

    @property
    def chat_template(self) -> str:
        """The Jinja template in the file's metadata.

        Raises:
            LlamaError: It has none.
        """
        template = self._library.llama_model_chat_template(self._model, None)
        if not template:
            raise LlamaError("the GGUF file has no chat template: build it again with `edge build`")
        return str(template.decode())

    @property
    def special_tokens(self) -> dict[str, str]:
        """The text of `bos_token` and `eos_token`, as chat templates name them."""
        ids = {
            "bos_token": self._library.llama_vocab_bos(self._vocab),
            "eos_token": self._library.llama_vocab_eos(self._vocab),
        }
        get_text = self._library.llama_vocab_get_text
        return {
            name: get_text(self._vocab, token).decode() for name, token in ids.items() if token >= 0
        }

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Return the ids of ``text``; special tokens written in it are recognised.

        Args:
            text: Any text.
            add_special: Put the beginning-of-sequence token first if the tokenizer asks for it.
        """
        raw = text.encode()
        ids = (_INT * (len(raw) + 2))()
        count = self._library.llama_tokenize(
            self._vocab, raw, len(raw), ids, len(ids), add_special, True
        )
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        """Return the bytes that ``token`` adds to the text; nothing for a control token."""
        buffer = ctypes.create_string_buffer(256)
        size = self._library.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = self._library.llama_token_to_piece(
                self._vocab, token, buffer, len(buffer), 0, False
            )
        return buffer.raw[:size]

    def is_end(self, token: int) -> bool:
        """Whether ``token`` ends a generation (end of sequence or end of turn)."""
        return bool(self._library.llama_vocab_is_eog(self._vocab, token))

    def clear(self) -> None:
        """Forget the sequence."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self.num_decoded = 0

    def decode(
        self, token_ids: Sequence[int], positions: Sequence[int]
    ) -> Iterator[NDArray[np.float32]]:
        """Append ``token_ids`` to the sequence and yield the logits [V] at some of them, in order.

        A yielded row is llama.cpp's own memory, valid until the next one is asked for. Drain the
        iterator: what is not drained is not decoded.

        Args:
            token_ids: What follows what is in the context already.
            positions: Indices into ``token_ids``, ascending.

        Raises:
            LlamaError: The sequence would outgrow the context, or llama.cpp failed.
        """
        if self.num_decoded + len(token_ids) > self.context_tokens:
            raise LlamaError(
                f"{self.num_decoded + len(token_ids)} tokens do not fit the context of "
                f"{self.context_tokens}: shorten the prompt or ask for fewer tokens"
            )
        wanted = set(positions)
        for start in range(0, len(token_ids), _BATCH_TOKENS):
            piece = token_ids[start : start + _BATCH_TOKENS]
            rows = [row for row in range(len(piece)) if start + row in wanted]
            self._decode_piece(piece, set(rows))
            for row in rows:
                pointer = self._library.llama_get_logits_ith(self._context, row)
                yield np.ctypeslib.as_array(pointer, shape=(self.num_vocab,))

    def _decode_piece(self, token_ids: Sequence[int], wanted: set[int]) -> None:
        batch = self._batch
        batch.n_tokens = len(token_ids)
        for row, token in enumerate(token_ids):
            batch.token[row] = token
            batch.pos[row] = self.num_decoded + row
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = 0
            batch.logits[row] = row in wanted
        _errors.clear()
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise LlamaError(f"llama.cpp could not decode (status {status}: {_last_error()})")
        self.num_decoded += len(token_ids)


def _last_error() -> str:
    return _errors[-1] if _errors else "it gave no reason"
