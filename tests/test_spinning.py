from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOW = """
import os
from llm_magic.backends.accelerate.backend import TransformersBackend
TransformersBackend().accelerators(False)
assert "torch" in __import__("sys").modules
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch uses GNU OpenMP on Linux")
@pytest.mark.parametrize(
    ("user", "spins", "left"), [({}, "20000", "None"), ({"GOMP_SPINCOUNT": "7"}, "7", "7")]
)
def test_torchs_threads_spin_shortly_unless_the_user_says_otherwise(user, spins, left) -> None:
    inherited = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = inherited | {"OMP_DISPLAY_ENV": "verbose"} | user
    run = subprocess.run(
        [sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=True
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in run.stderr
    assert run.stdout.strip() == left
