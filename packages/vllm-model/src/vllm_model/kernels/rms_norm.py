# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803  constexpr arguments are upper case in Triton
"""Root mean square normalisation, with the residual addition before it."""

import torch
import triton
import triton.language as tl

from vllm_model.kernels._launch import launch, launch_options, power_of_two, wait_for_previous, with_room


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [tokens, width]
    residual_ptr,  # [tokens, width], updated
    weight_ptr,  # [width]
    out_ptr,  # [tokens, width]
    x_stride,
    residual_stride,
    out_stride,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0)
        # Rounded before it is normalised: the fused and the unfused path then agree to the bit.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * residual_stride + column, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    tl.store(out_ptr + row * out_stride + column, (wide * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """``x / rms(x) * weight``, or with ``residual``: ``residual += x`` in place, and the norm of that sum.

    Args:
        x: ``[tokens, width]`` bf16, fp16 or float32, rows contiguous; any width up to 65,536.
        weight: ``[width]``.
        eps: Added to the mean square.
        residual: ``[tokens, width]``, rows contiguous, updated in place.
        out: Where to write; may be ``x``. A new tensor when None.
        pdl: Programmatic dependent launch.

    Returns:
        ``[tokens, width]`` of the type of ``x``. Sums are float32.

    Raises:
        ValueError: The width is over 65,536, or a row is not contiguous.
    """
    tokens, width = x.shape
    if width > 65536 or x.stride(1) != 1 or (residual is not None and residual.stride(1) != 1):
        raise ValueError(f"rms_norm takes contiguous rows of at most 65536, got {tuple(x.shape)} with strides {x.stride()}")
    if out is None:
        out = with_room(x, tokens, width)
    block = power_of_two(width)
    if tokens:
        launch(
            _rms_norm_kernel,
            (tokens,),
            x,
            x if residual is None else residual,
            weight,
            out,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            width,
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            PDL=pdl,
            num_warps=min(max(block // 512, 1), 16),
            **launch_options(pdl),
        )
    return out


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`rms_norm` computes, in the type of its arguments: ``(normed, residual + x)``."""
    total = x if residual is None else x + residual
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight, total
