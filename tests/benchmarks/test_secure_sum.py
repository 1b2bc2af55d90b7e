import json
import subprocess
import sys

import pytest

from benchmarks.processes import ROOT


@pytest.mark.slow
def test_the_costs_of_a_secure_sum_are_one_json_line() -> None:
    options = ["--geometry", "smollm2", "--cohorts", "3", "--repeats", "1"]
    command = [sys.executable, "-m", "benchmarks.secure_sum", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    figures = json.loads(line)
    # 16 bits of a coordinate are 24 in the sum of three; keys and shares are small beside them.
    vector = 3 * figures["num_coordinates"]
    assert vector < figures["site_bytes_3"] < vector + 10_000
    assert {"site_cpu_s_3", "server_cpu_s_3", "server_dropout_cpu_s_3"} <= figures.keys()
