import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edge.build import build
from edge.errors import UserError
from edge.llama import Llama, LlamaError, load_library
from edge.manifest import BuildError, BuildManifest, read_manifest
from edge.runtime import LlamaRuntime, Runtime, load_model, open_runtime
from edge.vocabulary import load_tokenizer
from tests.edge.test_gguf import TRICKY

QUESTION = [{"role": "user", "content": "The patient's heart on day 345?"}]


@pytest.fixture(scope="module", params=["gguf-f16", "onnx-fp32"])
def runtime(builds: Path, request: pytest.FixtureRequest) -> Runtime:
    with open_runtime(builds / request.param, threads=1) as opened:
        yield opened


def greedy_tokens_of_torch(model: Path, messages: list[dict[str, str]], count: int) -> list[int]:
    tokenizer = load_tokenizer(model)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    chosen: list[int] = []
    with torch.no_grad():
        while len(chosen) < count:
            logits = source(torch.tensor([ids + chosen])).logits[0, -1]
            if int(logits.argmax()) == tokenizer.eos_token_id:
                break
            chosen.append(int(logits.argmax()))
    return chosen


def test_greedy_tokens_are_those_of_torch(runtime: Runtime, llama_model: Path) -> None:
    answer = runtime.generate(QUESTION, 20)
    assert answer.token_ids == greedy_tokens_of_torch(llama_model, QUESTION, 20)
    assert answer.num_tokens == len(answer.token_ids) == 20
    assert answer.finish == "length"
    assert answer.first_token_ms > 0
    assert answer.decode_tokens_per_s > 0


def test_conversations_have_the_token_ids_of_transformers(
    runtime: Runtime, llama_model: Path
) -> None:
    tokenizer = load_tokenizer(llama_model)
    # onnxruntime-genai's own tokenizer does not cut digits: "  12" has other tokens there.
    for text in ("a  12 and\n\n3", *TRICKY):
        messages = [{"role": "system", "content": text}, {"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        expected = tokenizer.encode(rendered, add_special_tokens=False)
        assert runtime.encode_chat(messages) == expected


def test_text_comes_in_pieces_that_make_the_whole(runtime: Runtime, llama_model: Path) -> None:
    tokenizer = load_tokenizer(llama_model)
    for seed in range(40):
        pieces: list[str] = []
        answer = runtime.generate(QUESTION, 6, 2.0, pieces.append, seed)
        assert "".join(pieces) == answer.text
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)


def test_an_earlier_answer_leaves_no_trace(runtime: Runtime) -> None:
    first = runtime.generate(QUESTION, 10)
    runtime.generate([{"role": "user", "content": "something else"}], 5)
    assert runtime.generate(QUESTION, 10).token_ids == first.token_ids


def test_draws_depend_on_the_seed_alone(runtime: Runtime) -> None:
    drawn = {
        seed: [runtime.generate(QUESTION, 16, 1.5, seed=seed).token_ids for _ in range(2)]
        for seed in (1, 2)
    }
    assert drawn[1][0] == drawn[1][1]
    assert drawn[2][0] == drawn[2][1]
    assert drawn[1][0] != drawn[2][0]


def test_what_does_not_fit_the_context_is_refused(runtime: Runtime) -> None:
    with pytest.raises(UserError, match="do not fit the context of 1024"):
        runtime.generate(QUESTION, 1020)
    with pytest.raises(UserError, match="max_tokens is 0"):
        runtime.generate(QUESTION, 0)


def test_an_end_of_turn_ends_the_answer(llama_model: Path, tmp_path: Path) -> None:
    """The output matrix is the embedding table: scale the end token's row up until it wins."""
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(llama_model, tmp_path / "model"))
    tokens = greedy_tokens_of_torch(model, QUESTION, 6)
    config = json.loads((model / "config.json").read_text())
    # The fourth token of the answer becomes the end token, by exchanging two rows.
    stop = next(i for i, token in enumerate(tokens) if i >= 3 and token not in tokens[:i])
    weights = load_file(model / "model.safetensors")
    config["tie_word_embeddings"] = False
    head = weights["model.embed_tokens.weight"].clone()
    head[[2, tokens[stop]]] = head[[tokens[stop], 2]]
    save_file({**weights, "lm_head.weight": head}, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(config))
    build(model, ["gguf:f32"], tmp_path / "out")
    with open_runtime(tmp_path / "out" / "gguf-f32", threads=1) as runtime:
        answer = runtime.generate(QUESTION, 20)
        assert (answer.finish, answer.token_ids) == ("stop", tokens[:stop])
        assert runtime.generate(QUESTION, 20, ignore_end=True).num_tokens == 20


