# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803  constexpr arguments are upper case in Triton
"""The gate of a gated MLP: ``silu(gate) * up``."""

import torch
import triton
import triton.language as tl

from vllm_model.kernels._launch import launch, launch_options, power_of_two, wait_for_previous, with_room


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, x_stride, out_stride, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    wait_for_previous(PDL)
    gate = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + width + column, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * out_stride + column, value.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(x: torch.Tensor, out: torch.Tensor | None = None, *, pdl: bool = False) -> torch.Tensor:
    """``silu(x[:, :width]) * x[:, width:]`` in float32, rounded once.

    Args:
        x: ``[tokens, 2 * width]`` bf16, fp16 or float32, rows contiguous: gate, then up.
        out: ``[tokens, width]``; a new tensor when None.
        pdl: Programmatic dependent launch.

    Raises:
        ValueError: A row of ``x`` is odd or not contiguous.
    """
    tokens, double = x.shape
    if double % 2 or x.stride(1) != 1:
        raise ValueError(f"silu_mul takes contiguous rows of gate and up, got {tuple(x.shape)} with strides {x.stride()}")
    width = double // 2
    if out is None:
        out = with_room(x, tokens, width)
    block = min(power_of_two(width), 1024)
    warps = max(block // 256, 1)
    if tokens and width:
        grid = (tokens, triton.cdiv(width, block))
        launch(
            _silu_mul_kernel,
            grid,
            x,
            out,
            x.stride(0),
            out.stride(0),
            width,
            BLOCK=block,
            PDL=pdl,
            num_warps=warps,
            **launch_options(pdl),
        )
    return out


def silu_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """What :func:`silu_mul` computes, in the type of its argument."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
