"""Small training problems and adapters shared by the tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


class TinyLoRA(nn.Module):
    """The smallest module that carries a LoRA pair: W = base + scaling * B @ A.

    Args:
        base: frozen weight, m x n.
        lora_b: initial B, m x r.
        lora_a: initial A, r x n.
        scaling: the adapter's multiplier.
    """

    def __init__(self, base: Tensor, lora_b: Tensor, lora_a: Tensor, scaling: float = 1.0) -> None:
        """Copy the tensors."""
        super().__init__()
        self.scaling = scaling
        self.register_buffer("base", base.detach().clone())
        self.lora_A = nn.Parameter(lora_a.detach().clone())
        self.lora_B = nn.Parameter(lora_b.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The effective weight, m x n, differentiable in both factors."""
        return self.base + self.scaling * self.lora_B @ self.lora_A


@dataclass(frozen=True)
class LeastSquares:
    """Least squares with fresh inputs and label noise at every step, a function of W.

    Args:
        inputs: steps x samples x n.
        targets: steps x samples x m.
        factor: multiplies the loss.
    """

    inputs: Tensor
    targets: Tensor
    factor: float = 1.0

    @classmethod
    def make(cls, m: int, n: int, steps: int, seed: int, noise: float = 0.5) -> LeastSquares:
        """Draw a problem in fp64."""
        gen = generator(seed)
        samples = 32
        truth = normal(gen, m, n)
        inputs = normal(gen, steps, samples, n)
        targets = inputs @ truth.mT + noise * normal(gen, steps, samples, m)
        return cls(inputs, targets)

    @property
    def steps(self) -> int:
        """Number of steps that were drawn."""
        return self.inputs.shape[0]

    def loss(self, weight: Tensor, k: int) -> Tensor:
        """Return the loss of step k."""
        inputs, targets = self.inputs[k], self.targets[k]
        residual = inputs @ weight.mT - targets
        return self.factor * 0.5 * residual.square().sum() / inputs.shape[0]

    def grad(self, weight: Tensor, k: int) -> Tensor:
        """Return the gradient of step k in closed form, m x n."""
        inputs, targets = self.inputs[k], self.targets[k]
        residual = inputs @ weight.mT - targets
        return self.factor * residual.mT @ inputs / inputs.shape[0]

    def scaled(self, factor: float) -> LeastSquares:
        """Return the problem with its loss multiplied by ``factor``."""
        return replace(self, factor=self.factor * factor)

    def permuted(self, rows: Tensor, cols: Tensor) -> LeastSquares:
        """Return the problem whose solution has its rows and columns permuted."""
        return replace(self, inputs=self.inputs[..., cols], targets=self.targets[..., rows])

    def to(self, dtype: torch.dtype) -> LeastSquares:
        """Return the problem in another precision."""
        return replace(self, inputs=self.inputs.to(dtype), targets=self.targets.to(dtype))


def generator(seed: int) -> torch.Generator:
    """Return a CPU generator, so that no test depends on the global one."""
    return torch.Generator().manual_seed(seed)


def normal(gen: torch.Generator, *shape: int) -> Tensor:
    """Return standard normal fp64 numbers."""
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


def make_adapter(m: int, n: int, r: int, seed: int, start: str = "general") -> TinyLoRA:
    """Return an fp64 adapter with random base and A, and B random or zero.

    Args:
        m: rows of W.
        n: columns of W.
        r: rank.
        seed: of the random numbers.
        start: "general" (random B) or "zero" (LoRA's usual B = 0).
    """
    gen = generator(seed)
    base, lora_a, lora_b = normal(gen, m, n), normal(gen, r, n), normal(gen, m, r)
    if start == "zero":
        lora_b = torch.zeros_like(lora_b)
    # alpha = 16: a scaling other than 1, so that a lost factor of s shows.
    return TinyLoRA(base, lora_b / r**0.5, lora_a / r**0.5, scaling=16 / r)


def conditioned(size: int, condition: float, seed: int) -> Tensor:
    """Return a general square matrix with singular values spread log-evenly over 1..condition."""
    gen = generator(seed)
    left, _ = torch.linalg.qr(normal(gen, size, size))
    right, _ = torch.linalg.qr(normal(gen, size, size))
    exponents = torch.linspace(0, 1, size, dtype=torch.float64)
    return left * condition**exponents @ right


def relative_distance(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected| (Frobenius); 0 where both vanish."""
    error = (actual.double() - expected.double()).norm()
    return float(error / expected.double().norm()) if error > 0 else float(error)


def displacement_error(actual: Tensor, expected: Tensor, start: Tensor) -> float:
    """Return the distance of two end points relative to the way travelled from ``start``."""
    return relative_distance(actual.double() - start.double(), expected.double() - start.double())


def check_close(actual: Tensor, expected: Tensor, limit: float, what: str) -> None:
    """Fail, with the worst element, if the relative distance exceeds ``limit``."""
    error = relative_distance(actual, expected)
    if not error <= limit:
        raise AssertionError(_describe(actual, expected, error, limit, what))


def check_displacement(
    actual: Tensor, expected: Tensor, start: Tensor, limit: float, what: str
) -> None:
    """Fail, with the worst element, if two end points differ by more than ``limit`` of the way."""
    error = displacement_error(actual, expected, start)
    if not error <= limit:
        raise AssertionError(_describe(actual, expected, error, limit, what))


def _describe(actual: Tensor, expected: Tensor, error: float, limit: float, what: str) -> str:
    """Return the message of a failed comparison."""
    difference = (actual.double() - expected.double()).abs()
    worst = int(difference.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), difference.shape))
    return (
        f"{what}: relative error {error:.2e} > {limit:.0e}; max |difference| "
        f"{float(difference.flatten()[worst]):.2e} at {index}: "
        f"{float(actual.flatten()[worst]):.9g} against {float(expected.flatten()[worst]):.9g}"
    )
