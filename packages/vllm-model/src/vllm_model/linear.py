"""Products with a weight, and which one fits a weight."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_model.quantization import QuantizedTensor, Weight


@dataclass(slots=True)
class Linear:
    """``x @ weight.T + bias``; weight ``[out, in]``, or what a subclass made of it."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[num_tokens, in]`` to ``[num_tokens, out]``."""
        return F.linear(x, self.weight, self.bias)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The rows of the weight that ``index`` (int64 ``[rows]``) names, ``[rows, in]``: an embedding that is the head too."""
        return F.embedding(index, self.weight)


def make_linear(weight: Weight, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
    """The product for ``weight`` and inputs of ``dtype``.

    A quantized weight stays packed where torch's int4 product is fast: in bfloat16. In other dtypes that product takes one
    weight after the other, slower than a dequantized copy is read, so such a copy is made.
    """
    if not isinstance(weight, QuantizedTensor):
        return Linear(weight, bias)
    if dtype == torch.bfloat16:
        from vllm_model.packed_linear import PackedLinear, int4_layout

        layout = int4_layout()
        if layout is not None:
            return PackedLinear.pack(weight, bias, layout)
    return Linear(weight.dequantize(dtype), bias)
