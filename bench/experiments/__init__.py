"""The paper's experiments, each one command: `python -m bench experiments NAME`."""

from __future__ import annotations

import sys
from pathlib import Path

# The demo's models and texts are the experiments' too. At the end of the path, so that nothing
# there can stand in front of an installed module.
sys.path.append(str(Path(__file__).parents[2] / "examples"))


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    # Imported late: sections and plots take no torch.
    from bench.experiments import command

    command.main(argv)
