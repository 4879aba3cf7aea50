"""Whole workloads on a virtual clock, each drawn from a seed, each held against what it must give.

The fake backend reads every prefix back from its cache and checks every batch; here, after every step, the engine's books are
checked, and at the end every output against the request's output alone. ``python -m vllm_core.simulation --seed 17`` runs one
workload again, ``--seeds 10000`` many.
"""

import argparse
import logging
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from random import Random

from vllm_core.block_pool import BlockPool
from vllm_core.engine import Engine
from vllm_core.outputs import RequestOutput
from vllm_core.proposer import DraftRows
from vllm_core.scenario import Deed, Scenario, SimulatedRequest, draw
from vllm_core.scheduler import ALONE_AFTER
from vllm_traits.batch import Batch, BatchState
from vllm_traits.fake_backend import FakeBackend, Fault, VirtualDevice
from vllm_traits.fake_model import Choice, mix, tag_of
from vllm_traits.ids import BlockId, SlotId

DRAFT_FAULTS = (Fault.SUBMIT, Fault.RESULT, Fault.FEW_ROWS, Fault.FLAT, Fault.MISSING, Fault.OUTSIDE)


class SimulationFailure(AssertionError):  # noqa: N818 - a failure of what is simulated, not of this
    """A law did not hold; the message names the seed that shows it."""


@dataclass(slots=True)
class Report:
    """What a run did, to see that the seeds reach what they should."""

    seed: int
    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)


class KnowingProposer:
    """Knows what the fake backend will say, and says so, or not.

    Args:
        kind: One of :data:`~vllm_core.scenario.GUESSES`.
        vocab_size: The backend's.
        random: Decides for ``partly``.
    """

    def __init__(self, kind: str, vocab_size: int, random: Random) -> None:
        self.name = f"knowing-{kind}"
        self.kind, self.vocab_size, self.random = kind, vocab_size, random
        self.num_calls = 0

    def propose(self, rows: DraftRows) -> list[list[int]]:
        self.num_calls += 1
        if self.kind == "raises" and self.num_calls % 5 == 3:
            raise RuntimeError("a proposer that fails now and then")
        return [self._guess(rows, slot, most) for slot, most in zip(rows.slots.tolist(), rows.num_wanted.tolist(), strict=True)]

    def forget(self, state: BatchState, slot: SlotId, root: bytes) -> None:
        pass

    def close(self) -> None:
        pass

    def truth(self, rows: DraftRows, slot: int, num: int) -> list[int]:
        """What the backend will say next for a slot."""
        return self._follow(rows, slot, num, num)

    def _guess(self, rows: DraftRows, slot: int, most: int) -> list[int]:
        num_right = {"wrong": 0, "partly": self.random.randint(0, most)}.get(self.kind, most)
        return self._follow(rows, slot, self.random.randint(0, most) if self.kind == "short" else most, num_right)

    def _follow(self, rows: DraftRows, slot: int, num: int, num_right: int) -> list[int]:
        """``num`` guesses, the first ``num_right`` of them right."""
        state = rows.state
        known = state.token_ids[slot, : state.num_tokens[slot]].tolist()
        generated, tag = known[state.num_prompt_tokens[slot] :], tag_of(known)
        choice, guess = Choice.of_slot(state, slot, self.vocab_size), list[int]()
        for place in range(num):
            right = choice.next_token(tag, generated)
            guess.append(right if place < num_right else (right + 1) % self.vocab_size)
            generated.append(guess[-1])
            tag = mix(tag, guess[-1])
        return guess


