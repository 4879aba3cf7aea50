"""The contract of a batch, checked: what :mod:`vllm_traits.batch` says, and the fence.

Nothing that a step under way names may go to another sequence before that step is known to be over: neither its slots, which
hold what was sampled last, nor its blocks.
"""

from dataclasses import dataclass

import numpy as np

from vllm_traits.backend import ModelSpec
from vllm_traits.batch import LAST_SAMPLED, Batch


@dataclass(frozen=True, slots=True)
class NamedThings:
    """What a step names.

    Attributes:
        slots: Slot to sequence.
        blocks: Block to the sequences that name it, each with the block's place in its table.
        samples: Slots that it samples for.
    """

    step_id: int
    slots: dict[int, int]
    blocks: dict[int, dict[int, int]]
    samples: frozenset[int]

    @classmethod
    def of(cls, batch: Batch) -> "NamedThings":
        """All that a batch names."""
        slots = dict(zip(batch.slots.tolist(), (int(seq) for seq in batch.seq_ids), strict=True))
        blocks: dict[int, dict[int, int]] = {}
        for slot, seq in slots.items():
            for index, block in enumerate(batch.state.block_tables[slot, : batch.state.num_blocks[slot]].tolist()):
                blocks.setdefault(block, {})[seq] = index
        return cls(batch.step_id, slots, blocks, frozenset(batch.slots[batch.sample].tolist()))


