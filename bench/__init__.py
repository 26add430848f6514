"""Benchmarks: `python -m bench run` measures and writes JSON lines, nothing else."""