class Simulation:
    """One run of one scenario; or, with an empty one, an engine to do things to by hand, with every law held.

    Args:
        scenario: What to run.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.random = Random(scenario.seed + 1)
        self.device = VirtualDevice(base=0.01, per_token=0.001)
        self.report = Report(scenario.seed)
        self.backend = FakeBackend(
            **scenario.backend, device=self.device, fault=self._fault, on_submit=self._note, may_read=self._may_read
        )
        self.draft = FakeBackend(**scenario.backend, fault=self._draft_fault, is_draft=True) if scenario.has_draft else None
        vocab_size = self.backend.vocab_size
        self.engine = Engine(
            self.backend,
            self.draft,
            proposers=[KnowingProposer(kind, vocab_size, self.random) for kind in scenario.guesses],
            config=scenario.config,
            clock=self.device.clock,
        )
        watch_order(self.engine.scheduler.pool)
        self.arrivals = list(scenario.requests)
        self.deeds = list(scenario.deeds)
        self.requests: dict[str, SimulatedRequest] = {}
        self.outputs: dict[str, RequestOutput] = {}
        self.touched: set[tuple[str, int]] = set()  # choices that were aborted
        self.rekeyed: set[str] = set()  # requests whose priority was changed
        self.of_sequence: dict[int, tuple[str, int]] = {}
        self.faults_of: Counter[int] = Counter()  # by sequence, the steps with it that something befell
        self.last_reset = 0
        self.lengths: dict[tuple[str, int], int] = {}
        self.preemptions: dict[str, int] = {}  # of each request before the step
        self.last_token: dict[tuple[str, int], tuple[float, int]] = {}  # when, and preemptions before it
        self.next_fault: Fault | None = None  # befalls the next step
        self.last_fault = -1.0
        self.last_alone = -1.0  # when a suspect ran alone
        self.idle_steps = 0
        self.num_run = self.num_drafted = 0

    def run(self) -> Report:
        """Run to the end.

        Raises:
            AssertionError: A law does not hold.
        """
        while self.arrivals or self.engine.has_unfinished_requests():
            self._let_in()
            if self.engine.has_unfinished_requests():
                self.step()
            elif self.arrivals:
                self.device.advance(self.arrivals[0].arrival)
        while self.deeds:
            self.do(self.deeds.pop(0))
        self.check_end()
        return self.report

    # --- what the backend asks ---

    def _note(self, batch: Batch) -> None:
        self.report.num_steps += 1
        self.num_run += batch.num_tokens
        self.num_drafted += int(batch.num_draft.sum())

    def _fault(self, batch: Batch) -> Fault | None:
        fault, self.next_fault = self.next_fault, None
        if self.scenario.fault_rate and self.random.random() < self.scenario.fault_rate:
            fault = self.random.choice(self.scenario.faults)
        if fault is None and not self.backend.is_dead:
            return None
        device, self.last_fault = self.device, self.device.now
        if fault is Fault.LATE:
            self.last_fault = max(device.now, device.busy_until) + 1001 * (device.base + device.per_token * batch.num_tokens)
        self.faults_of.update(int(seq) for seq in batch.seq_ids)
        if fault is not None:
            self.report.counts[fault.name] += 1
        return fault

    def _draft_fault(self, batch: Batch) -> Fault | None:
        """A draft that fails costs guesses, and nothing else."""
        is_frail = self.scenario.fault_rate and self.random.random() < 0.05
        return self.random.choice(DRAFT_FAULTS) if is_frail else None

    def _may_read(self, reader: int, writer: int, step: int) -> bool:
        """Blocks are shared within one salt, and not across a reset."""
        salts = [self.requests[self.of_sequence[seq][0]].salt for seq in (reader, writer)]
        return salts[0] == salts[1] and step > self.last_reset

    # --- events ---

    def _let_in(self) -> None:
        now = self.device.now
        while self.arrivals and self.arrivals[0].arrival <= now:
            self.add(self.arrivals.pop(0))
        while self.deeds and self.deeds[0].time <= now:
            self.do(self.deeds.pop(0))
            self.engine.check_integrity()

    def add(self, request: SimulatedRequest) -> None:
        """Hand a request to the engine."""
        engine, name = self.engine, request.name
        first = engine._num_sequences + 1
        self.of_sequence |= {first + i: (name, i) for i in range(request.params.n)}
        self.requests[name] = request
        self.outputs[name] = engine.add_request(
            name, request.prompt, request.params, priority=request.priority, cache_salt=request.salt
        )
        self.lengths |= {(name, i): 0 for i in range(request.params.n)}

    def do(self, deed: Deed) -> None:
        """Do something to the engine, which must say what it made of it."""
        engine, output = self.engine, self.outputs.get(deed.name)
        self.report.counts[deed.kind] += 1
        if deed.kind == "reset":
            if engine.reset_prefix_cache():
                self.last_reset = self.backend.num_steps
                assert engine.scheduler.pool.num_cached == 0
        elif deed.kind == "priority":
            self.rekeyed.add(deed.name)
            assert engine.set_priority(deed.name, deed.number) == (output is not None and not output.finished)
        elif output is None:
            assert not engine.abort(deed.name)
        elif deed.kind == "abort":
            alive = {(deed.name, each.index) for each in output.outputs if not each.finished}
            self.touched |= alive
            assert engine.abort(deed.name) == bool(alive)
            assert output.finished
            assert not engine.abort(deed.name)
        else:
            alive_choice = not output.outputs[deed.number].finished
            if alive_choice:
                self.touched.add((deed.name, deed.number))
            assert engine.abort_choice(deed.name, deed.number) == alive_choice
            assert not engine.abort_choice(deed.name, deed.number)

    # --- a step and its laws ---

    def step(self) -> None:
        """Run a step and hold it against the laws."""
        self.preemptions = {name: output.metrics.num_preemptions for name, output in self.outputs.items()}
        known = dict(self.engine.scheduler.pool._by_key)
        if self.engine.scheduler.suspects:
            self.last_alone = self.device.now
        reported = {output.request_id for output in self.engine.step()}
        for backend in (self.backend, self.draft):
            assert backend is None or not backend.violations, backend.violations
        self.engine.check_integrity()
        self._check_hits(known)
        grown = False
        for key, before in self.lengths.items():
            choice = self.outputs[key[0]].outputs[key[1]]
            now = len(choice.token_ids)
            if now != before:
                grown = True
                assert now > before, f"{key} has lost tokens"
                assert key not in self.touched, f"{key} speaks after it was aborted"
                assert key[0] in reported, f"{key} has tokens that nobody was told of"
                self.lengths[key] = now
                self._check_gap(key)
        # The first in order always gets on: a token at the latest when its prompt has run, one token a step.
        self.idle_steps = 0 if grown or self.last_fault >= self.device.now else self.idle_steps + 1
        assert self.idle_steps <= 2 * self.scenario.max_model_len + 20, "no progress"

    def _check_hits(self, known: dict[bytes, int]) -> None:
        """Who was let in has hit all of its prefix that was there (``known`` before the step, and still after it)."""
        scheduler, size = self.engine.scheduler, self.scenario.config.block_size
        for sequence in scheduler.last_admitted:
            output = sequence.request.output
            first = output.num_cached_tokens // size
            if sequence.completion.index or first >= (len(sequence.prompt) - 1) // size or output.prompt_logprobs is not None:
                continue
            key = sequence.keys[first] if sequence.keys else b""
            block = known.get(key)
            assert block is None or block != scheduler.pool.lookup(key), f"{output.request_id} did not hit block {block}"

    def _check_gap(self, key: tuple[str, int]) -> None:
        """A running stream waits for a step of the budget at most; for two where steps overlap, or blocks are short."""
        now, (before, num_preemptions) = self.device.now, self.last_token.get(key, (self.device.now, 0))
        self.last_token[key] = now, self.preemptions[key[0]]
        if self.outputs[key[0]].metrics.num_preemptions != num_preemptions or max(self.last_fault, self.last_alone) >= before:
            return
        longest = self.device.base + self.device.per_token * self.scenario.config.max_num_batched_tokens
        steps = 3 if self.backend.supports_overlap else 1
        assert now - before <= steps * longest + 1e-9, f"{key} waited {now - before:.4f} s for a token"

    # --- the end ---

    def check_end(self) -> None:
        """Hold everything against what it must be when all requests have ended, and close the engine."""
        engine, scheduler = self.engine, self.engine.scheduler
        for name, output in self.outputs.items():
            assert output.finished
            self._check_times(output)
            for index in range(self.requests[name].params.n):
                self._check_choice(name, index)
        engine.check_integrity()
        self._check_order()
        assert not any(engine._gauges().values()), engine._gauges()
        assert scheduler.pool.num_free == engine.num_blocks
        choices = [choice for output in self.outputs.values() for choice in output.outputs]
        delivered = sum(len(choice.token_ids) for choice in choices)
        assert engine.metrics.generation_tokens == delivered, "usage is not what was delivered"
        assert sum(engine.metrics.request_success.values()) == len(choices)
        assert sum(output.metrics.num_preemptions for output in self.outputs.values()) == scheduler.num_preemptions
        self.report.num_tokens, self.report.seconds = delivered, self.device.now
        self.report.counts.update(
            preemptions=scheduler.num_preemptions,
            hits=scheduler.prefix_cache.stats.num_hit_tokens,
            drafted=self.num_drafted,
            right=int(scheduler.num_accepted_per_pos.sum()),
        )
        if not self.touched and self.last_fault < 0 and not scheduler.num_preemptions:
            self._check_work(delivered)
        engine.close()
        assert self.backend.closed

    def _check_choice(self, name: str, index: int) -> None:
        choice, expected = self.outputs[name].outputs[index], self.scenario.expected(self.requests[name], index)
        num, what = len(choice.token_ids), f"choice {index} of {name}"
        assert choice.token_ids == expected.token_ids[:num], f"{what} is {choice.token_ids}, not {expected.token_ids}"
        if (name, index) in self.touched:
            assert choice.finish_reason == "abort"
        elif choice.stop_reason == "backend_error":
            seq = next(seq for seq, key in self.of_sequence.items() if key == (name, index))
            assert choice.finish_reason == "abort"
            assert self.faults_of[seq] > ALONE_AFTER, f"{what} was given up after {self.faults_of[seq]} failures"
            self.report.counts["given up"] += 1
        else:
            found = choice.token_ids, choice.finish_reason, choice.stop_reason
            assert found == (expected.token_ids, expected.finish_reason, expected.stop_reason), (
                f"{what}: {found}, not {expected}"
            )
        if choice.logprobs is not None:
            assert [entry.token_ids[0] for entry in choice.logprobs] == choice.token_ids, f"{what}: log-probabilities"
        prompt_logprobs = self.outputs[name].prompt_logprobs
        if prompt_logprobs is not None and index == 0 and num:
            assert [entry and entry.token_ids[0] for entry in prompt_logprobs] == [None, *self.requests[name].prompt[1:]]

    def _check_times(self, output: RequestOutput) -> None:
        times, prompt = output.metrics, output.prompt_token_ids
        line = [times.arrival_time, times.first_scheduled_time, times.first_token_time, times.finished_time]
        known = [time for time in line if time is not None]
        assert known == sorted(known), f"{output.request_id} has the times {line}"
        assert times.finished_time is not None
        assert output.num_cached_tokens == times.num_cached_tokens < len(prompt)
        assert output.num_cached_tokens % self.scenario.config.block_size == 0

    def _check_order(self) -> None:
        """Who is first in order is let in first, which bounds how long anybody waits; those that wait for a prefix aside."""
        config = self.scenario.config
        moved = self.rekeyed | {name for name, _ in self.touched}
        if config.enable_prefix_caching:
            return
        line = []
        for arrival, (name, output) in enumerate(self.outputs.items()):
            is_ranked = config.scheduling_policy == "priority"
            rank = self.requests[name].priority if is_ranked else 0
            key = (arrival + rank * config.priority_aging,) if config.priority_aging and is_ranked else (rank, arrival)
            if name not in moved and output.metrics.first_scheduled_time is not None:
                line.append((key, output.metrics.arrival_time, output.metrics.first_scheduled_time, name))
        for (_, arrived, first, name), (_, _, other_first, other) in combinations(sorted(line), 2):
            assert first <= other_first or arrived >= other_first, f"{other} was let in before {name}"

    def _check_work(self, delivered: int) -> None:
        """Nothing ran twice: what ran is what was not cached, and a discarded row for an end seen late."""
        scheduler = self.engine.scheduler
        stats, metrics = scheduler.prefix_cache.stats, [output.metrics for output in self.outputs.values()]
        accepted = int(scheduler.num_accepted_per_pos.sum())
        assert sum(each.num_accepted_tokens for each in metrics) == accepted
        assert sum(each.num_draft_tokens for each in metrics) == scheduler.num_draft_tokens == self.num_drafted
        choices = [choice for output in self.outputs.values() for choice in output.outputs]
        prompts = sum(len(request.prompt) * request.params.n for request in self.requests.values())
        assert stats.num_queried_tokens == (prompts if scheduler.prefix_cache.enabled else 0)
        num_decoding = delivered - len(choices) - accepted
        wasted = self.num_run - self.num_drafted - (prompts - stats.num_hit_tokens) - num_decoding
        # An end that is seen late costs a row; one among guesses costs those after it.
        late = sum(choice.finish_reason == "stop" for choice in choices)
        most = late * (self.backend.supports_overlap + self.engine.max_draft_tokens)
        assert 0 <= wasted <= most, f"{wasted} tokens ran for nothing"


def watch_order(pool: BlockPool) -> None:
    """Hold what a pool gives out against a naive list of what became free when: the block that was free for longest is next."""
    free = [BlockId(block) for block in range(pool.num_blocks)]
    allocate, hold, release = pool.allocate, pool.hold, pool.release

    def allocate_watched() -> BlockId | None:
        block = allocate()
        assert block == (free.pop(0) if free else None), "not the block that was free for longest"
        return block

    def hold_watched(block: BlockId) -> None:
        hold(block)
        if block in free:
            free.remove(block)

    def release_watched(blocks: Iterable[BlockId]) -> None:
        for block in blocks:
            release([block])
            if pool.is_free(block):
                free.append(block)

    vars(pool).update(allocate=allocate_watched, hold=hold_watched, release=release_watched)


def simulate(seed: int) -> Report:
    """Run the workload of a seed.

    Raises:
        SimulationFailure: A law did not hold, or the engine raised.
    """
    try:
        return Simulation(draw(seed)).run()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.name}, line {frame.lineno}: {frame.line}"
        raise SimulationFailure(f"seed {seed}: {type(error).__name__}: {error} ({where})") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 1 if a seed failed."""
    parser = argparse.ArgumentParser(prog="python -m vllm_core.simulation", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, help="run this one, and show its workload")
    parser.add_argument("--seeds", type=int, default=300, help="run so many")
    parser.add_argument("--first", type=int, default=0, help="from this one on")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        sys.stdout.write(f"{draw(options.seed)}\n{simulate(options.seed)}\n")
        return 0
    failures, total = list[str](), Counter[str]()
    for outcome in _outcomes(range(options.first, options.first + options.seeds), options.jobs):
        if isinstance(outcome, str):
            failures.append(outcome)
            sys.stdout.write(f"{outcome}\n")
        else:
            total.update(outcome.counts, steps=outcome.num_steps, tokens=outcome.num_tokens)
    sys.stdout.write(f"{options.seeds} seeds, {len(failures)} failed; {dict(sorted(total.items()))}\n")
    return 1 if failures else 0


def _outcomes(seeds: range, jobs: int) -> Iterator[Report | str]:
    if jobs == 1:
        yield from map(_outcome, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(_outcome, seeds, chunksize=20)


def _outcome(seed: int) -> Report | str:
    try:
        return simulate(seed)
    except SimulationFailure as failure:
        return str(failure)


if __name__ == "__main__":
    logging.disable()  # failures are drawn on purpose
    sys.exit(main())
