import json
from pathlib import Path

import pytest

from edge.benchmark import measure, run_benchmark
from edge.errors import UserError


@pytest.mark.parametrize("name", ["gguf-q4_k", "onnx-fp32"])
def test_a_build_is_measured_in_a_process_of_its_own(name: str, builds: Path) -> None:
    found = run_benchmark(builds / name, prompt_tokens=40, max_tokens=8, repeats=3, threads=1)
    assert found.format == name.replace("-", ":")
    assert (found.max_tokens, found.repeats, found.threads) == (8, 3, 1)
    assert 40 <= found.prompt_tokens < 50
    assert found.load_ms > 0
    assert found.first_token_ms > 0
    assert found.decode_tokens_per_s > 0
    # Python and a runtime, and far from what torch would add.
    assert 10e6 < found.peak_bytes < 400e6
    assert found.cpu
    assert f"{found.decode_tokens_per_s:.1f} tokens/s" in found.as_line()


def test_a_number_out_of_range_is_refused(builds: Path) -> None:
    for arguments in ((0, 8, 1), (8, 1, 1), (8, 8, 0)):
        with pytest.raises(UserError, match="expected at least"):
            run_benchmark(builds / "gguf-q4_k", *arguments, threads=None)


def test_what_stops_the_child_is_said(builds: Path) -> None:
    with pytest.raises(UserError, match="do not fit the context of 1024"):
        run_benchmark(builds / "gguf-q4_k", 1000, 100, 1, threads=1)


def test_a_damaged_build_is_refused(gguf_build: Path) -> None:
    manifest = json.loads((gguf_build / "manifest.json").read_text())
    (gguf_build / "manifest.json").write_text(json.dumps({**manifest, "bytes": 1}))
    with pytest.raises(UserError, match="a file is missing or cut off"):
        measure(gguf_build, 10, 4, 1, None)
