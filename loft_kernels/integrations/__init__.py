"""Training frameworks: what they need beyond a ``torch.optim.Optimizer``.

``factory`` is a way in, ``outer_clipping`` knows the frameworks' own clipping and wrappers, and
``trainer_callback``, the only one that imports a framework, logs.
"""
