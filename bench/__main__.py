"""Entry point: `python -m bench COMMAND ...`."""

import sys
from importlib import import_module

COMMANDS = (
    "run",
    "host",
    "roofline",
    "end-to-end",
    "accuracy",
    "curves",
    "experiments",
    "report",
    "sanitize",
    "tiles",
)

if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
    sys.exit(f"usage: python -m bench {{{','.join(COMMANDS)}}} [options] (--help lists them)")
import_module(f"bench.{sys.argv[1].replace('-', '_')}").main(sys.argv[2:])
