"""Start several processes as torchrun does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def torchrun(script: Path, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a script in several processes of this machine and return what they wrote."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    child = Path(__file__).with_name("torchrun_child.py")
    return subprocess.run(
        [*launcher, f"--nproc-per-node={processes}", str(child), str(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
