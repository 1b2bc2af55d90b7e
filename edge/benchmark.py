"""How fast and how large a build is on this machine, measured in a fresh process.

A process of its own, so that its peak memory is the build's and not the caller's. One warm-up
answer is thrown away; medians over the repeats are reported, because a busy machine skews means.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from edge.chat import Message
from edge.child_process import run_child
from edge.errors import EdgeError, UserError
from edge.manifest import read_manifest
from edge.runtime import Runtime, load_model

_WORDS = "The quick brown fox jumps over the lazy dog and runs on through the quiet wood. "


class BenchmarkError(EdgeError):
    """The measuring process ended without a result."""


@dataclass(frozen=True)
class Benchmark:
    """One build's figures on one machine."""

    format: str
    bytes: int
    load_ms: float
    """From the call until the first prompt could be given; the file may be in the page cache."""
    first_token_ms: float
    """Median time from a prompt to its first token."""
    decode_tokens_per_s: float
    """Median speed of the tokens after the first."""
    peak_bytes: int
    """Most memory the process ever held (VmHWM), mapped model pages included."""
    prompt_tokens: int
    """As the model counts them, chat template included; close to what was asked for."""
    max_tokens: int
    repeats: int
    threads: int
    cpu: str

    def as_line(self) -> str:
        """Return one line for a person."""
        return (
            f"{self.format}  {self.bytes / 1e6:,.1f} MB  load {self.load_ms:.0f} ms, "
            f"first token {self.first_token_ms:.0f} ms after {self.prompt_tokens} tokens, "
            f"{self.decode_tokens_per_s:.1f} tokens/s, peak {self.peak_bytes / 1e6:,.0f} MB "
            f"({self.threads} threads, {self.cpu})"
        )


def run_benchmark(
    build: Path, prompt_tokens: int, max_tokens: int, repeats: int, threads: int | None
) -> Benchmark:
    """Measure ``build`` in a child process.

    Args:
        build: A build directory.
        prompt_tokens: Length of the prompt.
        max_tokens: Tokens to generate each time, at least 2.
        repeats: Answers measured, at least 1.
        threads: Cores to use; all that this process may use if None.

    Raises:
        UserError: The build is missing or damaged, or a number is out of range.
        BenchmarkError: The child died.
    """
    build = build.resolve()  # a slot's `current` may be turned to another build meanwhile
    read_manifest(build)
    for name, value, least in (
        ("--prompt-tokens", prompt_tokens, 1),
        ("--max-tokens", max_tokens, 2),
        ("--repeats", repeats, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}: expected at least {least}")
    numbers = [str(number) for number in (prompt_tokens, max_tokens, repeats, threads or 0)]
    done = run_child(
        [sys.executable, "-m", "edge.benchmark", str(build), *numbers], capture_output=True
    )
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode == UserError.exit_code:
        raise UserError(last)
    if done.returncode:
        raise BenchmarkError(f"measuring {build} ended with code {done.returncode}: {last}")
    return Benchmark(**json.loads(done.stdout))


def measure(
    build: Path, prompt_tokens: int, max_tokens: int, repeats: int, threads: int | None
) -> Benchmark:
    """Measure ``build`` in this process; its peak memory includes what the process did before."""
    build = build.resolve()
    manifest = read_manifest(build)
    started = time.perf_counter()
    with load_model(
        manifest.runtime, build / manifest.model, manifest.context_tokens, threads
    ) as runtime:
        load_ms = (time.perf_counter() - started) * 1000
        messages = _prompt(runtime, prompt_tokens)
        runtime.generate(messages, min(max_tokens, 4), ignore_end=True)
        answers = [runtime.generate(messages, max_tokens, ignore_end=True) for _ in range(repeats)]
        used_threads = runtime.threads
    return Benchmark(
        format=manifest.format,
        bytes=manifest.bytes,
        load_ms=load_ms,
        first_token_ms=statistics.median(answer.first_token_ms for answer in answers),
        decode_tokens_per_s=statistics.median(answer.decode_tokens_per_s for answer in answers),
        peak_bytes=_peak_bytes(),
        prompt_tokens=answers[0].num_prompt_tokens,
        max_tokens=max_tokens,
        repeats=repeats,
        threads=used_threads,
        cpu=_cpu(),
    )


def _prompt(runtime: Runtime, prompt_tokens: int) -> list[Message]:
    """Return a conversation of about ``prompt_tokens``: words are added until it is as long."""
    words = _WORDS.split()
    low, high = 1, prompt_tokens
    while low < high:
        middle = (low + high) // 2
        if len(runtime.encode_chat(_said(words, middle))) < prompt_tokens:
            low = middle + 1
        else:
            high = middle
    return _said(words, low)


def _said(words: list[str], count: int) -> list[Message]:
    text = " ".join(words[index % len(words)] for index in range(count))
    return [{"role": "user", "content": text}]


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return "unknown"


def _main(arguments: list[str]) -> int:
    build, *rest = arguments
    prompt_tokens, max_tokens, repeats, threads = (int(number) for number in rest)
    try:
        result = measure(Path(build), prompt_tokens, max_tokens, repeats, threads or None)
    except EdgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(asdict(result)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
