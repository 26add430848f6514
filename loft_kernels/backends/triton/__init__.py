"""Fused kernels in Triton: one launch per stage for all pairs of a bucket.

In the order of a step: ``gram`` -> ``solve`` -> ``basis`` (which also takes the decision) ->
``moments`` -> ``update``. ``tables`` holds what the kernels read to find their work, ``configs``
the tile sizes, ``step`` launches everything. Above rank 64, ``*_wide`` cut squares into blocks.
"""
