"""Tokens from logits on the device, for rows by slot."""

import torch

from vllm_model.cuda.device import Device
from vllm_model.cuda.rows import DeviceRows
from vllm_model.kernels.sampling import SamplerWorkspace, sample


class DeviceSampler:
    """Draws with the parameters that stand in the rows.

    Args:
        device: Where.
        rows: Parameters by slot.
        max_rows: Most rows drawn at once.
    """

    def __init__(self, device: Device, rows: DeviceRows, max_rows: int) -> None:
        self.max_rows = max_rows
        self._rows, self._pdl = rows, device.pdl
        self._workspace = SamplerWorkspace(self.max_rows, device.device)

    def draw(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, mode: str) -> torch.Tensor:
        """One token a row.

        Args:
            logits: ``[rows, vocab_size]``.
            slots: int32 ``[rows]``; -1: no token.
            positions: int32 ``[rows]``, of the tokens to be drawn.
            mode: Of :func:`~vllm_model.cuda.rows.sampling_mode`.

        Returns:
            int32 ``[rows]``.
        """
        rows = self._rows
        filters = (rows.top_k, rows.top_p, rows.min_p) if mode == "filtered" else (None, None, None)
        return sample(
            logits,
            slots,
            positions,
            rows.temperature,
            rows.seed,
            self._workspace,
            top_k=filters[0],
            top_p=filters[1],
            min_p=filters[2],
            greedy=mode == "greedy",
            pdl=self._pdl,
        )
