"""Guesses change when tokens come, never which: told with a backend whose answers are known."""

from collections.abc import Callable
from typing import Any

import pytest

from vllm_core import Engine, EngineConfig, RequestOutput, SamplingParams
from vllm_core.proposer import DraftRows
from vllm_traits import Batch, StructuredOutputsParams
from vllm_traits.backend import KvCacheBudget
from vllm_traits.batch import BatchState
from vllm_traits.errors import BackendError
from vllm_traits.fake_backend import FakeBackend, expected_tokens
from vllm_traits.ids import SlotId

Guess = Callable[[list[int], int], list[int]]


class Guesser:
    """Guesses by a function of the known tokens and the number wanted."""

    name = "guesser"

    def __init__(self, guess: Guess) -> None:
        self.guess = guess

    def propose(self, rows: DraftRows) -> list[list[int]]:
        state = rows.state
        known = [state.token_ids[slot, : state.num_tokens[slot]].tolist() for slot in rows.slots.tolist()]
        return [self.guess(tokens, wanted) for tokens, wanted in zip(known, rows.num_wanted.tolist(), strict=True)]

    def forget(self, state: BatchState, slot: SlotId, root: bytes) -> None:
        pass

    def close(self) -> None:
        pass


def right(known: list[int], wanted: int) -> list[int]:
    return expected_tokens(known, wanted, 256)


