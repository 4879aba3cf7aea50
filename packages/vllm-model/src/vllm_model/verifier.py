"""The one verifier of guesses: which tokens a step samples, and how many of a row's guesses stand.

Noise is a pure function of (seed, position, token), so the token of a position is decided before anyone guesses it: it is the
argmax of filtered, scaled logits and noise. A row with ``d`` guesses samples after its last ``d + 1`` tokens, each with its own
position's noise, as if no guess had been made; the guesses that agree with what was sampled stand, and the first that does not
is replaced by it. One row with ``d = 3``::

    token_ids of the row      .. t    g0   g1   g2      t is known, g are guesses
    sampled after each           s0   s1   s2   s3
    g0 = s0, g1 != s1            s0   s1   -1   -1      g0 stands, s1 replaces g1; s2 and s3 follow a token that is not there

So the tokens are those of steps without guesses, at any temperature and under any filter, penalty or bias. For guesses that do
not depend on their position's noise this is the rejection sampling of Leviathan, Kalman and Matias (2023, algorithm 1) with the
guess as a point mass; for a draft model that samples with the same noise it is the Gumbel coupling of Daliri, Musco and Suresh
(2024). ``docs/adr/0009-verification.md`` has the argument and what it costs.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_traits.batch import Batch, IntArray

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SampledEntries:
    """The tokens that a step samples, by row and in a row by position.

    Attributes:
        rows: int64 ``[num_entries]``, of the batch.
        places: int64 ``[num_entries]``, which of its row's tokens an entry is: ``0 .. num_draft[row]``.
        tokens: int64 ``[num_entries]``, the place in ``batch.token_ids`` of the token whose logits decide.
        positions: int64 ``[num_entries]``, of the token to be sampled: the key of its noise and the length of its history.
        width: Most entries of a row, 1 if no row has guesses.
    """

    rows: Indices
    places: Indices
    tokens: Indices
    positions: Indices
    width: int

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, part: slice) -> "SampledEntries":
        """Some of them."""
        return SampledEntries(self.rows[part], self.places[part], self.tokens[part], self.positions[part], self.width)


def sampled_entries(batch: Batch) -> SampledEntries:
    """What a step samples: ``num_draft + 1`` tokens of each row that samples."""
    rows = np.flatnonzero(batch.sample)
    last = batch.query_start[rows + 1].astype(np.int64) - 1
    following = (batch.num_computed + batch.query_lens)[rows].astype(np.int64)
    drafts = batch.num_draft[rows].astype(np.int64)
    if not drafts.any():
        return SampledEntries(rows, np.zeros_like(rows), last, following, 1)
    counts = drafts + 1
    member = np.repeat(np.arange(len(rows)), counts)
    places = np.arange(len(member)) - (np.cumsum(counts) - counts)[member]
    behind = drafts[member] - places  # how many of the row's entries follow
    return SampledEntries(rows[member], places, last[member] - behind, following[member] - behind, int(counts.max()))


def guess_table(batch: Batch, width: int) -> IntArray:
    """The rows' guesses from the left, -1 after them.

    Args:
        batch: The step.
        width: At least ``num_draft.max() + 1``; more where shapes are fixed.

    Returns:
        int32 ``[num_rows, width - 1]``.
    """
    place = np.arange(width - 1)
    first = batch.query_start[1:] - batch.num_draft
    inside = place < batch.num_draft[:, None]
    return np.where(inside, batch.token_ids[np.where(inside, first[:, None] + place, 0)], -1).astype(np.int32)


def accept_guesses(sampled: torch.Tensor, guesses: torch.Tensor) -> torch.Tensor:
    """The tokens that a step gives. Element by element on the tensors' device, no wait of the host, no shape from data.

    Args:
        sampled: Integers ``[num_rows, width]``: in place ``j`` the token sampled after ``j`` guesses of the row. A row that
            does not sample has -1 in place 0. What stands after ``num_draft`` is not read.
        guesses: Integers ``[num_rows, width - 1]``, of :func:`guess_table`.

    Returns:
        int32 ``[num_rows, width]``: of each row the guesses that stand and the token after them, -1 after that.
    """
    agrees = (sampled[:, :-1] == guesses) & (guesses >= 0)
    stands = agrees.to(torch.int32).cumprod(dim=1)
    rest = torch.where(stands > 0, sampled[:, 1:], -1)
    return torch.cat((sampled[:, :1], rest), dim=1).to(torch.int32)
