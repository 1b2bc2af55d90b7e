import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.canned_grid import write_base_model, write_reply
from benchmarks.geometry import GEOMETRIES, Geometry, site_adapter
from benchmarks.processes import ROOT
from federation.base_model import weight_shapes
from federation.header import DIGEST_BYTES
from federation.wire import encode, open_update, payload_bytes

TINY = Geometry(layers=2, hidden=64, keys=32, mlp=128)


def test_the_7b_geometry_is_the_one_that_the_figures_are_quoted_for() -> None:
    geometry = GEOMETRIES["7b"]
    assert geometry.num_parameters() == 40_370_176
    assert len(geometry.shapes()) == 196
    assert payload_bytes(geometry.shapes(), 16, "float32") == 161_480_704


def test_a_server_reads_the_shapes_of_a_base_model_without_weights(tmp_path: Path) -> None:
    write_base_model(tmp_path / "base", TINY)
    shapes = {
        name.removesuffix(".weight"): s for name, s in weight_shapes(tmp_path / "base").items()
    }
    assert shapes == TINY.shapes()


def test_canned_replies_are_valid_updates_of_sites_that_share_no_row(tmp_path: Path) -> None:
    canned = tmp_path / "canned"
    message = encode(site_adapter(TINY, 1), dtype="float32", base_model="b")
    canned.write_bytes(message)
    start = len(message) - DIGEST_BYTES - payload_bytes(TINY.shapes(), 16, "float32")
    rows, digests = [], set()
    for site in range(3):
        assert write_reply(canned, start, 4 * 1009 * site, tmp_path / "reply") == len(message)
        (tmp_path / "update").write_bytes(np.load(tmp_path / "reply").tobytes())
        update = open_update(tmp_path / "update")
        assert update.shapes() == TINY.shapes()
        digests.add(update.sha256)
        rows.append(update.read("model.layers.1.mlp.up_proj").b_OR.mT)
    assert len(digests) == 3
    assert torch.linalg.matrix_rank(torch.cat(rows).double()) == 48


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "options", "figures"),
    [
        (
            "benchmarks.aggregation",
            ["--repeats", "1", "--no-nvflare"],
            {"exact_cpu_s", "exact_tail_cpu_s", "flwr_cpu_s", "exact_extra_peak_bytes"},
        ),
        (
            "benchmarks.rounds",
            [],
            {"payload_bytes", "round_s", "server_extra_peak_bytes", "wire_ratio"},
        ),
    ],
)
def test_a_benchmark_prints_its_figures_as_one_json_line(
    module: str, options: list[str], figures: set[str]
) -> None:
    command = [sys.executable, "-m", module, "--geometry", "smollm2", "--sites", "2", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert figures <= json.loads(line).keys()
