"""The small integers that cross the seam between engine and backend, each with its own type."""

from typing import NewType

SeqId = NewType("SeqId", int)
"""One sequence of one request, unique for the life of an engine (a request with ``n`` choices has ``n``)."""

TokenId = NewType("TokenId", int)
"""An entry of the vocabulary, ``0 <= id < vocab_size``."""

BlockId = NewType("BlockId", int)
"""A page of the KV cache, ``0 <= id < num_blocks``; every layer uses the same id for the same tokens."""

SlotId = NewType("SlotId", int)
"""A row of the persistent arrays of :class:`~vllm_traits.BatchState`, ``0 <= id < max_num_seqs``."""

StepId = NewType("StepId", int)
"""The number of a step, counted up by one from 1."""
