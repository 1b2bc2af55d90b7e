import json
from pathlib import Path

import pytest

from edge.manifest import BuildError, BuildManifest, read_manifest
from tests.edge.artefacts import write_build


@pytest.mark.parametrize("model", ["/", "../outside", "", "onnx/../../outside", "a\\b", "\x1b[2J"])
def test_a_model_outside_its_build_is_refused(tmp_path: Path, model: str) -> None:
    build = write_build(tmp_path / "build")
    (tmp_path / "outside").write_bytes(bytes(20_000))
    document = json.loads((build / "manifest.json").read_text())
    (build / "manifest.json").write_text(json.dumps(document | {"model": model}))
    with pytest.raises(BuildError, match="model"):
        read_manifest(build)


def test_the_whole_directory_may_be_the_model(tmp_path: Path) -> None:
    document = json.loads((write_build(tmp_path) / "manifest.json").read_text())
    assert BuildManifest.model_validate(document | {"model": "."}).model == "."
