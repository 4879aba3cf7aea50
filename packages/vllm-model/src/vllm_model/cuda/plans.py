"""The plans of decode attention: one shape for few rows and one for many."""

import torch

from vllm_model.cuda.device import Device
from vllm_model.kernels.decode_plan import DecodePlan
from vllm_model.model_config import ModelConfig

FEW_ROWS = 16
"""Up to here decode attention runs in another shape: there is less to read than programs to start."""


class DecodePlans:
    """Plans for any number of rows.

    Args:
        device: Where.
        config: The shape of the heads.
        max_num_seqs: Most rows.
        max_blocks: Most blocks of a sequence.
        block_size: Tokens of a block.
        max_queries: Most tokens of a row that one launch should take.

    Attributes:
        max_queries: Most that it takes: fewer where many heads share their keys.
    """

    def __init__(
        self, device: Device, config: ModelConfig, max_num_seqs: int, max_blocks: int, block_size: int, max_queries: int
    ) -> None:
        self.max_queries = min(max_queries, max(1, 128 * config.num_kv_heads // config.num_heads))
        self._plans = [
            DecodePlan(
                most,
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                device.device,
                max_blocks=max_blocks,
                block_size=block_size,
                max_queries=self.max_queries,
            )
            for most in (min(max_num_seqs, FEW_ROWS), max_num_seqs)
        ]
        self._pdl = device.pdl

    def of(self, rows: int) -> DecodePlan:
        """The plan for so many rows."""
        return self._plans[rows > FEW_ROWS]

    def update(
        self,
        seq_lens: torch.Tensor,
        slots: torch.Tensor,
        tables: torch.Tensor,
        skips: torch.Tensor | None = None,
        *,
        leave_newest: bool = False,
    ) -> DecodePlan:
        """Cut a step's work, as :meth:`DecodePlan.update`; the plan that was made."""
        plan = self.of(len(slots))
        plan.update(seq_lens, slots, tables, skips=skips, leave_newest=leave_newest, pdl=self._pdl)
        return plan
