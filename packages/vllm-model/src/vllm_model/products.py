"""The products of a layer on a CUDA device: by the library with kernels for norms and gate, or by our own with both fused."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_model.kernels.linear import LinearConfig, LinearWorkspace, Scaled, linear, linear_residual
from vllm_model.kernels.rms_norm import rms_norm
from vllm_model.kernels.silu_mul import silu_mul


@dataclass(frozen=True, slots=True)
class Products:
    """Whose the four products of a layer are: None is the library's."""

    qkv: LinearConfig | None = None
    o: LinearConfig | None = None
    gate_up: LinearConfig | None = None
    down: LinearConfig | None = None


@dataclass(slots=True)
class ResidualStream:
    """The residual stream, and what the next norm has to work on.

    Attributes:
        residual: ``[rows, hidden]``.
        pending: What the last product left: rows to be added first, or rows that lack only the factor of their norm.
        eps: Of the norms.
        workspace: For products that cut K.
        pdl: Programmatic dependent launch.
    """

    residual: torch.Tensor
    eps: float
    workspace: LinearWorkspace
    pdl: bool
    pending: torch.Tensor | Scaled | None = None

    def normed(self, norm_weight: torch.Tensor) -> torch.Tensor:
        """The normalised stream ``[rows, hidden]``."""
        if isinstance(self.pending, torch.Tensor):
            update, self.pending = self.pending, None
            return rms_norm(update, norm_weight, self.eps, self.residual, pdl=self.pdl)
        return rms_norm(self.residual, norm_weight, self.eps, pdl=self.pdl)

    def read(
        self,
        weight: torch.Tensor,
        norm_weight: torch.Tensor,
        config: LinearConfig | None,
        *,
        silu: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A product of the normalised stream, with ``silu`` the gate behind it."""
        if config is None:
            x = self.normed(norm_weight)
            y = F.linear(x, weight) if out is None else torch.mm(x, weight.t(), out=out)
            return silu_mul(y, pdl=self.pdl) if silu else y
        given = self.pending if isinstance(self.pending, Scaled) else self.normed(norm_weight)
        return linear(given, weight, config, silu=silu, eps=self.eps, out=out, workspace=self.workspace, pdl=self.pdl)

    def add(self, x: torch.Tensor, weight: torch.Tensor, next_norm: torch.Tensor, config: LinearConfig | None) -> None:
        """``residual += x @ weight.T``, now or with the next norm, whose weight is given."""
        if config is None:
            self.pending = F.linear(x, weight)
        else:
            self.pending = linear_residual(x, weight, self.residual, next_norm, config, workspace=self.workspace, pdl=self.pdl)
