import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge.build import TARGETS, build
from edge.cli import main
from edge.source_model import open_source_model
from edge.verification import verify

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def edge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `edge …` in this process; give back its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def files(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def test_a_build_directory_holds_exactly_this(builds: Path, llama_model: Path) -> None:
    ancestor = next((builds / "gguf-q4_k" / "lineage").iterdir()).name
    assert files(builds / "gguf-q4_k") == sorted(
        ["LICENSE", "lineage.json", f"lineage/{ancestor}", "manifest.json", "model.gguf"]
    )
    manifest = json.loads((builds / "gguf-q4_k" / "manifest.json").read_text())
    assert manifest["format"] == "gguf:q4_k"
    assert manifest["runtime"] == "llama.cpp"
    assert manifest["bytes"] == (builds / "gguf-q4_k" / "model.gguf").stat().st_size
    # 64 wide: no row is a multiple of 256; the table takes Q8_0 outright, 14 others fall back.
    assert manifest["tensor_types"] == {"F32": 5, "Q5_0": 12, "Q8_0": 3}
    assert manifest["fallbacks"] == 14
    assert 0 < manifest["fidelity"]["kl"] < 1
    assert manifest["fidelity"]["data"] == "probe"
    assert sorted(p.name for p in builds.iterdir()) == sorted(
        [".lock", "gguf-f16", "gguf-q4_k", "onnx-fp32"]
    )
    assert not verify(builds / "gguf-q4_k").problems


def test_lineage_names_the_model_and_the_heldout_data(
    llama_model: Path, tmp_path: Path, edge: Command
) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"prompt": "A secret?", "response": "SECRET words"}) + "\n")
    arguments = ("build", llama_model, "--to", "gguf:q8_0", "--heldout", heldout)
    code, out, err = edge(*arguments, "--out", tmp_path / "out", "--heldout-tokens", 5, "--json")
    assert code == 0
    (built,) = json.loads(out)["builds"]
    assert built["fidelity"]["num_tokens"] == 5
    assert built["fidelity"]["data"] == "heldout"
    statement = json.loads((tmp_path / "out" / "gguf-q8_0" / "lineage.json").read_text())
    assert statement["predicate"]["stage"] == "build"
    assert [m["name"] for m in statement["predicate"]["materials"]] == ["model", "heldout_0"]
    assert statement["predicate"]["parameters"]["format"] == "gguf:q8_0"
    for path in (tmp_path / "out").rglob("*.json"):
        assert "SECRET" not in path.read_text()
    assert "SECRET" not in out + err


def test_a_finished_target_is_kept_and_a_new_one_is_added(
    llama_model: Path, tmp_path: Path, edge: Command
) -> None:
    build(llama_model, ["gguf:q8_0"], tmp_path)
    before = (tmp_path / "gguf-q8_0" / "model.gguf").stat()
    code, out, _ = edge(
        "build",
        llama_model,
        "--to",
        "gguf:q8_0",
        "--to",
        "gguf:q4_k_m",
        "--out",
        tmp_path,
        "--json",
    )
    assert code == 0
    assert [(b["format"], b["was_there"]) for b in json.loads(out)["builds"]] == [
        ("gguf:q8_0", True),
        ("gguf:q4_k", False),
    ]
    after = (tmp_path / "gguf-q8_0" / "model.gguf").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_killed_build_is_resumed_by_the_same_command(llama_model: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from edge.build import build\n"
        "def die(step, done, total):\n"
        "    if step == 'gguf:q4_0: writing' and done: os.kill(os.getpid(), 9)\n"
        "build(Path(sys.argv[1]), ['gguf:q8_0', 'gguf:q4_0'], Path(sys.argv[2]), on_progress=die)"
    )
    command = [sys.executable, "-c", code, llama_model, tmp_path]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()}
    assert "gguf-q8_0" in left
    assert "gguf-q4_0" not in left
    assert any(name.startswith(".gguf-q4_0.") for name in left)
    built = build(llama_model, ["gguf:q8_0", "gguf:q4_0"], tmp_path)
    assert [one.was_there for one in built] == [True, False]
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "gguf-q8_0", "gguf-q4_0"}


