# mypy: disable-error-code="no-untyped-call"
"""The residual stream between the products of a layer, and which kernels these are."""

from collections.abc import Callable

import torch

from vllm_model.decoder import Linear
from vllm_model.kernels.gemv import thin_linear
from vllm_model.kernels.library_linear import library_linear
from vllm_model.kernels.library_table import choose_algorithm
from vllm_model.kernels.linear import LinearWorkspace, Scaled, fits, linear, linear_residual
from vllm_model.kernels.linear_table import Config
from vllm_model.kernels.rms_norm import rms_norm
from vllm_model.kernels.silu_mul import silu_mul

ADDING_ROWS = 512
"""From here on torch's products add to the stream themselves, which moves less memory than a norm that adds."""

Choose = Callable[[int, int, int, bool], Config | None]
"""From rows, outputs, inputs and whether a gate follows to the launch of our own product; None: the library's is faster."""


class ResidualStream:
    """Products that read the normalised stream, and products that add to it.

    The library's products have kernels for norms and gates beside them; ours have both within, and hand on what the next one
    needs for its norm. Any order of the two gives the same numbers, but for rounding.

    Args:
        residual: ``[rows, hidden]``, contiguous; updated.
        eps: Of the norms.
        choose: Whose the products are.
        workspace: For products that cut K.
        thin_rows: Up to so many rows, products are matrix-vector products.
        pdl: Programmatic dependent launch.

    Attributes:
        residual: ``[rows, hidden]``; what :meth:`add` was given last may be missing until the next read.
    """

    def __init__(
        self, residual: torch.Tensor, *, eps: float, choose: Choose, workspace: LinearWorkspace, thin_rows: int, pdl: bool
    ) -> None:
        self.residual = residual
        self._eps, self._choose, self._workspace, self._pdl = eps, choose, workspace, pdl
        self._thin_rows = thin_rows
        self._update: torch.Tensor | None = None  # not yet added
        self._scaled: Scaled | None = None  # normalised but for each row's factor

    def total(self) -> torch.Tensor:
        """The stream with all that was added, ``[rows, hidden]``."""
        return self.residual if self._update is None else self.residual + self._update

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows (int64) alone; after a read."""
        assert self._update is None
        self.residual, self._scaled = self.residual[rows], None

    def read(
        self, layer: Linear, norm_weight: torch.Tensor, *, silu: bool = False, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The product of the normalised stream, ``[rows, outputs]``; with ``silu`` gated, ``[rows, outputs / 2]``."""
        eps, pdl = self._eps, self._pdl
        if self._thin(layer) and self._update is None:
            return thin_linear(self.residual, layer.weight, norm_weight=norm_weight, eps=eps, silu=silu, pdl=pdl)
        config = self._config(self.residual, layer, silu)
        scaled, self._scaled = self._scaled, None
        if config is None:
            y = _library(self._normed(norm_weight), layer, out)
            return silu_mul(y, pdl=pdl) if silu else y
        given = self._normed(norm_weight) if scaled is None else scaled
        return linear(given, layer.weight, config, silu=silu, eps=eps, out=out, workspace=self._workspace, pdl=pdl)

    def add(self, x: torch.Tensor, layer: Linear, next_norm: torch.Tensor) -> None:
        """Add the product of ``x`` ``[rows, inputs]``; ``next_norm`` is the weight of the norm that reads the stream next."""
        if self._thin(layer):
            self.residual = thin_linear(x, layer.weight, residual=self.residual, pdl=self._pdl)
            return
        config = self._config(x, layer, False)
        if config is None and layer.bias is None and len(x) >= ADDING_ROWS:
            self.residual.addmm_(x, layer.weight.t())
            return
        if config is None:
            self._update = _library(x, layer)
            return
        self._scaled = linear_residual(
            x, layer.weight, self.residual, next_norm, config, workspace=self._workspace, pdl=self._pdl
        )

    def _thin(self, layer: Linear) -> bool:
        return len(self.residual) <= self._thin_rows and layer.bias is None

    def _config(self, x: torch.Tensor, layer: Linear, silu: bool) -> Config | None:
        if layer.bias is not None or not fits(x, layer.weight):
            return None
        outputs, inputs = layer.weight.shape
        return self._choose(len(x), outputs // (2 if silu else 1), inputs, silu)

    def _normed(self, norm_weight: torch.Tensor) -> torch.Tensor:
        update, self._update = self._update, None
        if update is None:
            return rms_norm(self.residual, norm_weight, self._eps, pdl=self._pdl)
        return rms_norm(update, norm_weight, self._eps, self.residual, pdl=self._pdl)


def _library(x: torch.Tensor, layer: Linear, out: torch.Tensor | None = None) -> torch.Tensor:
    weight = layer.weight
    if layer.bias is None:
        return library_linear(x, weight, choose_algorithm(len(x), *weight.shape), out=out)
    return layer(x) if out is None else torch.addmm(layer.bias, x, weight.t(), out=out)
