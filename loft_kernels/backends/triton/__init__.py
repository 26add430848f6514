"""Fused kernels in Triton: one launch per stage for all pairs of a bucket.

In the order of a step: ``gram`` -> ``solve`` -> ``basis`` (which also takes the decision) ->
``moments`` -> ``operands`` (what the hot loop streams) -> ``update``. Arithmetic that stages share:
``centre`` (how the second moment is split before it is rounded), ``residual``, ``products``,
``packing``.

``*_hopper`` is a stage for compute capability 9.0, in Gluon: the hot loop is ``update_hopper`` up
to rank 16, ``update_hopper_wide`` up to 32 and ``update_hopper_broad`` up to 64, where
``moments_hopper`` takes the place of ``moments`` and ``operands`` (``transport_hopper`` is what it
does to all rows, ``idle_hopper`` to those that stay, ``operands_hopper`` what it writes).
``*_wide`` is what a stage does above rank 64, where squares are cut into blocks (``gram_wide``
above rank 32).

``step`` launches everything: ``tables`` holds what the kernels read to find their work, ``layout``
the memory they share, ``bucket`` the launches of one set of pairs, ``launch`` how they are made
without Triton's binder, ``configs`` the tile sizes.
"""
