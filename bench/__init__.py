"""Benchmarks: commands measure and write JSON lines; `python -m bench report` reads them."""
