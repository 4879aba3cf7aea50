"""What a simulated workload holds, drawn from a seed: the engine, its model, who comes when with what, and what goes wrong."""

from dataclasses import dataclass, field
from random import Random
from typing import Any

from vllm_core.engine import _derive_seed
from vllm_core.engine_config import EngineConfig
from vllm_traits.fake_backend import Fault, expected_tokens
from vllm_traits.sampling_params import SamplingParams, StructuredOutputsParams

FAULTS = tuple(fault for fault in Fault if fault is not Fault.DIE)
GUESSES = ("right", "partly", "wrong", "short", "raises")
"""How a simulated proposer guesses; it changes from call to call for ``partly``."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What one choice must say: all its tokens, why it ends, and with which stop token."""

    token_ids: list[int]
    finish_reason: str
    stop_reason: int | None


@dataclass(slots=True)
class SimulatedRequest:
    """One request, and when it comes."""

    name: str
    arrival: float
    prompt: list[int]
    params: SamplingParams
    priority: int
    salt: str | None


@dataclass(frozen=True, slots=True)
class Deed:
    """Something done to the engine between two steps.

    Args:
        time: When, in seconds of the virtual clock.
        kind: ``abort``, ``choice``, ``reset``, ``priority``.
        name: The request that it is done to.
        number: Of the choice; the new priority.
    """

    time: float
    kind: str
    name: str = ""
    number: int = 0


@dataclass(slots=True)
class Scenario:
    """A workload. Equal seeds give equal ones.

    Attributes:
        config: The engine's, with the pool's size.
        backend: Arguments of the fake backend.
        requests: In order of arrival.
        deeds: In order of time.
        fault_rate: Share of steps that something befalls.
        faults: What may.
        guesses: How proposers guess, one proposer each; empty: no speculation.
        has_draft: A second fake backend drafts.
    """

    seed: int
    config: EngineConfig
    backend: dict[str, Any]
    requests: list[SimulatedRequest] = field(default_factory=list)
    deeds: list[Deed] = field(default_factory=list)
    fault_rate: float = 0.0
    faults: tuple[Fault, ...] = ()
    guesses: tuple[str, ...] = ()
    has_draft: bool = False

    @property
    def max_model_len(self) -> int:
        """Of engine and model alike."""
        return int(self.backend["max_model_len"])

    def expected(self, request: SimulatedRequest, index: int) -> Ending:
        """What choice ``index`` of a request says when it runs alone."""
        params, vocab_size, eos = request.params, self.backend["vocab_size"], self.backend["eos_token_ids"]
        assert params.seed is not None
        most = min(params.max_tokens or self.max_model_len, self.max_model_len - len(request.prompt))
        ends = () if params.ignore_eos else eos
        tokens = expected_tokens(
            request.prompt,
            most,
            vocab_size,
            temperature=params.temperature,
            seed=params.seed if index == 0 else _derive_seed(params.seed, index),
            structured=params.structured_outputs is not None,
            penalised=params.has_penalties,
            min_tokens=params.min_tokens,
            stop_token_ids=(*ends, *(params.stop_token_ids or ())),
        )
        for num, token in enumerate(tokens, 1):
            if num >= params.min_tokens and token in ends:
                return Ending(tokens[:num], "stop", None)
            if num >= params.min_tokens and token in (params.stop_token_ids or ()):
                return Ending(tokens[:num], "stop", token)
        return Ending(tokens, "length", None)


def draw(seed: int) -> Scenario:
    """The workload of a seed."""
    r = Random(seed)
    scenario = _engine(seed, r)
    streams = [
        [r.randrange(scenario.backend["vocab_size"]) for _ in range(scenario.max_model_len)] for _ in range(r.randint(1, 3))
    ]
    time, together = 0.0, r.random() < 0.3
    for number in range(r.randint(1, 12)):
        time += 0.0 if together else r.expovariate(1 / 0.04)
        scenario.requests.append(_request(f"r{number}", time, scenario, streams, r))
    _draw_trouble(scenario, r)
    return scenario