def test_an_answer_of_no_token_took_its_time(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = runtime.generate(QUESTION, 1).token_ids[0]
    if isinstance(runtime, LlamaRuntime):
        monkeypatch.setattr(runtime._llama, "is_end", lambda token: token == first)
    else:
        monkeypatch.setattr(runtime._tokenizer, "end_ids", frozenset([first]))
    answer = runtime.generate(QUESTION, 5)
    assert (answer.finish, answer.num_tokens) == ("stop", 0)
    assert answer.first_token_ms > 0


def test_logits_that_are_not_numbers_are_no_answer(builds: Path, tmp_path: Path) -> None:
    """A NaN in the last norm makes every logit one; the likeliest of them is still some token."""
    import gguf
    import onnx
    from onnx import numpy_helper

    for name in ("gguf-f16", "onnx-fp32"):
        shutil.copytree(builds / name, tmp_path / name)
    path = tmp_path / "gguf-f16" / "model.gguf"
    reader = gguf.GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.name == "output_norm.weight").data[:] = np.nan
    reader.data.flush()
    graph = tmp_path / "onnx-fp32" / "onnx" / "model.onnx"
    model = onnx.load(graph)
    norm = next(t for t in model.graph.initializer if "final_norm" in t.name)
    broken = np.full_like(numpy_helper.to_array(norm), np.nan)
    norm.CopyFrom(numpy_helper.from_array(broken, norm.name))
    (graph.parent / "model.onnx.data").unlink()
    onnx.save(model, graph, save_as_external_data=True, location="model.onnx.data")
    for name, place in (("llama.cpp", path), ("onnxruntime-genai", graph.parent)):
        with load_model(name, place, 1024, 1) as opened:
            for temperature in (0.0, 1.0):
                with pytest.raises(BuildError, match="not finite"):
                    opened.generate(QUESTION, 4, temperature)


def test_a_build_is_opened_where_its_link_pointed_first(
    builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link is turned between the reading of the manifest and of the model."""
    current = tmp_path / "current"
    current.symlink_to(builds / "gguf-f16")

    def read_and_turn(build: Path) -> BuildManifest:
        manifest = read_manifest(build)
        current.unlink()
        current.symlink_to(tmp_path / "nowhere")
        return manifest

    monkeypatch.setattr("edge.runtime.read_manifest", read_and_turn)
    with open_runtime(current, threads=1) as opened:
        assert opened.generate(QUESTION, 2).num_tokens == 2


def test_a_runtime_imports_no_torch_and_no_transformers(builds: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edge.runtime import open_runtime\n"
        "for name in ('gguf-f16', 'onnx-fp32'):\n"
        "    with open_runtime(Path(sys.argv[1]) / name) as runtime:\n"
        "        runtime.generate([{'role': 'user', 'content': 'SECRET'}], 2)\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, builds], capture_output=True, text=True, check=False
    )
    # Nor does loading or answering write a word.
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def agree(build: Path) -> None:
    """Let the manifest's size follow a damaged file, so that the runtime itself meets it."""
    manifest = json.loads((build / "manifest.json").read_text())
    manifest["bytes"] = sum(path.stat().st_size for path in build.glob("model.gguf"))
    (build / "manifest.json").write_text(json.dumps(manifest))


def test_a_damaged_build_is_one_sentence(gguf_build: Path) -> None:
    cut(gguf_build / "model.gguf")
    with pytest.raises(BuildError, match="a file is missing or cut off"):
        open_runtime(gguf_build)
    agree(gguf_build)
    with pytest.raises(BuildError, match=r"model.gguf cannot be loaded by llama.cpp \(.+\)"):
        open_runtime(gguf_build)
    (gguf_build / "model.gguf").write_bytes(b"not a model at all")
    agree(gguf_build)
    with pytest.raises(BuildError, match="cannot be loaded by llama.cpp"):
        open_runtime(gguf_build)
    (gguf_build / "model.gguf").unlink()
    with pytest.raises(BuildError, match="a file is missing or cut off"):
        open_runtime(gguf_build)


def test_a_damaged_onnx_build_is_one_sentence(builds: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(builds / "onnx-fp32", tmp_path / "copy"))
    graph = copy / "onnx" / "model.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    with pytest.raises(BuildError, match="cannot be loaded by onnxruntime-genai") as error:
        open_runtime(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "not JSON"), ("[]", "damaged"), ('{"format": "gguf:f16"}', "damaged")],
)
def test_a_damaged_manifest_is_one_sentence(content: str, message: str, gguf_build: Path) -> None:
    (gguf_build / "manifest.json").write_text(content)
    with pytest.raises(BuildError, match=message) as error:
        read_manifest(gguf_build)
    assert "\n" not in str(error.value)


