"""Anything in any order, on pools of a few blocks, against a naive model.

The model is the simulation's: each request's output is known beforehand, every prefix that is read back is checked by the fake
backend, and every step by its laws. Where the engine's invariants are checked:

 1 free + held + fenced = total                         BlockPool.check_integrity, here
 2 references = owning tables, never negative           BlockPool.check_integrity, here
 3 no duplicates in the free list                       BlockPool.check_integrity
 4 keys and blocks agree, tokens and salt match         SlotTable.check_integrity; FakeBackend (``may_read``); here
 5 only full, computed, accepted blocks have keys       SlotTable.check_integrity; FakeBackend, which reads them
 6 a hit is at most the prompt less one token           Simulation, on every request
 7 shared blocks are never written                      FakeBackend, on every batch; SlotTable.check_integrity
 8 blocks for computed, scheduled and guessed tokens    FakeBackend, on every batch
 9 computed within known tokens; who lowers it          SlotTable.check_integrity; here
10 budget and ``max_num_seqs``                          FakeBackend, on every batch; Scheduler.check_integrity
11 a sequence is in one queue                           WaitingQueue.check_integrity, Engine.check_integrity, here
12 no two rows share a slot                             FakeBackend, on every batch
13 nothing is reused before the fence                   FakeBackend, on every batch
14 preempted sequences hold nothing, old results void   WaitingQueue.check_integrity; every output
15 progress, no livelock, bounded starvation            Simulation: idle steps, order of admission
16 greedy output is independent of everything           every output
17 abort is idempotent and silences                     Simulation, on every abort
18 one finish reason; tokens within limits              here; every output
19 an empty engine holds nothing                        Scheduler.check_integrity; at the end
20 usage = tokens delivered                             at the end
"""

from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_core import EngineConfig, SamplingParams
from vllm_core.scenario import Deed, Scenario, SimulatedRequest
from vllm_core.sequence import Status
from vllm_core.simulation import KnowingProposer, Simulation
from vllm_traits import StructuredOutputsParams
from vllm_traits.fake_backend import Fault

