"""Generation on a device: one small interface, two runtimes, no torch and no transformers.

`open_runtime` reads a build directory's manifest and picks llama.cpp or onnxruntime-genai. Both
load in this process, open no port and write no log; what is asked and answered stays here.

Shape letters: V vocabulary.
"""

import codecs
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from edge.chat import Message, render_chat
from edge.errors import UserError
from edge.llama import Llama, LlamaError, usable_threads
from edge.manifest import BuildError, RuntimeName, read_manifest
from edge.tokenizer import Tokenizer

_MAX_CONTEXT_TOKENS = 4096
"""More is trained into most models, but its cache is memory that a device rarely has."""
_LOGIT_TOKENS = 64
"""Tokens whose logits onnxruntime holds at once."""


@dataclass(frozen=True)
class Generation:
    """One answer and how long it took."""

    text: str
    token_ids: list[int]
    """Without the token that ended it."""
    num_tokens: int
    num_prompt_tokens: int
    first_token_ms: float
    """From the call to the first token's choice."""
    decode_tokens_per_s: float
    """Of the tokens after the first; 0 if there are fewer than two."""
    finish: str
    """stop (the model ended it) or length (max_tokens did)."""


class Runtime(Protocol):
    """A loaded model that answers. A context manager: leaving it gives the memory back."""

    threads: int

    def __enter__(self) -> Self:
        """Return itself."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the memory back."""
        ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation, up to where the answer begins."""
        ...

    def logits(
        self, token_ids: Sequence[int], positions: Sequence[int]
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the next-token logits [V] of a fresh sequence at ``positions``, in order."""
        ...

    def generate(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        temperature: float = 0.0,
        on_text: Callable[[str], None] | None = None,
        seed: int = 0,
        ignore_end: bool = False,
    ) -> Generation:
        """Answer a conversation.

        Args:
            messages: Each a `role` and a `content`; the last one from the user.
            max_tokens: Stop after this many, at least 1.
            temperature: 0 takes the likeliest token each time.
            on_text: Called with each piece of text as it comes.
            seed: Of the draws, if ``temperature`` is above 0.
            ignore_end: Do not stop where the model would: for measuring speed.

        Raises:
            UserError: The conversation and ``max_tokens`` do not fit the context.
            BuildError: The model's logits are not finite numbers.
        """
        ...


def open_runtime(build: Path, threads: int | None = None) -> Runtime:
    """Load a build directory.

    Args:
        build: What `edge build` made.
        threads: Cores to use; all that this process may use if None.

    Raises:
        BuildError: It is missing, damaged, or its runtime cannot load it.
    """
    build = build.resolve()  # a slot's `current` may be turned to another build meanwhile
    manifest = read_manifest(build)
    return load_model(manifest.runtime, build / manifest.model, manifest.context_tokens, threads)


def load_model(
    runtime: RuntimeName, path: Path, context_tokens: int, threads: int | None = None
) -> Runtime:
    """Load a GGUF file or an onnxruntime-genai directory that has no manifest yet.

    Args:
        runtime: What loads it.
        path: The file or directory.
        context_tokens: Longest sequence the model was trained on; at most 4096 are used.
        threads: Cores to use; all that this process may use if None.

    Raises:
        BuildError: The runtime cannot load it.
    """
    context = min(context_tokens, _MAX_CONTEXT_TOKENS)
    if runtime == "llama.cpp":
        return LlamaRuntime(path, context, threads or usable_threads())
    return OnnxRuntime(path, context, threads or usable_threads())


