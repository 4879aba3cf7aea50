"""Text in, text out, offline."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from vllm_core import Engine, EngineConfig, RequestOutput, SamplingParams
from vllm_model.backend import load_backend
from vllm_model.chat_template import ChatTemplate, Message, encode_chat
from vllm_model.detokenizer import IncrementalDetokenizer
from vllm_model.hub import resolve_model
from vllm_model.loaders import LoadFormat
from vllm_model.quantization import Quantization
from vllm_model.speculative import SpeculativeConfig
from vllm_model.structured import Grammars
from vllm_model.tokenizer import Tokenizer
from vllm_traits.errors import InvalidRequestError

Prompt = str | Sequence[int] | Mapping[str, Any]


class LLM:
    """A model with an engine around it. Arguments are vLLM's.

    Args:
        model: A folder, a ``.gguf`` file, a Hugging Face id, or ``"default"``.
        dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto``, ``cpu`` or ``cuda``.
        load_format: ``auto``, ``safetensors``, ``gguf``, or ``dummy`` for random weights.
        quantization: None: a GGUF file's packed weights stay packed on the CPU; ``none``: dequantized; ``int8``, ``int4``:
            quantized as they are loaded (CPU).
        max_model_len: Longest sequence in tokens; None: the model's own.
        max_num_seqs, max_num_batched_tokens, block_size, enable_prefix_caching, seed: See :class:`~vllm_core.EngineConfig`.
        num_blocks: KV blocks; None: what fits into the memory.
        gpu_memory_utilization: Share of a GPU's memory to use.
        kv_cache_memory_bytes: For the KV cache; None: sized by itself.
        kv_cache_dtype: ``auto``, or ``fp8`` for a KV cache of half the size; see :func:`~vllm_model.load_backend`.
        speculative: Who guesses tokens ahead: a :class:`~vllm_model.SpeculativeConfig`, or what it is made of as a mapping or
            JSON, ``{"method": "ngram"}`` for one. The output is the same, it comes faster.
        skip_tokenizer_init: Token ids in, token ids out.
        num_threads: On the CPU; None: the physical cores that this process may use.
        revision: Of a Hugging Face id.

    Raises:
        ConfigError, ModelLoadError: See :func:`~vllm_model.load_backend`.
    """

    def __init__(
        self,
        model: str | Path | None = "default",
        *,
        dtype: str = "auto",
        device: str = "auto",
        load_format: LoadFormat = "auto",
        quantization: Quantization | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 4096,
        block_size: int = 16,
        num_blocks: int | None = None,
        gpu_memory_utilization: float = 0.9,
        kv_cache_memory_bytes: int | None = None,
        kv_cache_dtype: str = "auto",
        enable_prefix_caching: bool = True,
        speculative: SpeculativeConfig | Mapping[str, Any] | str | None = None,
        skip_tokenizer_init: bool = False,
        seed: int = 0,
        num_threads: int | None = None,
        revision: str | None = None,
    ) -> None:
        speculation = None if speculative is None else SpeculativeConfig.parse(speculative)
        path = resolve_model(model, revision=revision)
        hardware: dict[str, Any] = {
            "device": device,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_dtype": kv_cache_dtype,
            "num_threads": num_threads,
        }
        backend = load_backend(
            path,
            dtype=dtype,
            load_format=load_format,
            quantization=quantization,
            max_model_len=max_model_len,
            seed=seed,
            **hardware,
        )
        config = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            num_blocks=num_blocks,
            enable_prefix_caching=enable_prefix_caching,
            max_num_waiting=2**31 - 1,  # whoever calls waits anyway
            seed=seed,
        )
        draft = None
        if speculation is not None:
            config = speculation.applied_to(config, backend.spec)
            draft = speculation.load_draft(**hardware)
        self.engine = Engine(backend, draft, config=config)
        self._grammars: Grammars | None = getattr(backend, "grammars", None)
        self.tokenizer = None if skip_tokenizer_init else Tokenizer.from_pretrained(path)
        self.chat_template = None if self.tokenizer is None else ChatTemplate.of(self.tokenizer)
        self._num_requests = 0
        print(self.engine.kv_cache_summary(), file=sys.stderr)  # noqa: T201 - who runs out of it wants to know the sum

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue prompts.

        Args:
            prompts: One or many: text, token ids, or ``{"prompt": ...}`` / ``{"prompt_token_ids": ...}``.
            sampling_params: One for all, or one for each.
            use_tqdm: Show a progress bar.

        Returns:
            One output a prompt, in order. Those with the largest ``max_tokens`` are begun first, so that none is left alone
            at the end.

        Raises:
            InvalidRequestError: A prompt or parameter is wrong; what was begun is aborted.
        """
        if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
            prompts = [cast("Prompt", prompts)]
        return self._run([self._token_ids(cast("Prompt", prompt)) for prompt in prompts], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many; ``options`` are those of :meth:`ChatTemplate.render`.

        Raises:
            InvalidRequestError: A message or parameter is wrong; nothing is returned.
        """
        if self.tokenizer is None:
            raise InvalidRequestError("chat needs a tokenizer: do not set skip_tokenizer_init.", "messages")
        many = messages if messages and not isinstance(messages[0], Mapping) else [messages]
        prompts = [encode_chat(self.tokenizer, self.chat_template, list(one), **options) for one in many]  # type: ignore[arg-type]
        return self._run(prompts, sampling_params, use_tqdm)

    def close(self) -> None:
        """Give the memory back; idempotent."""
        self.engine.close()

    def _token_ids(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, Mapping):
            prompt = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt["prompt"]
        if not isinstance(prompt, str):
            return prompt  # type: ignore[return-value]  # token ids, which the engine checks
        if self.tokenizer is None:
            raise InvalidRequestError("A text prompt needs a tokenizer: do not set skip_tokenizer_init.", "prompt")
        return self.tokenizer.encode(prompt)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        from tqdm import tqdm

        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise InvalidRequestError(f"{len(prompts)} prompts but {len(sampling_params)} sampling_params.", "sampling_params")
        outputs: dict[int, RequestOutput] = {}
        texts: dict[str, list[IncrementalDetokenizer]] = {}
        bar = tqdm(total=len(prompts), desc="Requests", disable=not use_tqdm, dynamic_ncols=True)
        queued, enough = 0, 2 * self.engine.config.max_num_batched_tokens

        def step() -> None:
            for output in self.engine.step():
                if output.request_id in texts:
                    self._detokenize(output, texts[output.request_id])
                bar.update(output.finished)

        try:
            # The longest are begun first: what is begun last decides when all are done.
            for index in sorted(range(len(prompts)), key=lambda index: -(sampling_params[index].max_tokens or sys.maxsize)):
                prompt, params, request_id = prompts[index], sampling_params[index], str(self._num_requests + index)
                if self._grammars is not None:
                    self._grammars.check(params)
                outputs[index] = self.engine.add_request(request_id, prompt, params)
                if self.tokenizer is not None and params.detokenize:
                    texts[request_id] = [IncrementalDetokenizer(self.tokenizer, prompt, params) for _ in range(params.n)]
                elif params.stop_strings:
                    raise InvalidRequestError("stop strings need text: leave detokenize on.", "stop")
                queued += len(prompt)
                if queued >= enough:  # the device need not wait until the last prompt is taken in
                    step()
                    # Once all that was taken in runs, prompts are short or cached: rather take in all of them first.
                    queued = enough // 2 if self.engine.scheduler.num_waiting else -(1 << 60)
            while self.engine.has_unfinished_requests():
                step()
        finally:
            bar.close()
            self._num_requests += len(prompts)
            for output in outputs.values():
                self.engine.abort(output.request_id)  # only if something was raised, is there anything left
        return [outputs[index] for index in range(len(prompts))]

    def _detokenize(self, output: RequestOutput, texts: list[IncrementalDetokenizer]) -> None:
        """Bring the text of each choice up to its tokens, and end those that met a stop string."""
        for choice, text in zip(output.outputs, texts, strict=True):
            if text.stopped is not None or (text.num_tokens == len(choice.token_ids) and not choice.finished):
                continue
            by_token = choice.finish_reason == "stop"
            choice.text += text.push(choice.token_ids[text.num_tokens :], finished=choice.finished, drop_last=by_token)
            if text.stopped is not None:
                self.engine.abort_choice(output.request_id, choice.index, stop_reason=text.stopped)
                choice.finish_reason, choice.stop_reason = "stop", text.stopped
                del choice.token_ids[text.num_tokens :]
                if choice.logprobs is not None:
                    del choice.logprobs[text.num_tokens :]
                    choice.cumulative_logprob = sum(entry.logprobs[0] for entry in choice.logprobs)