VOCAB_SIZE = 6
STREAMS = [[(3 * i + i // 4 + s) % VOCAB_SIZE for i in range(48)] for s in range(2)]


class EngineMachine(RuleBasedStateMachine):
    """Drives one engine."""

    @initialize(
        block_size=st.integers(2, 4),
        num_blocks=st.integers(4, 12),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(1, 16),
        policy=st.sampled_from(["fcfs", "priority", "lpm"]),
        aging=st.sampled_from([0, 2]),
        caching=st.booleans(),
        overlap=st.booleans(),
        most=st.integers(0, 3),
        has_draft=st.booleans(),
    )
    def start(
        self,
        block_size: int,
        num_blocks: int,
        max_num_seqs: int,
        budget: int,
        policy: Any,
        aging: int,
        caching: bool,
        overlap: bool,
        most: int,
        has_draft: bool,
    ) -> None:
        max_model_len = block_size * num_blocks
        config = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(budget, max_num_seqs),
            block_size=block_size,
            max_model_len=max_model_len,
            num_blocks=num_blocks,
            enable_prefix_caching=caching,
            scheduling_policy=policy,
            priority_aging=aging,
            max_draft_tokens=most,
        )
        backend = {
            "vocab_size": VOCAB_SIZE,
            "max_model_len": max_model_len,
            "eos_token_ids": (5,),
            "supports_overlap": overlap,
            "max_draft_tokens": most,
            "supports_structured_outputs": True,
        }
        guesses = ("partly",) if most else ()
        self.simulation = Simulation(Scenario(0, config, backend, guesses=guesses, has_draft=has_draft and most > 0))
        self.engine = self.simulation.engine
        self.handles: list[Any] = []
        submit = self.simulation.backend.submit
        vars(self.simulation.backend)["submit"] = lambda batch: self.keep(submit(batch))
        self.computed: dict[int, tuple[int, int]] = {}  # by sequence: epoch, computed

    def keep(self, handle: Any) -> Any:
        self.handles.append(handle)
        return handle

    # --- rules ---

    @rule(
        stream=st.integers(0, 1),
        shared=st.integers(0, 40),
        own=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=4),
        params=st.fixed_dictionaries(
            {
                "temperature": st.sampled_from([0.0, 1.0]),
                "seed": st.integers(0, 3),
                "max_tokens": st.integers(1, 12),
                "n": st.sampled_from([1, 1, 2]),
                "ignore_eos": st.booleans(),
            }
        ),
        rare=st.sampled_from(
            [
                {},
                {},
                {"stop_token_ids": [2]},
                {"presence_penalty": 1.0},
                {"structured_outputs": StructuredOutputsParams(regex="x")},
                {"logprobs": 1, "prompt_logprobs": 1},
            ]
        ),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, "a"]),
    )
    def add(
        self,
        stream: int,
        shared: int,
        own: list[int],
        params: dict[str, Any],
        rare: dict[str, Any],
        priority: int,
        salt: str | None,
    ) -> None:
        simulation = self.simulation
        prompt = [*STREAMS[stream][:shared], *own][: simulation.scenario.max_model_len - 1]
        name = f"r{len(simulation.requests)}"
        now = simulation.device.now
        simulation.add(SimulatedRequest(name, now, prompt, SamplingParams(**params, **rare), priority, salt))

    @precondition(lambda self: self.engine.has_unfinished_requests())
    @rule(num=st.integers(1, 4))
    def step(self, num: int) -> None:
        for _ in range(num):
            if self.engine.has_unfinished_requests():
                self.simulation.step()

    @precondition(lambda self: self.simulation.requests)
    @rule(which=st.integers(0, 50), kind=st.sampled_from(["abort", "choice", "priority"]), number=st.integers(-2, 3))
    def do(self, which: int, kind: str, number: int) -> None:
        request = list(self.simulation.requests.values())[-1 - which % len(self.simulation.requests)]
        number = number % request.params.n if kind == "choice" else number
        self.simulation.do(Deed(0.0, kind, request.name, number))

    @rule()
    def reset(self) -> None:
        self.simulation.do(Deed(0.0, "reset"))

    @rule(fault=st.sampled_from(list(Fault)))
    def trouble(self, fault: Fault) -> None:
        self.simulation.next_fault = fault

    @precondition(lambda self: self.simulation.backend.is_dead)
    @rule()
    def revive(self) -> None:
        self.simulation.backend.is_dead = False

    @precondition(lambda self: self.simulation.scenario.guesses)
    @rule(kind=st.sampled_from(["right", "partly", "wrong", "short"]))
    def guess(self, kind: str) -> None:
        speculator = self.engine.scheduler.speculator
        assert speculator is not None
        proposer = speculator.proposers[0]
        assert isinstance(proposer, KnowingProposer)
        proposer.kind = kind

    @precondition(lambda self: self.simulation.backend._under_way)
    @rule(seconds=st.floats(0, 0.05), last=st.booleans())
    def look(self, seconds: float, last: bool) -> None:
        """Time passes, and somebody asks whether a step is over, the later one first or not."""
        self.simulation.last_token.clear()  # the wait is of the host's making
        under_way = self.simulation.backend._under_way
        self.simulation.device.advance(self.simulation.device.now + seconds)
        under_way[-1 if last else 0].done()

    # --- what holds after every rule ---

    @invariant()
    def books_balance(self) -> None:
        """1, 2, 4, 11, by a count of its own."""
        engine, scheduler = self.engine, self.engine.scheduler
        engine.check_integrity()
        assert not self.simulation.backend.violations
        holders = [sequence.blocks for sequence in scheduler.running]
        holders += [blocks for _, blocks, _ in scheduler._table.fenced]
        held = {block for table in holders for block in table}
        assert scheduler.pool.num_free + len(held) == engine.num_blocks
        for block in range(engine.num_blocks):
            assert scheduler.pool.num_holders(block) == sum(block in table for table in holders)  # type: ignore[arg-type]
            key = scheduler.pool.key_of(block)  # type: ignore[arg-type]
            assert key is None or scheduler.pool.lookup(key) == block
        alive = [
            sequence
            for request in engine._requests.values()
            for sequence in request.sequences
            if not sequence.completion.finished
        ]
        assert len(alive) == len(scheduler.running) + scheduler.num_waiting
        assert all((sequence.status is Status.RUNNING) == (sequence in scheduler.running) for sequence in alive)
        assert all(sequence.status is not Status.FINISHED for sequence in alive)

    @invariant()
    def computed_only_falls_by_rejection_or_failure(self) -> None:
        """9: what is computed and committed never falls while a sequence keeps its slot."""
        table = self.engine.scheduler._table
        now = {}
        for sequence in self.engine.scheduler.running:
            assert sequence.slot is not None
            slot = int(sequence.slot)
            now[int(sequence.seq_id)] = int(table.epochs[slot]) * 1000 + slot, int(table.committed[slot])
        for seq, (life, committed) in self.computed.items():
            if seq in now and now[seq][0] == life:
                assert now[seq][1] >= committed
        self.computed = now

    @invariant()
    def outputs_are_right_so_far(self) -> None:
        """18: within limits, one reason, and never another token than alone."""
        simulation = self.simulation
        for name, output in simulation.outputs.items():
            for choice in output.outputs:
                expected = simulation.scenario.expected(simulation.requests[name], choice.index)
                assert choice.token_ids == expected.token_ids[: len(choice.token_ids)]
                assert choice.finish_reason in (None, "stop", "length", "abort")
            assert output.finished == all(choice.finished for choice in output.outputs)

    def teardown(self) -> None:
        if not hasattr(self, "simulation"):
            return
        self.simulation.backend.is_dead = False
        self.simulation.next_fault = None
        while self.engine.has_unfinished_requests():
            self.simulation.step()
        self.simulation.check_end()


EngineMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking such a run takes minutes
    suppress_health_check=list(HealthCheck),
)
TestEngineMachine = EngineMachine.TestCase
