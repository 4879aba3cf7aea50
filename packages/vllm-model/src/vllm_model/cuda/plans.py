"""The plans of decode attention: one shape for few rows and one for many."""

import torch

from vllm_model.cuda.device import Device
from vllm_model.kernels.paged_decode import DecodeConfig, DecodePlan
from vllm_model.model_config import ModelConfig

FEW_ROWS = 16
"""Up to here decode attention runs in another shape: there is less to read than programs to start."""

HALF_UNIT = 8
"""Halves of a step are cut at whole multiples of so many rows."""
HALF = DecodeConfig(tile=32, programs_per_sm=3, num_warps=2, num_stages=5)
"""The shape for half a step's rows: it leaves room on each multiprocessor for the other half's products."""


class DecodePlans:
    """Plans for any number of rows.

    Args:
        device: Where.
        config: The shape of the heads.
        max_num_seqs: Most rows.
        max_blocks: Most blocks of a sequence.
        block_size: Tokens of a block.
    """

    def __init__(self, device: Device, config: ModelConfig, max_num_seqs: int, max_blocks: int, block_size: int) -> None:

        def make(rows: int, shape: DecodeConfig | None = None) -> DecodePlan:
            return DecodePlan(
                rows,
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                device.device,
                max_blocks=max_blocks,
                block_size=block_size,
                config=shape,
            )

        self._plans = [make(most) for most in (min(max_num_seqs, FEW_ROWS), max_num_seqs)]
        shape = HALF if config.head_dim <= 128 else None
        self._halves = [make(-(-max_num_seqs // 2) + HALF_UNIT, shape) for _ in range(2)]
        self._pdl = device.pdl

    def of(self, rows: int) -> DecodePlan:
        """The plan for so many rows."""
        return self._plans[rows > FEW_ROWS]

    def update_half(self, lane: int, seq_lens: torch.Tensor, slots: torch.Tensor, tables: torch.Tensor) -> DecodePlan:
        """As :meth:`update`, of the rows of a half, 0 or 1."""
        plan = self._halves[lane]
        plan.update(seq_lens, slots, tables, pdl=self._pdl)
        return plan

    def update(
        self, seq_lens: torch.Tensor, slots: torch.Tensor, tables: torch.Tensor, skips: torch.Tensor | None = None
    ) -> DecodePlan:
        """Cut a step's work, as :meth:`DecodePlan.update`; the plan that was made."""
        plan = self.of(len(slots))
        plan.update(seq_lens, slots, tables, skips=skips, pdl=self._pdl)
        return plan