def half_right(known: list[int], wanted: int) -> list[int]:
    return [*right(known, wanted // 2), *[0] * (wanted - wanted // 2)]


def wrong(known: list[int], wanted: int) -> list[int]:
    return [(token + 1) % 256 for token in right(known, wanted)]


def engine_of(
    backend: FakeBackend | None = None, draft: FakeBackend | None = None, guess: Guess | None = None, **settings: Any
) -> Engine:
    settings = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "num_blocks": 64,
        "max_model_len": 64,
        "max_draft_tokens": 4,
    } | settings
    proposers = [Guesser(guess)] if guess is not None else []
    target = backend or FakeBackend(max_draft_tokens=4)
    # Time stands still: guesses cost nothing, so how many there are does not hang on the machine.
    return Engine(target, draft, proposers=proposers, config=EngineConfig(**settings), clock=lambda: 0.0)


def run(engine: Engine) -> int:
    steps = 0
    while engine.has_unfinished_requests():
        engine.step()
        engine.check_integrity()
        steps += 1
        assert steps < 1000
    return steps


def tokens_of(output: RequestOutput, index: int = 0) -> list[int]:
    assert output.finished
    return output.outputs[index].token_ids


@pytest.mark.parametrize("overlap", [False, True])
def test_right_guesses_save_steps_and_wrong_ones_change_nothing(overlap: bool) -> None:
    steps = {}
    for guess in (right, half_right, wrong):
        engine = engine_of(FakeBackend(supports_overlap=overlap, max_draft_tokens=4), guess=guess)
        output = engine.add_request("a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=40))
        steps[guess] = run(engine)
        assert tokens_of(output) == expected_tokens([1, 2, 3], 40, 256)
        metrics = output.metrics
        assert 0 <= metrics.num_accepted_tokens <= metrics.num_draft_tokens
        assert (metrics.num_accepted_tokens == 0) == (guess is wrong)
        assert metrics.num_draft_tokens > 0
    assert steps[right] <= 12
    assert steps[right] < steps[half_right] < steps[wrong] <= 43


@pytest.mark.parametrize("name", ["eos", "own", "length", "context"])
def test_an_end_among_the_guesses_is_the_end(name: str) -> None:
    tokens = expected_tokens([5], 30, 256)
    at = next(i for i in range(6, 30) if tokens.index(tokens[i]) == i)
    backend = FakeBackend(max_draft_tokens=4, eos_token_ids=(tokens[at],) if name == "eos" else ())
    engine = engine_of(backend, guess=right, max_model_len=at + 2 if name == "context" else 64)
    limit = at + 1 if name == "length" else 30
    stops = [tokens[at]] if name == "own" else None
    params = SamplingParams(temperature=0, max_tokens=limit, stop_token_ids=stops, logprobs=1)
    output = engine.add_request("a", [5], params)
    run(engine)
    assert tokens_of(output) == tokens[: at + 1]
    choice = output.outputs[0]
    assert choice.finish_reason == ("stop" if name in ("eos", "own") else "length")
    assert choice.stop_reason == (tokens[at] if name == "own" else None)
    assert choice.logprobs is not None
    assert [entry.token_ids[0] for entry in choice.logprobs] == choice.token_ids
    assert engine.metrics.generation_tokens == at + 1
    assert engine.scheduler.pool.num_free == 64


def test_min_tokens_hold_back_a_stop_among_the_guesses() -> None:
    stop = expected_tokens([5], 30, 256)[4]
    expected = expected_tokens([5], 20, 256, min_tokens=12, stop_token_ids=(stop,))
    assert stop not in expected[:12]
    engine = engine_of(guess=right)
    params = SamplingParams(temperature=0, max_tokens=20, min_tokens=12, stop_token_ids=[stop])
    output = engine.add_request("a", [5], params)
    run(engine)
    end = expected.index(stop) + 1 if stop in expected else 20
    assert tokens_of(output) == expected[:end]


def test_each_model_on_a_device_leaves_the_other_what_its_steps_take() -> None:
    class Sized(FakeBackend):
        def __init__(self, reserved: int, **settings: Any) -> None:
            super().__init__(**settings)
            self.reserved = reserved

        def kv_cache_budget(self, **_: int) -> KvCacheBudget:
            return KvCacheBudget(available_bytes=10_000 - self.reserved, bytes_per_block=10, reserved_bytes=self.reserved)

    target, draft = Sized(3000, max_draft_tokens=4), Sized(2000)
    config = EngineConfig(max_draft_tokens=4, max_model_len=64)
    assert Engine(target, draft, config=config).num_blocks == (10_000 - 3000 - 2000) // 20


def test_a_draft_that_is_the_target_is_always_right() -> None:
    draft = FakeBackend()
    engine = engine_of(draft=draft)
    outputs = [
        engine.add_request(str(i), list(range(20 + i)), SamplingParams(temperature=i % 2, seed=i, max_tokens=20))
        for i in range(4)
    ]
    run(engine)
    for i, output in enumerate(outputs):
        assert tokens_of(output) == expected_tokens(list(range(20 + i)), 20, 256, temperature=i % 2, seed=i)
        assert output.metrics.num_accepted_tokens == output.metrics.num_draft_tokens > 0
    engine.close()
    assert draft.closed


def test_a_prefix_is_computed_once_by_the_draft_too() -> None:
    computed = []
    draft = FakeBackend(on_submit=lambda batch: computed.append(batch.num_tokens))
    engine = engine_of(draft=draft)
    params = SamplingParams(temperature=0, max_tokens=8)
    for i in range(3):
        engine.add_request(str(i), [*range(32), i], params)
        run(engine)
    assert sum(computed) < 33 + 2 * 5 + 3 * 8


def test_a_draft_catches_up_in_pieces_while_others_run() -> None:
    sizes = []
    draft = FakeBackend(on_submit=lambda batch: sizes.append(batch.num_tokens))
    engine = engine_of(draft=draft, max_num_batched_tokens=10)
    output = engine.add_request("a", list(range(40)), SamplingParams(temperature=0, max_tokens=16))
    run(engine)
    assert tokens_of(output) == expected_tokens(list(range(40)), 16, 256)
    assert max(sizes) == 10
    assert output.metrics.num_accepted_tokens > 0


def test_a_draft_that_fails_costs_speed_alone(caplog: pytest.LogCaptureFixture) -> None:
    def fail(batch: Batch) -> Exception | None:
        return BackendError("a bad draft") if batch.step_id > 3 else None

    engine = engine_of(draft=FakeBackend(fail_result=fail))
    outputs = [engine.add_request(str(i), [i] * 9, SamplingParams(temperature=0, max_tokens=30)) for i in range(3)]
    run(engine)
    for i, output in enumerate(outputs):
        assert tokens_of(output) == expected_tokens([i] * 9, 30, 256)
    assert "draft_model failed and is left out" in caplog.text


def test_a_draft_is_asked_for_no_grammar_that_it_does_not_know() -> None:
    backend = FakeBackend(supports_structured_outputs=True, max_draft_tokens=4)
    engine = engine_of(backend, draft=FakeBackend())
    grammar = StructuredOutputsParams(json_object=True)
    held = engine.add_request("a", [1, 2], SamplingParams(temperature=0, max_tokens=12, structured_outputs=grammar))
    free = engine.add_request("b", [1, 2], SamplingParams(temperature=0, max_tokens=12))
    run(engine)
    assert tokens_of(held) == expected_tokens([1, 2], 12, 256, structured=True)
    assert free.metrics.num_accepted_tokens > 0


@pytest.mark.parametrize("where", ["submit", "result"])
def test_a_step_with_guesses_that_fails_is_run_again(where: str) -> None:
    failed = []

    def fail(batch: Batch) -> Exception | None:
        if batch.num_draft.any() and len(failed) < 3 and batch.step_id % 4 == 0:
            failed.append(batch.step_id)
            return BackendError("a cosmic ray")
        return None

    def on_submit(batch: Batch) -> None:
        if (error := fail(batch)) is not None:
            raise error

    hooks: dict[str, Any] = {"on_submit": on_submit} if where == "submit" else {"fail_result": fail}
    engine = engine_of(FakeBackend(max_draft_tokens=4, **hooks), guess=half_right)
    outputs = [engine.add_request(str(i), [i] * 6, SamplingParams(temperature=0, max_tokens=20)) for i in range(3)]
    run(engine)
    assert failed
    for i, output in enumerate(outputs):
        assert tokens_of(output) == expected_tokens([i] * 6, 20, 256)


@pytest.mark.parametrize(
    "lie",
    [
        lambda tokens: tokens[:, ::-1].copy(),  # not from the left
        lambda tokens: tokens * 0 + 3,  # more than the guesses and one
        lambda tokens: tokens + (tokens >= 0),  # accepted what was not guessed
    ],
)
def test_a_backend_that_accepts_what_was_not_guessed_is_not_believed(lie: Callable[[Any], Any]) -> None:
    class Liar(FakeBackend):
        def _run(self, batch: Batch) -> Any:
            output = super()._run(batch)
            if batch.num_draft.any():
                output.token_ids[:] = lie(output.token_ids)
            return output

    engine = engine_of(Liar(max_draft_tokens=4), guess=right)
    output = engine.add_request("a", [1], SamplingParams(temperature=0, max_tokens=9))
    run(engine)
    assert tokens_of(output) == expected_tokens([1], 9, 256)  # without guesses, in the end


def test_guesses_take_only_what_is_left() -> None:
    """Of the budget, of the blocks and of the request: nobody gives way for a guess."""
    sizes = []
    backend = FakeBackend(max_draft_tokens=4, on_submit=lambda batch: sizes.append(batch.num_tokens))
    engine = engine_of(backend, guess=right, max_num_batched_tokens=10, num_blocks=20)
    outputs = [engine.add_request(str(i), [i] * 3, SamplingParams(temperature=0, max_tokens=17)) for i in range(4)]
    run(engine)
    assert max(sizes) == 10
    assert engine.scheduler.num_preemptions == 0
    for i, output in enumerate(outputs):
        assert tokens_of(output) == expected_tokens([i] * 3, 17, 256)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("guess", [None, right])
def test_rows_under_a_grammar_wait_for_their_token(overlap: bool, guess: Guess | None) -> None:
    """The fake backend raises if it is asked to go on from a token that the host does not know."""
    backend = FakeBackend(supports_overlap=overlap, supports_structured_outputs=True, max_draft_tokens=4)
    engine = engine_of(backend, guess=guess, max_draft_tokens=4 if guess else 0)
    grammar = StructuredOutputsParams(json_object=True)
    held = engine.add_request("held", [1, 2], SamplingParams(temperature=0, max_tokens=12, structured_outputs=grammar))
    free = engine.add_request("free", [1, 2], SamplingParams(temperature=0, max_tokens=12))
    run(engine)
    assert tokens_of(held) == expected_tokens([1, 2], 12, 256, structured=True)
    assert tokens_of(free) == expected_tokens([1, 2], 12, 256)


def test_metrics_say_what_guesses_brought() -> None:
    engine = engine_of(guess=half_right)
    output = engine.add_request("a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=30))
    run(engine)
    samples = {
        (sample.name, sample.labels.get("position")): sample.value
        for family in engine.metrics.registry.collect()
        for sample in family.samples
        if "spec_decode" in sample.name
    }
    drafts = samples["vllm:spec_decode_num_drafts_total", None]
    accepted = samples["vllm:spec_decode_num_accepted_tokens_total", None]
    assert samples["vllm:spec_decode_num_draft_tokens_total", None] == output.metrics.num_draft_tokens
    assert accepted == output.metrics.num_accepted_tokens > 0
    per_position = [samples["vllm:spec_decode_num_accepted_tokens_per_pos_total", str(i)] for i in range(4)]
    assert sum(per_position) == accepted
    assert drafts >= per_position[0] >= per_position[1] >= per_position[2] >= per_position[3]
    assert engine.metrics.generation_tokens == 30
    plain = engine_of(max_draft_tokens=0)
    assert not [f for f in plain.metrics.registry.collect() if "spec_decode" in f.name]


def test_a_repeating_model_is_guessed_by_lookup_and_by_memory() -> None:
    """With two tokens the fake model soon repeats itself; what one request said helps the next."""
    for name in ("ngram", "suffix"):
        engine = engine_of(FakeBackend(vocab_size=2, max_draft_tokens=4), proposers=(name,), prompt_lookup_max=4)
        outputs = []
        for i in range(3):
            outputs.append(engine.add_request(str(i), [1, 0, 1], SamplingParams(temperature=0, max_tokens=50)))
            run(engine)
        assert all(tokens_of(output) == expected_tokens([1, 0, 1], 50, 2) for output in outputs)
        assert outputs[-1].metrics.num_accepted_tokens > (20 if name == "suffix" else 0)