def test_another_model_or_other_settings_are_refused(
    llama_model: Path, qwen2_model: Path, builds: Path, tmp_path: Path, edge: Command
) -> None:
    shutil.copytree(builds / "gguf-f16", tmp_path / "gguf-f16")
    before = (tmp_path / "gguf-f16" / "manifest.json").read_bytes()
    code, _, err = edge("build", qwen2_model, "--to", "gguf:f16", "--out", tmp_path)
    assert code == 2
    assert "was built from another model" in err
    changed = ("--heldout-tokens", 7, "--out", tmp_path)
    code, _, err = edge("build", llama_model, "--to", "gguf:q8_0", "--to", "gguf:f16", *changed)
    assert code == 2
    assert "was built from other settings" in err
    assert (tmp_path / "gguf-f16" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["gguf-f16"]


def changed_config(place: Path, **changes: Any) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, **changes}))


def add_token(place: Path) -> None:
    definition = json.loads((place / "tokenizer.json").read_text())
    extra = {"id": 400, "content": "<extra>", "special": True, "single_word": False}
    extra |= {"lstrip": False, "rstrip": False, "normalized": False}
    for index in range(len(definition["model"]["vocab"]), 401):  # ids have no gaps
        definition["added_tokens"].append({**extra, "id": index, "content": f"<extra{index}>"})
    (place / "tokenizer.json").write_text(json.dumps(definition))


