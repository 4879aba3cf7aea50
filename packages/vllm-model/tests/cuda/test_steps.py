"""The CUDA backend with all that it does, on a card or on Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_core import Engine, EngineConfig, SamplingParams
from vllm_model.kernels.warp_decode import has_warps
from vllm_traits import conformance

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")


@pytest.mark.parametrize("law", conformance.LAWS, ids=lambda law: law.__name__)
def test_the_contract(law: Callable[..., None], make_backend: Callable[..., Any]) -> None:
    if law is conformance.guesses_change_nothing and not torch.cuda.is_available():
        pytest.skip("hundreds of steps, which take the interpreter minutes")
    law(make_backend)


PENALTIES = {"temperature": 0.0, "frequency_penalty": 2.0, "logit_bias": dict.fromkeys([3, 40, 41], 100.0)}
"""Three tokens take turns: each guess decides what comes behind it."""


@pytest.mark.parametrize(
    ("num_right", "special"),
    [(0, {"temperature": 0.0}), (2, {}), (8, {}), (4, PENALTIES)],
    ids=["0 greedy", "2", "8", "4 penalised"],
)
def test_steps_with_guesses_are_graphs(num_right: int, special: dict[str, Any], make_backend: Callable[..., Any]) -> None:
    """Beside a row without guesses and one that is still at its prompt: the tokens of single steps."""
    params = SamplingParams(**{"temperature": 0.9, "seed": 5, "ignore_eos": True} | special)
    prompt = [(7 * i + 3) % 97 for i in range(19)]
    driver = conformance.Driver(make_backend())
    driver.place(0, prompt, [3, 9], params)
    truth = driver.generate(0, 10)
    backend = make_backend()
    conformance._guess(backend, prompt, params, truth, num_right)
    assert {width for _, width, _ in backend.steps.short.graphs} >= {9}


def test_a_draft_on_the_device_guesses_what_the_target_says(make_backend: Callable[..., Any]) -> None:
    """The same model twice: every guess is right, and the tokens are those of the target alone."""

    def run(draft: Any) -> Any:
        config = EngineConfig(
            max_num_seqs=3, max_num_batched_tokens=64, num_blocks=32, max_draft_tokens=3 if draft is not None else 0
        )
        engine = Engine(make_backend(), draft, config=config)
        outputs = [
            engine.add_request(
                str(i), [i + 1] * (5 + i), SamplingParams(temperature=0.9, seed=i, max_tokens=9, ignore_eos=True)
            )
            for i in range(2)
        ]
        while engine.has_unfinished_requests():
            engine.step()
        return [output.outputs[0].token_ids for output in outputs], engine.scheduler

    alone, _ = run(None)
    together, scheduler = run(make_backend())
    assert together == alone
    assert scheduler.num_draft_tokens > 0


@pytest.mark.parametrize("special", [{"temperature": 0.0}, {"top_p": 0.8, "repetition_penalty": 1.5}, {"logprobs": 2}], ids=str)
def test_prompts_are_graphs_however_they_are_sampled(special: dict[str, Any], make_backend: Callable[..., Any]) -> None:
    """Kernel by kernel, the host takes longer for a short prompt than the device; the tokens are the same."""

    def run(graphs: bool) -> list[list[int]]:
        engine = Engine(make_backend(), config=EngineConfig(max_num_seqs=3, max_num_batched_tokens=64, num_blocks=32))
        steps: Any = engine.target_model.steps
        if graphs:
            steps.loose.run = None  # it must not be called
        else:
            steps.chunk.size_for = lambda batch: None
        params = SamplingParams(**{"temperature": 0.9, "seed": 3, "max_tokens": 3, "ignore_eos": True} | special)
        outputs = [engine.add_request(str(length), list(range(length)), params) for length in (1, 3, 70)]
        while engine.has_unfinished_requests():
            engine.step()
        return [output.outputs[0].token_ids for output in outputs]

    tokens, others = run(graphs=True), run(graphs=False)
    assert [len(each) for each in tokens] == [3, 3, 3]
    if not torch.cuda.is_available():  # where products of other sizes round differently
        assert tokens == others


def test_a_long_row_beside_a_prompt_is_not_read_by_a_graphs_few_programs(
    make_backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_model.cuda.chunk_steps.LONGEST_SINGLE", 20)
    driver = conformance.Driver(make_backend())
    loose, runs = driver.backend.steps.loose, []  # type: ignore[attr-defined]
    monkeypatch.setattr(loose, "run", lambda *args, run=loose.run: (runs.append(1), run(*args))[1])
    for slot, (length, blocks) in enumerate([(19, [3, 9]), (30, [4, 5]), (60, [6, 7, 8, 10])]):
        driver.place(slot, list(range(length)), blocks)
    driver.run([(0, range(18)), (1, range(29))])
    driver.run([(0, [18]), (2, range(20))])
    assert not runs
    driver.run([(1, [29]), (2, range(20, 40))])
    assert len(runs) == 1


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not has_warps(torch.device("cuda", torch.cuda.current_device())),
    reason="needs a Hopper GPU and torch for CUDA",
)
def test_decode_from_the_products_heads_says_what_finished_heads_do(
    random_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine with heads of 64, which warps take, 40 rows at once; and with the rotary kernel before attention."""
    from vllm_model.cuda.forward import Forward
    from vllm_model.cuda_backend import CudaBackend
    from vllm_model.loaders import load_config, load_weights

    folder, _ = random_model("Qwen3ForCausalLM", head_dim=64, hidden_size=64, num_attention_heads=4)
    config = load_config(folder)
    attended = []

    def run() -> list[Any]:
        weights = load_weights(folder, config, dtype=torch.float16, device=torch.device("cuda"))
        backend = CudaBackend(config, weights, kv_cache_memory_bytes=1 << 26)
        engine = Engine(backend, config=EngineConfig(max_num_seqs=40, max_num_batched_tokens=2048))
        params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, logprobs=0)
        outputs = [engine.add_request(str(i), [(5 * j + i) % 97 for j in range(7 + 2 * i)], params) for i in range(40)]
        while engine.has_unfinished_requests():
            engine.step()
        return [output.outputs[0] for output in outputs]

    attend_raw = Forward.attend_raw
    monkeypatch.setattr(Forward, "attend_raw", lambda *args: (attended.append(1), attend_raw(*args))[1])
    ours = run()
    assert attended
    monkeypatch.setattr(Forward, "takes_raw", lambda self, plan: False)
    attended.clear()
    others = run()
    assert not attended
    same = 0
    for mine, other in zip(ours, others, strict=True):
        pairs = zip(mine.token_ids, other.token_ids, strict=True)
        until = next((i for i, (a, b) in enumerate(pairs) if a != b), 29)  # behind a near tie they go their own ways
        same += until
        for a, b in zip(mine.logprobs[: until + 1], other.logprobs[: until + 1], strict=True):
            assert a.logprobs[0] == pytest.approx(b.logprobs[0], abs=0.05)
    assert same > 0.8 * 40 * 29
