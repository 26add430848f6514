"""Entry point: `python -m loft_kernels report | selftest | memory`."""

import sys

from loft_kernels.cli import main

sys.exit(main())