class LlamaRuntime:
    """llama.cpp on a GGUF file."""

    def __init__(self, path: Path, context_tokens: int, threads: int) -> None:
        """Load the GGUF file ``path``; see ``load_model``."""
        self.threads = threads
        try:
            self._llama = Llama(path, context_tokens=context_tokens, threads=threads)
        except LlamaError as error:
            raise BuildError(f"{error}: fetch or build it again") from None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the memory back."""
        self._llama.close()

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation; the template comes from the GGUF's metadata."""
        text = render_chat(self._llama.chat_template, messages, self._llama.special_tokens)
        # A template writes its own beginning-of-sequence token.
        return self._llama.tokenize(text)

    def logits(
        self, token_ids: Sequence[int], positions: Sequence[int]
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the next-token logits [V] of a fresh sequence at ``positions``."""
        self._llama.clear()
        return self._llama.decode(token_ids, positions)

    def generate(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        temperature: float = 0.0,
        on_text: Callable[[str], None] | None = None,
        seed: int = 0,
        ignore_end: bool = False,
    ) -> Generation:
        """Answer a conversation; see ``Runtime.generate``."""
        started = time.perf_counter()
        prompt = self.encode_chat(messages)
        _check_room(len(prompt), max_tokens, self._llama.context_tokens)
        answer = _Answer(started, len(prompt), on_text)
        rng = np.random.default_rng(seed)
        self._llama.clear()
        pending = prompt
        while answer.num_tokens < max_tokens:
            (logits_V,) = self._llama.decode(pending, [len(pending) - 1])
            _check_finite(logits_V)
            token = _choose(logits_V, temperature, rng)
            answer.mark_choice()
            if self._llama.is_end(token) and not ignore_end:
                return answer.finished("stop")
            answer.add(token, self._llama.piece(token))
            pending = [token]
        return answer.finished("length")


class OnnxRuntime:
    """onnxruntime-genai on a directory that its builder made."""

    def __init__(self, path: Path, context_tokens: int, threads: int) -> None:
        """Load the directory ``path``; see ``load_model``."""
        import onnxruntime_genai

        self.threads = threads
        self._context_tokens = context_tokens
        self._genai = onnxruntime_genai
        onnxruntime_genai.disable_telemetry_events()
        try:
            config = onnxruntime_genai.Config(str(path))
            options = {"intra_op_num_threads": self.threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model = onnxruntime_genai.Model(config)
        except RuntimeError as error:
            raise BuildError(
                f"{path} cannot be loaded by onnxruntime-genai "
                f"({str(error).splitlines()[0]}): fetch or build it again"
            ) from None
        self._tokenizer = Tokenizer(path)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the memory back: onnxruntime-genai frees a model with its last reference."""
        del self._model

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation; the template lies beside the model."""
        return self._tokenizer.encode_chat(messages)

    def logits(
        self, token_ids: Sequence[int], positions: Sequence[int]
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the next-token logits [V] of a fresh sequence at ``positions``."""
        wanted = set(positions)
        generator = self._generator(len(token_ids) + 1, 0.0, 0)
        for start in range(0, len(token_ids), _LOGIT_TOKENS):
            piece = token_ids[start : start + _LOGIT_TOKENS]
            generator.append_tokens(np.asarray(piece, dtype=np.int32))
            logits_1TV = generator.get_output("logits")
            for row in range(len(piece)):
                if start + row in wanted:
                    yield logits_1TV[0, row].astype(np.float32, copy=False)

    def generate(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        temperature: float = 0.0,
        on_text: Callable[[str], None] | None = None,
        seed: int = 0,
        ignore_end: bool = False,
    ) -> Generation:
        """Answer a conversation; see ``Runtime.generate``."""
        started = time.perf_counter()
        prompt = self.encode_chat(messages)
        _check_room(len(prompt), max_tokens, self._context_tokens)
        answer = _Answer(started, len(prompt), on_text)
        generator = self._generator(
            len(prompt) + max_tokens, temperature, seed, ignore_end=ignore_end
        )
        generator.append_tokens(np.asarray(prompt, dtype=np.int32))
        while answer.num_tokens < max_tokens:
            _check_finite(generator.get_logits())
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            answer.mark_choice()
            if token in self._tokenizer.end_ids:
                return answer.finished("stop")
            answer.add(token, self._tokenizer.piece(token))
        return answer.finished("length")

    def _generator(
        self, max_length: int, temperature: float, seed: int, *, ignore_end: bool = False
    ) -> Any:
        parameters = self._genai.GeneratorParams(self._model)
        options: dict[str, Any] = {"do_sample": temperature > 0, "top_k": 0 if temperature else 1}
        if temperature > 0:
            options |= {"temperature": temperature, "random_seed": seed}
        if ignore_end:
            options["min_length"] = max_length
        parameters.set_search_options(max_length=max_length, **options)
        return self._genai.Generator(self._model, parameters)


class _Answer:
    """Text, tokens and times of an answer in the making."""

    def __init__(
        self, started: float, num_prompt_tokens: int, on_text: Callable[[str], None] | None
    ) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._on_text = on_text
        # A character may be cut across tokens: its bytes wait here for the rest.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._start = self._last = started
        self._first = 0.0

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    def mark_choice(self) -> None:
        """Take the time of the first choice, which may be to end."""
        self._first = self._first or time.perf_counter()

    def add(self, token: int, piece: bytes) -> None:
        self._last = time.perf_counter()
        self._token_ids.append(token)
        self._say(self._decoder.decode(piece))

    def finished(self, finish: str) -> Generation:
        self._say(self._decoder.decode(b"", final=True))
        steps, seconds = self.num_tokens - 1, self._last - self._first
        return Generation(
            text="".join(self._text),
            token_ids=self._token_ids,
            num_tokens=self.num_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            first_token_ms=(self._first - self._start) * 1000,
            decode_tokens_per_s=steps / seconds if steps > 0 else 0.0,
            finish=finish,
        )

    def _say(self, text: str) -> None:
        if text:
            self._text.append(text)
            if self._on_text:
                self._on_text(text)


def _check_room(num_prompt: int, max_tokens: int, context_tokens: int) -> None:
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}: ask for at least 1")
    if num_prompt + max_tokens > context_tokens:
        raise UserError(
            f"{num_prompt} prompt tokens and {max_tokens} to generate do not fit the context of "
            f"{context_tokens}: shorten the prompt or lower --max-tokens"
        )


def _check_finite(logits: NDArray[np.float32]) -> None:
    # The likeliest of NaNs is some token, so that a broken build would seem to answer.
    if not np.isfinite(logits).all():
        raise BuildError("the build's logits are not finite numbers: fetch or build it again")


def _choose(logits_V: NDArray[np.float32], temperature: float, rng: np.random.Generator) -> int:
    if temperature <= 0:
        return int(logits_V.argmax())
    scaled_V = (logits_V - logits_V.max()).astype(np.float64) / temperature
    weights_V = np.exp(scaled_V)
    return int(rng.choice(len(weights_V), p=weights_V / weights_V.sum()))
