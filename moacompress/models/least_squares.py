"""Weighted ridge regression in closed form, for repairs of weights and for gates.

D = argmin sum_i w_i |r_i - x_i D|^2 + penalty * m * |D|^2,   m the mean diagonal of A = sum_i w_i x_i^T x_i
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

MAX_BYTES = 2 * 2**30
"""Memory of the sums of problems that are gathered in one pass over the samples."""
ROWS = 1024
"""Rows whose products are summed in float32 before they are added up in float64."""


class Normal:
    """Sums of a weighted least-squares problem, `A = sum_i w_i x_i x_i^T` and `C = sum_i w_i x_i r_i^T`, in float64."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)

    def add(self, x: Tensor, residual: Tensor, weights: Tensor) -> None:
        """Adds rows: x `[rows, inputs]`, residuals `[rows, outputs]`, weights `[rows]`."""
        for first in range(0, len(x), ROWS):
            part = slice(first, first + ROWS)
            rows = x[part].float()
            weighted = (rows * weights[part, None].float()).T
            self.gram += weighted @ rows
            self.cross += weighted @ residual[part].float()

    def solve(self, penalty: float) -> Tensor:
        """Returns D, float64 `[inputs, outputs]`; `penalty` is a share of the mean diagonal of A."""
        ridge = penalty * self.gram.diagonal().mean()
        if ridge <= 0:
            return torch.zeros_like(self.cross)
        system = self.gram + ridge * torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(system))


Problem = TypeVar("Problem")


def in_memory(problems: Sequence[Problem], inputs: int) -> list[Sequence[Problem]]:
    """Returns problems in groups for which there is memory together: each has two sums of `inputs` squared."""
    size = max(1, MAX_BYTES // (2 * 8 * inputs * inputs))
    return [problems[first : first + size] for first in range(0, len(problems), size)]
