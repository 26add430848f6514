"""Training frameworks: what they need beyond a ``torch.optim.Optimizer``.

``factory`` is a way in, ``callers`` knows what frameworks do around a step, and their wrappers, and
``trainer_callback``, the only one that imports a framework, logs.
"""
