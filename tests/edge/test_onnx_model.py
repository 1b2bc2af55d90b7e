import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM

from edge.build import build
from edge.onnx_model import OnnxBuilderError, build_onnx, int4_algorithm
from edge.runtime import open_runtime
from edge.vocabulary import load_tokenizer
from tests.edge.conftest import TEXT


def onnx_logits(path: Path, ids: list[int]) -> np.ndarray:
    """Run the graph with plain onnxruntime: another road than the runtime that we ship."""
    session = onnxruntime.InferenceSession(path / "model.onnx")
    feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    for node in session.get_inputs():
        if node.name.startswith("past"):
            feeds[node.name] = np.zeros((1, 2, 0, 16), np.float32)  # no past of 2 heads, 16 wide
    return session.run(["logits"], feeds)[0][0]


def check_against_torch(model: Path, onnx: Path) -> None:
    ids = load_tokenizer(model)(" ".join(TEXT * 3))["input_ids"][:300]
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        p = torch.log_softmax(source(torch.tensor([ids])).logits[0].double(), dim=-1)
    q = torch.log_softmax(torch.from_numpy(onnx_logits(onnx, ids)).double(), dim=-1)
    assert (p.exp() * (p - q)).sum(dim=-1).max() <= 1e-8


def test_fp32_onnx_of_a_llama_gives_the_logits_of_torch(llama_model: Path, builds: Path) -> None:
    check_against_torch(llama_model, builds / "onnx-fp32" / "onnx")


def test_fp32_onnx_of_a_qwen2_gives_the_logits_of_torch(qwen2_model: Path, tmp_path: Path) -> None:
    build_onnx(qwen2_model, "fp32", tmp_path)
    check_against_torch(qwen2_model, tmp_path)


def test_logits_in_pieces_are_those_of_the_whole_graph(llama_model: Path, builds: Path) -> None:
    ids = load_tokenizer(llama_model)(" ".join(TEXT * 2))["input_ids"][:150]
    wanted = [0, 63, 64, 100, 149]
    with open_runtime(builds / "onnx-fp32", threads=1) as runtime:
        found = np.stack([row.copy() for row in runtime.logits(ids, wanted)])
    expected = onnx_logits(builds / "onnx-fp32" / "onnx", ids)[wanted]
    assert np.allclose(found, expected, atol=1e-4)


def test_no_file_of_the_build_names_a_place_on_this_machine(
    llama_model: Path, builds: Path
) -> None:
    places = [str(llama_model).encode(), str(builds).encode(), str(Path.home()).encode() + b"/"]
    places += [b"/tmp/", str(Path(__file__).parents[2]).encode()]
    files = [path for path in builds.rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert not [place for place in places if place in content], path


@pytest.mark.slow
def test_a_failure_of_the_builder_is_one_sentence(llama_model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(llama_model, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["Unknown"]}))
    (tmp_path / "out").mkdir()
    with pytest.raises(
        OnnxBuilderError, match="could not make onnx:fp32 of .*exit code 1"
    ) as error:
        build_onnx(broken, "fp32", tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "family",
    [
        "llama_model",
        pytest.param("llama3_model", marks=pytest.mark.slow),
        pytest.param("qwen2_model", marks=pytest.mark.slow),
    ],
)
def test_int4_onnx_is_built_and_near_its_source(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    targets = ["gguf:q4_0", "onnx:int4"]
    plain, built = build(request.getfixturevalue(family), targets, tmp_path)
    assert built.manifest.tensor_types["int4"] > 0
    # Mean nats from the source on the built-in probes. Plain 4-bit blocks lose two to three times
    # as much as 4 bits with 8 where it matters: a wrong scale or a lost mix would show.
    assert 0 < built.manifest.fidelity.kl < 0.6 * plain.manifest.fidelity.kl
    assert built.manifest.bytes < 0.6 * 4 * built.manifest.num_parameters + 100_000


@pytest.mark.parametrize(
    ("hidden", "intermediate", "heads", "head_dim", "algorithm"),
    [
        (576, 1536, 9, 64, "k_quant_mixed"),  # SmolLM2-135M
        (480, 640, 6, 64, "rtn_last"),  # its student at 0.43x: 15 blocks in a row
        (512, 1376, 8, 64, "rtn_last"),
        (512, 1408, 8, None, "k_quant_mixed"),
    ],
)
def test_int4_avoids_the_rows_that_the_builder_cannot_pack(
    hidden: int, intermediate: int, heads: int, head_dim: int | None, algorithm: str
) -> None:
    config = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "head_dim": head_dim,
    }
    assert int4_algorithm(config) == algorithm
