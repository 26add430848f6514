"""Run a script in one process of several, and leave without tearing down.

    python torchrun_child.py SCRIPT [ARGUMENT ...]

torch joins gloo's threads with Python's lock held, and such a thread may be waiting for that lock:
seen in torch 2.13, rarely, when the last collective of a process has just ended.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch.distributed as dist

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    dist.destroy_process_group = lambda *_: dist.barrier()
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