def add_head(place: Path, difference: float) -> None:
    """Store an output matrix beside the table that config.json ties it to."""
    from safetensors.torch import load_file, save_file

    weights = load_file(place / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    head[-1, -1] += difference
    save_file({**weights, "lm_head.weight": head}, place / "model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "does not exist: pass a model directory"),
    "no config": (lambda p: (p / "config.json").unlink(), "config.json is missing"),
    "config not JSON": (lambda p: (p / "config.json").write_text("{"), "config.json is not JSON"),
    "architecture": (
        lambda p: changed_config(p, architectures=["GPT2LMHeadModel"]),
        "architecture GPT2LMHeadModel cannot be converted: expected LlamaForCausalLM or",
    ),
    "quantised": (
        lambda p: changed_config(p, quantization_config={"bits": 4}),
        "the weights are quantised already",
    ),
    "rotary": (
        lambda p: changed_config(p, rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}),
        "rope type yarn cannot be converted",
    ),
    "turned in part": (
        lambda p: changed_config(p, partial_rotary_factor=0.5),
        "partial_rotary_factor is 0.5: expected 1",
    ),
    "no epsilon": (lambda p: changed_config(p, rms_norm_eps=None), "'rms_norm_eps' is missing"),
    "no context": (
        lambda p: changed_config(p, max_position_embeddings=None),
        "'max_position_embeddings' is missing",
    ),
    "no heads": (
        lambda p: changed_config(p, num_attention_heads=0),
        "'num_attention_heads' is 0: expected a number above 0",
    ),
    "all heads": (lambda p: changed_config(p, num_key_value_heads=None), "asks for [64, 64]"),
    "another head": (
        lambda p: add_head(p, 1e-3),
        "lm_head.weight is not model.embed_tokens.weight",
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut weights": (
        lambda p: os.truncate(p / "model.safetensors", 50_000),
        "model.safetensors is cut off or damaged",
    ),
    "shapes": (lambda p: changed_config(p, intermediate_size=256), "asks for [256, 64]"),
    "missing tensor": (
        lambda p: changed_config(p, num_hidden_layers=3),
        "tensor model.layers.2.input_layernorm.weight is missing",
    ),
    "extra tensors": (
        lambda p: changed_config(p, num_hidden_layers=1),
        "9 tensors have no place in a llama GGUF",
    ),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "tokenizer mismatch": (add_token, "tokenizer mismatch"),
    "no template": (
        lambda p: (p / "chat_template.jinja").unlink(),
        "has no chat template: use an instruction-tuned model",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_model_is_one_sentence_and_nothing_is_written(
    damage: str, llama_model: Path, tmp_path: Path, edge: Command
) -> None:
    model = Path(shutil.copytree(llama_model, tmp_path / "model"))
    apply, message = DAMAGE[damage]
    apply(model)
    code, out, err = edge("build", model, "--to", "gguf:f16", "--out", tmp_path / "out", "--json")
    assert (code, out) == (2, "")
    sentence = err.strip().splitlines()[-1]
    assert sentence.startswith("error: ")
    assert message in sentence
    assert str(model) in sentence
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_table_that_is_stored_twice_is_no_mistake(llama_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama_model, tmp_path / "model"))
    add_head(model, 0.0)
    assert open_source_model(model).num_parameters == open_source_model(llama_model).num_parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "gguf:q3_k"), f"--to gguf:q3_k is unknown: expected {', '.join(TARGETS)}"),
        (("--to", "q4_k"), "--to q4_k is unknown"),
        (("--to", "gguf:f16", "--heldout-tokens", 0), "--heldout-tokens is 0"),
        (("--to", "gguf:f16", "--heldout", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
    ],
)
def test_a_bad_argument_is_one_sentence_and_nothing_is_written(
    arguments: tuple[object, ...], message: str, llama_model: Path, tmp_path: Path, edge: Command
) -> None:
    code, out, err = edge("build", llama_model, *arguments, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_heldout_line_that_is_not_json_is_named(
    llama_model: Path, tmp_path: Path, edge: Command
) -> None:
    path = tmp_path / "heldout.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\nSECRET\n')
    arguments = ("--to", "gguf:f16", "--heldout", path, "--out", tmp_path / "out")
    code, _, err = edge("build", llama_model, *arguments)
    assert code == 2
    assert f"{path}:2: not JSON" in err
    assert "SECRET" not in err
    assert not (tmp_path / "out").exists()


def test_run_streams_the_answer_to_stdout(builds: Path, edge: Command) -> None:
    arguments = ("run", builds / "gguf-f16", "--prompt", "Why?", "--max-tokens", 8, "--threads", 1)
    code, out, err = edge(*arguments)
    assert (code, err) == (0, "")
    code, as_json, _ = edge(*arguments, "--json")
    answer = json.loads(as_json)
    assert out == answer["text"] + "\n"
    assert answer["num_tokens"] == len(answer["token_ids"]) == 8
    _, with_system, _ = edge(*arguments, "--system", "Be brief.", "--json")
    assert json.loads(with_system)["num_prompt_tokens"] > answer["num_prompt_tokens"]


@pytest.mark.parametrize("name", ["gguf-q4_k", "onnx-fp32"])
def test_inspect_says_what_the_build_holds(name: str, builds: Path, edge: Command) -> None:
    code, out, _ = edge("inspect", builds / name, "--json")
    found = json.loads(out)
    manifest = json.loads((builds / name / "manifest.json").read_text())
    assert code == 0
    assert {key: found[key] for key in manifest} == manifest
    assert len(found["lineage_sha256"]) == 64
    code, out, _ = edge("inspect", builds / name)
    assert f"{manifest['bytes']:,} bytes" in out
    assert found["lineage_sha256"] in out


@pytest.mark.parametrize("command", [("run", "--prompt", "x"), ("bench",), ("inspect",)])
def test_commands_on_no_build_are_one_sentence(
    command: tuple[str, ...], tmp_path: Path, edge: Command
) -> None:
    code, out, err = edge(command[0], tmp_path, *command[1:])
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path / 'manifest.json'} is missing")
    assert err.count("\n") == 1
