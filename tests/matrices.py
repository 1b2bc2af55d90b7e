"""The kill matrices (`*_kill_matrix.py`): scripts, for what they kill must not be pytest itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_matrix(script: Path, *arguments: object) -> Any:
    """Run a matrix in a process of its own, on one thread; return its report."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", script, *map(str, arguments)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
