"""Laws of the engine on random workloads and tiny pools.

The fake backend's tokens follow from what it reads back from its cache, so a stale block, an aliased slot or a lost token
changes an output.
"""

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_core import Engine, EngineConfig, RequestOutput, SamplingParams
from vllm_core.engine import _derive_seed
from vllm_traits import Batch
from vllm_traits.errors import BackendError
from vllm_traits.fake_backend import FakeBackend, expected_tokens


@dataclass
class World:
    """A random engine, random requests, and what each must answer."""

    seed: int
    random: Random = field(init=False)
    num_failures: int = 0

    def __post_init__(self) -> None:
        r = self.random = Random(self.seed)
        self.block_size, self.num_blocks = r.choice([2, 3, 4]), r.randint(4, 12)
        self.max_len = self.block_size * self.num_blocks
        max_num_seqs = r.randint(1, 6)
        self.backend = FakeBackend(
            vocab_size=r.choice([4, 50]),
            max_model_len=self.max_len,
            supports_overlap=r.random() < 0.5,
            eos_token_ids=(1,) if r.random() < 0.4 else (),
            fail_result=self.maybe_fail if r.random() < 0.3 else None,
        )
        self.engine = Engine(
            self.backend,
            config=EngineConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max(max_num_seqs, r.randint(1, 20)),
                block_size=self.block_size,
                num_blocks=self.num_blocks,
                enable_prefix_caching=r.random() < 0.7,
                scheduling_policy=r.choice(["fcfs", "priority"]),
                long_prefill_token_threshold=r.choice([0, 3]),
            ),
        )
        self.common = [r.randrange(self.backend.vocab_size) for _ in range(self.max_len)]
        self.requests: dict[str, tuple[list[int], SamplingParams]] = {}
        self.outputs: dict[str, RequestOutput] = {}
        self.aborted: set[str] = set()

    def maybe_fail(self, batch: Batch) -> Exception | None:
        # Never twice in a row: a failure that repeats is another story.
        if batch.step_id % 7 == 0 and self.random.random() < 0.3:
            self.num_failures += 1
            return BackendError("now and then")
        return None

    def add(self) -> None:
        r = self.random
        length = r.randint(1, self.max_len - 1)
        shared = r.randint(0, length)
        prompt = self.common[:shared] + [r.randrange(self.backend.vocab_size) for _ in range(length - shared)]
        params = SamplingParams(
            temperature=r.choice([0.0, 1.0]), max_tokens=r.randint(1, 10), n=r.choice([1, 1, 2, 3]), seed=r.randint(-5, 5)
        )
        name = str(len(self.requests))
        self.requests[name] = prompt, params
        self.outputs[name] = self.engine.add_request(name, prompt, params, priority=r.randint(0, 2))

    def check(self) -> None:
        for name, output in self.outputs.items():
            prompt, params = self.requests[name]
            assert output.finished
            assert params.max_tokens is not None
            assert params.seed is not None
            for choice in output.outputs:
                seed = params.seed if choice.index == 0 else _derive_seed(params.seed, choice.index)
                most = min(params.max_tokens, self.max_len - len(prompt))
                expected = expected_tokens(prompt, most, self.backend.vocab_size, temperature=params.temperature, seed=seed)
                if self.backend.eos_token_ids and 1 in expected:
                    expected = expected[: expected.index(1) + 1]
                if name in self.aborted:
                    assert choice.token_ids == expected[: len(choice.token_ids)]
                else:
                    assert choice.token_ids == expected
                    assert choice.finish_reason == ("stop" if self.backend.eos_token_ids and expected[-1] == 1 else "length")


def run(world: World) -> None:
    r, steps = world.random, 0
    left = r.randint(1, 12)
    while left or world.engine.has_unfinished_requests():
        if left and r.random() < 0.5:
            world.add()
            left -= 1
        if world.outputs and r.random() < 0.05:
            name = r.choice(list(world.outputs))
            if world.engine.abort(name):
                world.aborted.add(name)
        world.engine.step()
        world.engine.check_integrity()
        assert not world.backend.violations
        steps += 1
        assert steps < 5000, "no progress"
    world.check()
    assert world.engine.scheduler.pool.num_free == world.num_blocks
    assert not any(world.engine._gauges().values())


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_every_output_equals_its_solo_run(seed: int) -> None:
    """Whatever the chunking, batching, prefix hits, preemptions, overlap, failures and aborts of others."""
    run(World(seed))


@pytest.mark.parametrize("seed", range(100))
def test_every_output_equals_its_solo_run_on_fixed_seeds(seed: int) -> None:
    run(World(seed))
