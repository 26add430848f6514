"""Entry point: `python -m bench run ...`."""

import sys

from bench.run import main

if len(sys.argv) < 2 or sys.argv[1] != "run":
    sys.exit("usage: python -m bench run [options] (--help lists them)")
main(sys.argv[2:])
