"""The singular values of a change of a kernel, and its best low-rank factors; grouped kernels block by block.

A low-rank update of a convolution is a 1x1 kernel after a spatial one. As a matrix, ``(out, in_per_group * kh * kw)``, it
has at most that rank, so the truncated singular value decomposition is the best one in the Frobenius norm
(Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1, 1936).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of a kernel, for each of its groups.

    Attributes:
        left: U, ``(groups, out_per_group, full)``.
        values: singular values, ``(groups, full)``, the largest first.
        right: V^T, ``(groups, full, in_per_group * kh * kw)``, with the weighting of the inputs taken out again.
        shape: of the kernel, ``(out, in_per_group, kh, kw)``.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    shape: tuple[int, int, int, int]

    @classmethod
    def of(cls, kernel: Tensor, groups: int = 1, scales: Tensor | None = None) -> Spectrum:
        """Return the spectrum of a kernel.

        Args:
            kernel: ``(out, in_per_group, kh, kw)``, float64.
            groups: of the convolution.
            scales: root mean square of each input channel, ``(in,)``; the error that a rank leaves is then weighted by them,
                which is the error of the output where channels and pixels are uncorrelated. Unset: all are 1.
        """
        out, in_per_group, *size = kernel.shape
        matrix = kernel.reshape(groups, out // groups, in_per_group, -1)
        columns = torch.ones_like(matrix[:, :1, :, :1])
        if scales is not None:
            floor = scales.max().clamp(min=1e-300) * 1e-3  # a channel that was silent is not for free
            columns = scales.clamp(min=float(floor)).to(kernel).reshape(groups, 1, in_per_group, 1)
        left, values, right = torch.linalg.svd((matrix * columns).flatten(2), full_matrices=False)
        right = (right.unflatten(2, (in_per_group, -1)) / columns).flatten(2)
        return cls(left, values, right, (out, in_per_group, size[0], size[1]))

    @property
    def full_rank(self) -> int:
        """The largest rank of one group."""
        return self.values.shape[1]

    @property
    def unit(self) -> int:
        """Parameters of one more rank in each group."""
        out, in_per_group, height, width = self.shape
        return out + self.values.shape[0] * in_per_group * height * width

    def energies(self) -> Tensor:
        """Return what each rank keeps of the squared norm, over all groups together: ``(full,)``."""
        return self.values.square().sum(0)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the best factors of a rank for each group: A ``(groups * rank, in_per_group, kh, kw)``, B ``(out, rank, 1, 1)``.

        Their singular values are divided evenly between the two.

        Example:
            >>> kernel = torch.arange(12.0, dtype=torch.float64).reshape(2, 6, 1, 1)
            >>> down, up = Spectrum.of(kernel).factors(2)
            >>> torch.allclose(up.flatten(1) @ down.flatten(1), kernel.flatten(1))
            True
        """
        roots = self.values[:, :rank].sqrt()
        down = roots.unsqueeze(2) * self.right[:, :rank]
        up = self.left[:, :, :rank] * roots.unsqueeze(1)
        return down.reshape(-1, *self.shape[1:]), up.reshape(self.shape[0], rank, 1, 1)