def _engine(seed: int, r: Random) -> Scenario:
    """The engine and its model. Half of the pools hold just the longest request, or a little more."""
    block_size, overlap = r.choice([2, 3, 4, 8]), r.random() < 0.5
    max_model_len = r.randint(6, 40)
    least = -(-(max_model_len - 1) // block_size)  # the last token is not run
    max_num_seqs = r.randint(1, 6)
    guesses = tuple(r.choice(GUESSES) for _ in range(r.randint(1, 2))) if r.random() < 0.5 else ()
    has_draft = r.random() < (0.3 if guesses else 0.1)
    built_in = tuple(name for name in ("ngram", "suffix") if r.random() < 0.15)
    max_draft_tokens = r.randint(1, 4) if guesses or has_draft or built_in else 0
    policy = r.choice(["fcfs", "priority", "lpm"])
    config: dict[str, Any] = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(max_num_seqs, r.randint(1, 24)),
        "block_size": block_size,
        "max_model_len": max_model_len,
        "num_blocks": least + r.choice([0, 0, 1, 2, 8, 40]),
        "enable_prefix_caching": r.random() < 0.75,
        "scheduling_policy": policy,
        "priority_aging": r.choice([0, 1, 4, 1024]),
        "long_prefill_token_threshold": r.choice([0, 0, 3]),
        "max_draft_tokens": max_draft_tokens,
        "proposers": built_in,
        "prompt_lookup_min": 1,
    }
    backend = {
        "vocab_size": r.choice([4, 9, 50]),
        "max_model_len": max_model_len,
        "eos_token_ids": (1,) if r.random() < 0.4 else (),
        "supports_overlap": overlap,
        "max_draft_tokens": max_draft_tokens,
        "supports_structured_outputs": True,
    }
    return Scenario(seed, EngineConfig(**config), backend, guesses=guesses, has_draft=has_draft)


def _request(name: str, time: float, scenario: Scenario, streams: list[list[int]], r: Random) -> SimulatedRequest:
    vocab_size, most = scenario.backend["vocab_size"], scenario.max_model_len - 1
    length = r.randint(1, most)
    if scenario.requests and r.random() < 0.25:  # the next turn of a conversation
        last = r.choice(scenario.requests)
        start = [*last.prompt, *scenario.expected(last, 0).token_ids]
    else:
        start = r.choice(streams)[: r.randint(0, length)]
    prompt = [*start, *(r.randrange(vocab_size) for _ in range(length - len(start)))][:most]
    chosen: dict[str, Any] = {
        "temperature": r.choice([0.0, 1.0]),
        "seed": r.randint(-5, 5),
        "max_tokens": r.choice([1, 2, 3, 5, 8, 12, 20, None]),
        "n": r.choice([1, 1, 1, 2, 3]),
    }
    rare: dict[str, Any] = {
        "presence_penalty": 1.0,
        "stop_token_ids": [r.randrange(vocab_size)],
        "ignore_eos": True,
        "logprobs": 2,
        "prompt_logprobs": 1,
        "structured_outputs": StructuredOutputsParams(regex="x"),
        "min_tokens": r.randint(0, chosen["max_tokens"] or 4),
    }
    chosen |= {key: value for key, value in rare.items() if r.random() < 0.15}
    salt = r.choice(["a", "b"]) if r.random() < 0.2 else None
    return SimulatedRequest(name, time, prompt, SamplingParams(**chosen), r.randint(0, 2), salt)


def _draw_trouble(scenario: Scenario, r: Random) -> None:
    """Aborts, resets, new priorities, faults."""
    for request in scenario.requests:
        time = request.arrival + r.uniform(0, 0.3)
        if r.random() < 0.08:
            scenario.deeds.append(Deed(time, "abort", request.name))
        if r.random() < 0.05:
            scenario.deeds.append(Deed(time, "choice", request.name, r.randrange(request.params.n)))
        if r.random() < 0.1:
            scenario.deeds.append(Deed(time, "priority", request.name, r.randint(-1, 3)))
    if r.random() < 0.3:
        scenario.deeds += [Deed(r.uniform(0, 1), "reset") for _ in range(4)]
    scenario.deeds.sort(key=lambda deed: deed.time)
    if r.random() < 0.3:
        scenario.fault_rate = r.choice([0.02, 0.1, 0.4])
        scenario.faults = FAULTS if r.random() < 0.5 else (r.choice(FAULTS),)