class BatchRules:
    """Checks every batch of one engine.

    Args:
        spec: Of the model.
        num_blocks, max_num_batched_tokens: What the backend was initialized with.
        is_draft: A row may write again what others have in their tables, if it is the same.
    """

    def __init__(self, spec: ModelSpec, *, num_blocks: int, max_num_batched_tokens: int, is_draft: bool = False) -> None:
        self.is_draft = is_draft
        self.spec = spec
        self.num_blocks = num_blocks
        self.max_num_batched_tokens = max_num_batched_tokens
        self.owners: dict[int, int] = {}
        """Slot to the sequence that it was last said to be of."""

    def complaints(self, batch: Batch, under_way: list[NamedThings], unread: list[NamedThings]) -> list[str]:
        """What is wrong with a batch, given the steps that are not known to be over, and those whose tokens nobody has."""
        found = self._shape(batch)
        if found:
            return [f"step {batch.step_id}: {what}" for what in found]  # the rest would stumble over it
        named = NamedThings.of(batch)
        found += self._changed(batch, under_way)
        for row in range(batch.num_rows):
            who = f"row {row} (sequence {batch.seq_ids[row]}, slot {batch.slots[row]})"
            what = [*self._row(batch, row, unread), *self._fence(batch, row, named, under_way)]
            found += [f"{who} {each}" for each in what]
        return [f"step {batch.step_id}: {what}" for what in found]

    def _shape(self, batch: Batch) -> list[str]:
        """The batch as a whole."""
        found, lens, state = [], batch.query_lens, batch.state
        if not batch.num_rows:
            found.append("it has no rows")
        for name in ("slots", "token_ids", "query_start", "num_computed", "num_draft", "changed_slots"):
            if getattr(batch, name).dtype != np.int32:
                found.append(f"{name} is {getattr(batch, name).dtype}, not int32")
        if not (len(batch.seq_ids) == len(batch.num_computed) == len(batch.sample) == len(batch.num_draft) == len(lens)):
            found.append("its arrays have different lengths")
        elif batch.query_start[0] != 0 or batch.query_start[-1] != batch.num_tokens or (lens < 1).any():
            found.append(f"query_start is {batch.query_start.tolist()} for {batch.num_tokens} tokens")
        if batch.num_tokens > self.max_num_batched_tokens:
            found.append(f"{batch.num_tokens} tokens are over the budget of {self.max_num_batched_tokens}")
        if len(set(batch.slots.tolist())) < batch.num_rows:
            found.append(f"two rows share a slot: {batch.slots.tolist()}")
        elif len(set(batch.seq_ids)) < batch.num_rows:
            found.append(f"two rows are of one sequence: {list(batch.seq_ids)}")
        elif batch.num_rows and not (batch.slots.min() >= 0 and batch.slots.max() < state.max_num_seqs):
            found.append(f"slots are {batch.slots.tolist()}; there are {state.max_num_seqs}")
        return found

    def _changed(self, batch: Batch, under_way: list[NamedThings]) -> list[str]:
        """Slots are said to change hands when they do, and not while a step under way names them."""
        found = []
        now = dict(zip(batch.slots.tolist(), (int(seq) for seq in batch.seq_ids), strict=True))
        for slot in batch.changed_slots.tolist():
            found += [
                f"slot {slot} changes hands while step {step.step_id} names it" for step in under_way if slot in step.slots
            ]
            self.owners.pop(slot, None)
            if slot in now:
                self.owners[slot] = now[slot]
        for slot, seq in now.items():
            # A slot may be said to have changed in a step before the one that first runs it.
            if self.owners.setdefault(slot, seq) != seq:
                found.append(f"slot {slot} runs sequence {seq}, and was not said to have left sequence {self.owners[slot]}")
        return found

    def _row(self, batch: Batch, row: int, unread: list[NamedThings]) -> list[str]:
        """One row against the state."""
        found, state, slot = list[str](), batch.state, int(batch.slots[row])
        first, num_draft = int(batch.num_computed[row]), int(batch.num_draft[row])
        tokens = batch.token_ids[batch.query_start[row] : batch.query_start[row + 1]].tolist()
        end, known = first + len(tokens), int(state.num_tokens[slot])
        params = state.params[slot]
        if first < 0 or end > state.max_model_len:
            return [f"runs positions {first} to {end - 1}"]
        blocks = state.block_tables[slot, : state.num_blocks[slot]].tolist()
        if len(blocks) * state.block_size < end:
            found.append(f"runs up to position {end - 1} and has {len(blocks)} blocks")
        if len(set(blocks)) < len(blocks) or not all(0 <= block < self.num_blocks for block in blocks):
            found.append(f"has the block table {blocks}")
        if params is None:
            found.append("has no parameters")
        # What it runs: known tokens, then at most one that is on the device, then guesses.
        late = tokens.count(LAST_SAMPLED)
        expected = state.token_ids[slot, first:end].tolist()
        if [token for token in tokens if token != LAST_SAMPLED] != [
            known_token for token, known_token in zip(tokens, expected, strict=True) if token != LAST_SAMPLED
        ]:
            found.append(f"runs {tokens} from position {first}, where the state has {expected}")
        if late and (late > 1 or params is None or params.structured_outputs is not None or num_draft):
            found.append(f"must not run a token that is on its way at position {first}, with {known} known")
        if not (0 <= num_draft <= self.spec.max_draft_tokens and num_draft < len(tokens)):
            found.append(f"has {num_draft} guesses in {len(tokens)} tokens; {self.spec.max_draft_tokens} are allowed")
        elif num_draft and (end - num_draft != known or not batch.sample[row]):
            found.append(f"has {num_draft} guesses up to position {end - 1}, with {known} tokens known")
        pending = sum(slot in step.samples and step.slots[slot] == batch.seq_ids[row] for step in unread)
        if bool(batch.sample[row]) != (end - num_draft >= known) or end - num_draft > known + pending:
            found.append(
                f"{'samples' if batch.sample[row] else 'stops'} at {end}, with {known} known and {pending} on their way"
            )
        return found

    def _fence(self, batch: Batch, row: int, named: NamedThings, under_way: list[NamedThings]) -> list[str]:
        """What a row uses is nobody else's, here and in the steps under way."""
        found, state, slot, seq = list[str](), batch.state, int(batch.slots[row]), int(batch.seq_ids[row])
        first, last = int(batch.num_computed[row]), int(batch.num_computed[row] + batch.query_lens[row]) - 1
        written = state.block_tables[slot, first // state.block_size : last // state.block_size + 1].tolist()
        for block in written:
            others = [other for other in named.blocks.get(block, {}) if other != seq]
            if others and not self.is_draft:
                found.append(f"writes block {block}, which sequences {others} of this step name")
        for step in under_way:
            if step.slots.get(slot, seq) != seq:
                found.append(f"has the slot of sequence {step.slots[slot]} in step {step.step_id}, which is under way")
            for index, block in enumerate(written, first // state.block_size):
                for other, place in step.blocks.get(block, {}).items():
                    if (other, place) != (seq, index):
                        found.append(
                            f"writes block {block}, which sequence {other} of step {step.step_id} names, which is under way"
                        )
        return found
