"""The plans of decode attention: shapes for few rows and for many, of one token or of several."""

from itertools import product

import torch

from vllm_model.cuda.device import Device
from vllm_model.kernels.decode_plan import FEW_ROWS, DecodePlan
from vllm_model.model_config import ModelConfig


class DecodePlans:
    """Plans for any number of rows.

    Args:
        device: Where.
        config: The shape of the heads.
        max_num_seqs: Most rows.
        max_blocks: Most blocks of a sequence.
        block_size: Tokens of a block.
        max_queries: Most tokens of a row that one launch should take.
        fp8: Whether the cache is e4m3.

    Attributes:
        max_queries: Most that it takes: fewer where many heads share their keys.
    """

    def __init__(
        self,
        device: Device,
        config: ModelConfig,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
        max_queries: int,
        *,
        fp8: bool,
    ) -> None:
        self.max_queries = min(max_queries, max(1, 128 * config.num_kv_heads // config.num_heads))
        self._plans = {
            (many, several): DecodePlan(
                max_num_seqs if many else min(max_num_seqs, FEW_ROWS),
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                device.device,
                max_blocks=max_blocks,
                block_size=block_size,
                max_queries=self.max_queries if several else 1,
                fp8=fp8,
            )
            for many, several in product((False, True), repeat=2)
        }
        self._pdl = device.pdl

    def of(self, rows: int, *, several: bool = False) -> DecodePlan:
        """The plan for so many rows of one token, or of several."""
        return self._plans[rows > FEW_ROWS, several]

    def update(
        self,
        seq_lens: torch.Tensor,
        slots: torch.Tensor,
        tables: torch.Tensor,
        skips: torch.Tensor | None = None,
        *,
        several: bool = False,
        leave_newest: bool = False,
    ) -> DecodePlan:
        """Cut a step's work, as :meth:`DecodePlan.update`; the plan that was made."""
        plan = self.of(len(slots), several=several)
        plan.update(seq_lens, slots, tables, skips=skips, leave_newest=leave_newest, pdl=self._pdl)
        return plan