def test_a_missing_build_is_one_sentence(builds: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="does not exist"):
        open_runtime(tmp_path / "nothing")
    with pytest.raises(BuildError, match="OUT/gguf-q4_k, not OUT"):
        open_runtime(builds)


class Library:
    """llama.cpp with some functions that behave as we say."""

    def __init__(self, real: Any, **changes: Callable[..., Any]) -> None:
        self.real = real
        vars(self).update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def test_llama_refuses_what_outgrows_its_context(builds: Path) -> None:
    with (
        Llama(builds / "gguf-f16" / "model.gguf", context_tokens=256, threads=1) as llama,
        pytest.raises(LlamaError, match="257 tokens do not fit the context of 256"),
    ):
        list(llama.decode([5] * 257, [0]))


def test_an_old_complaint_of_llama_is_not_said_again(
    builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model at all")
    with pytest.raises(LlamaError, match=r"bad\.gguf cannot be loaded by llama\.cpp \((?!it gave)"):
        Llama(tmp_path / "bad.gguf")
    library = Library(load_library(), llama_init_from_model=lambda *_: None)
    monkeypatch.setattr("edge.llama.load_library", lambda: library)
    with pytest.raises(LlamaError, match=r"made no context \(it gave no reason\)"):
        Llama(builds / "gguf-f16" / "model.gguf", threads=1)


def test_parameters_laid_out_in_another_way_leave_no_memory_behind(
    builds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[str] = []
    real = load_library()

    def free(name: str) -> Callable[[int], None]:
        return lambda handle: (freed.append(name), getattr(real, name)(handle))[1]

    changes = {name: free(name) for name in ("llama_free", "llama_model_free")}
    library = Library(real, llama_n_ubatch=lambda _context: 9999, **changes)
    monkeypatch.setattr("edge.llama.load_library", lambda: library)
    with pytest.raises(LlamaError, match="lays out llama.cpp's parameters in another way"):
        Llama(builds / "gguf-f16" / "model.gguf", threads=1)
    assert freed == ["llama_free", "llama_model_free"]


@pytest.mark.slow
def test_smollm2_in_float16_answers_as_torch_does(tmp_path: Path) -> None:
    fetched = Path(__file__).parents[2] / "demo" / "models" / "base"
    model = Path(os.environ.get("FEDGE_SMOLLM2", fetched))
    if not (model / "config.json").is_file():
        pytest.skip("set FEDGE_SMOLLM2 or run examples/four_institutions/fetch.py first")
    (built,) = build(model, ["gguf:f16"], tmp_path)
    assert built.manifest.fidelity.kl < 1e-4
    with open_runtime(built.directory) as runtime:
        for text in ("What is the capital of France?", "Explain why the sky is blue."):
            messages = [{"role": "user", "content": text}]
            answer = runtime.generate(messages, 20)
            assert answer.token_ids == greedy_tokens_of_torch(model, messages, 20)
