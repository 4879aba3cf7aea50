"""The real default model, SmolLM2-135M-Instruct: token for token what transformers says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vllm_core import SamplingParams
from vllm_model import LLM, Tokenizer, resolve_model
from vllm_model.loaders import load_config, load_weights, read_gguf_metadata
from vllm_traits import StructuredOutputsParams

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "1, 2, 3, 5, 8, 13,",
    "The three most important things in life are",
    "Dear Sir or Madam,\n\nI am writing to",
    "La capitale de l'Allemagne est",
]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
NUM_TOKENS = 64


@pytest.fixture(scope="module")
def gguf() -> Path:
    return resolve_model("default")


@pytest.fixture(scope="module")
def folder(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a Hugging Face folder in float32."""
    path = tmp_path_factory.mktemp("smollm2")
    config = load_config(gguf)
    save_file(load_weights(gguf, config, dtype=torch.float32), path / "model.safetensors")
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.max_model_len,
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": config.eos_token_ids[0],
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.from_pretrained(gguf)
    (path / "tokenizer.json").write_text(tokenizer._tokenizer.to_str())
    template = read_gguf_metadata(gguf)["tokenizer.chat_template"]
    settings = {"chat_template": template, "bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def expected(folder: Path, gguf: Path) -> list[list[int]]:
    """transformers' greedy continuations."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_pretrained(gguf)
    tokens = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens.append(out[0, ids.shape[1] :].tolist())
    return tokens


def generate(llm: LLM, prompts: list[Any]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def test_alone_batched_chunked_and_behind_a_prefix(folder: Path, expected: list[list[int]]) -> None:
    llm = LLM(folder, dtype="float32", max_model_len=256)
    assert generate(llm, PROMPTS[:1]) == expected[:1]
    assert generate(llm, PROMPTS) == expected
    assert llm.tokenizer is not None
    longer = [[*llm.tokenizer.encode(prompt), *tokens[:40]] for prompt, tokens in zip(PROMPTS, expected, strict=True)]
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS - 40, ignore_eos=True)
    outputs = llm.generate(longer, params, use_tqdm=False)
    assert all(output.num_cached_tokens >= 32 for output in outputs)
    assert [output.outputs[0].token_ids for output in outputs] == [tokens[40:] for tokens in expected]


def test_chunked_to_seven_tokens_a_step(folder: Path, expected: list[list[int]]) -> None:
    llm = LLM(folder, dtype="float32", max_model_len=256, max_num_seqs=4, max_num_batched_tokens=7)
    assert generate(llm, PROMPTS) == expected


def test_preempted_in_a_pool_too_small(folder: Path, expected: list[list[int]]) -> None:
    llm = LLM(folder, dtype="float32", max_model_len=112, num_blocks=16)
    assert generate(llm, PROMPTS) == expected
    assert llm.engine.scheduler.num_preemptions > 0


def test_packed_weights_say_what_they_say_dequantized(gguf: Path, expected: list[list[int]]) -> None:
    assert generate(LLM(gguf, dtype="float32", max_model_len=256), PROMPTS) == expected


# In bfloat16 several answers of this small model are within a rounding of each other.
@pytest.mark.parametrize("source", ["gguf", "folder"])
def test_the_capital_of_france(source: str, request: pytest.FixtureRequest) -> None:
    llm = LLM(request.getfixturevalue(source), dtype="float32", max_model_len=512)
    outputs = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    assert "Paris" in outputs[0].outputs[0].text
    assert outputs[0].outputs[0].finish_reason == "stop"
    assert "<|im_end|>" not in outputs[0].outputs[0].text


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 1, "maxItems": 4},
    },
    "required": ["name", "age", "hobbies"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_answers_keep_a_schema_with_guesses_too(device: str, gguf: Path) -> None:
    """The same answers, where bfloat16 leaves no ties."""
    people = ("a sailor", "a painter", "a robot", "your grandmother")
    questions = [[{"role": "user", "content": f"Describe {who} as JSON with name, age and hobbies."}] for who in people]
    held = StructuredOutputsParams(json=PERSON)
    params = [
        SamplingParams(temperature=0.4 * (i % 2), seed=i, max_tokens=200, structured_outputs=held) for i in range(len(people))
    ]

    def answers(**settings: Any) -> list[str]:
        dtype = "float32" if device == "cpu" else "bfloat16"
        llm = LLM(
            gguf, device=device, dtype=dtype, max_model_len=1024, max_num_seqs=8, kv_cache_memory_bytes=1 << 28, **settings
        )
        outputs = [output.outputs[0] for output in llm.chat(questions, params, use_tqdm=False)]
        llm.close()
        assert {output.finish_reason for output in outputs} == {"stop"}
        return [output.text for output in outputs]

    texts, guessed = answers(), answers(speculative={"method": "ngram", "num_speculative_tokens": 4})
    for text in (*texts, *guessed):
        person = json.loads(text)
        assert list(person) == ["name", "age", "hobbies"]
        assert 0 <= person["age"] <= 120
        assert 1 <= len(person["hobbies"]) <= 4
    assert guessed == texts or device == "cuda"


def test_prompt_logprobs_are_those_of_transformers(folder: Path) -> None:
    import transformers

    llm = LLM(folder, dtype="float32", max_model_len=256, max_num_batched_tokens=16, max_num_seqs=2)
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(" ".join(PROMPTS))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    entries = llm.generate([ids], params, use_tqdm=False)[0].prompt_logprobs
    assert entries is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    reference = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
    assert [entry.logprobs[0] for entry in entries[1:] if entry] == pytest.approx(reference, abs=2e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_gives_the_tokens_of_float32_wherever_they_are_decided(
    device: str, gguf: Path, folder: Path, record_property: Any
) -> None:
    """Each token is the best in float32 after those before it, but where the best two are nearer than bfloat16 can tell: six
    times the root mean square error of transformers' own bfloat16 run at that place.
    """
    import transformers

    llm = LLM(gguf, dtype="bfloat16", device=device, quantization="none", max_model_len=256, kv_cache_memory_bytes=1 << 28)
    outputs = generate(llm, PROMPTS)
    assert llm.tokenizer is not None
    prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    llm.close()
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    decided = same = 0
    for prompt, tokens in zip(prompts, outputs, strict=True):
        whole = torch.tensor([prompt + tokens[:-1]], device=device)
        with torch.inference_mode():
            exact, rounded = (model(whole, logits_to_keep=len(tokens)).logits[0].float().cpu() for model in models)
        noise = rounded - exact
        bound = 6 * (noise - noise.mean(-1, keepdim=True)).square().mean(-1).sqrt()
        best = exact.topk(2).values
        clear = best[:, 0] - best[:, 1] > bound
        right = exact.argmax(-1) == torch.tensor(tokens)
        assert right[clear].all()
        assert (best[:, 0] - exact.gather(1, torch.tensor(tokens)[:, None])[:, 0] <= bound).all()
        decided, same = decided + int(clear.sum()), same + int(right.sum())
    record_property("decided, same, of", (decided, same, len(prompts) * NUM_TOKENS))
    assert decided > len(prompts) * NUM_TOKENS // 2
