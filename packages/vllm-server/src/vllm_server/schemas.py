"""Bodies of requests: decoding is the validation."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from vllm_server.errors import HttpError
from vllm_traits.sampling_params import SamplingParams

MAX_MESSAGES = 4096
MAX_PROMPTS = 1024

Text = str
Bias = Annotated[dict[str, float], Meta(max_length=1024)]


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampling(msgspec.Struct, kw_only=True):
    """What both completion endpoints take."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=1024)] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Bias | None = None
    allowed_token_ids: Annotated[list[int], Meta(max_length=200_000)] | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    cache_salt: Annotated[str, Meta(max_length=1024)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    return_token_ids: bool | None = None
    user: str | None = None

    @property
    def score_only(self) -> bool:
        """Whether no token is wanted, only the prompt and its probabilities."""
        return False

    def sampling_params(self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        """As the engine takes them.

        Raises:
            InvalidRequestError: A value is out of its range.
        """
        if self.stream and self.prompt_logprobs is not None:
            raise HttpError(400, "prompt_logprobs cannot be streamed.", param="prompt_logprobs")
        bias = None
        if self.logit_bias is not None:
            try:
                bias = {int(token): value for token, value in self.logit_bias.items()}
            except ValueError as error:
                raise HttpError(400, "logit_bias must map token ids to numbers.", param="logit_bias") from error
        given = {
            "n": self.n,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
        }
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            logit_bias=bias,
            allowed_token_ids=self.allowed_token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class CompletionRequest(Sampling, kw_only=True):
    """Body of ``/v1/completions``."""

    prompt: str | list[int | str | list[int]]
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True

    @property
    def score_only(self) -> bool:
        return self.echo and self.max_tokens == 0

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt.

        Raises:
            HttpError: It is empty or mixes kinds.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = {type(item) for item in self.prompt}
        if kinds == {int}:
            return [self.prompt]  # type: ignore[list-item]  # all are ids
        if len(self.prompt) > MAX_PROMPTS:
            raise HttpError(400, f"prompt holds {len(self.prompt)} prompts; at most {MAX_PROMPTS}.", param="prompt")
        if len(kinds) != 1:
            raise HttpError(400, "prompt must be one or more strings, or one or more lists of token ids.", param="prompt")
        return self.prompt  # type: ignore[return-value]


class ChatRequest(Sampling, kw_only=True):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], Meta(max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    @property
    def most_tokens(self) -> int | None:
        """``max_completion_tokens``, which wins, or ``max_tokens``.

        Raises:
            HttpError: ``max_completion_tokens`` is out of its range; under the name that the client used.
        """
        if self.max_completion_tokens is None:
            return self.max_tokens
        if not 1 <= self.max_completion_tokens < 2**31:
            raise HttpError(
                400,
                f"max_completion_tokens is {self.max_completion_tokens}; it must be at least 1.",
                param="max_completion_tokens",
            )
        return self.max_completion_tokens


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of ``/tokenize``: text or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Meta(max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of ``/detokenize``."""

    model: str | None = None
    tokens: list[int]


_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEMPLATE_VARIABLES = {"enable_thinking": bool, "thinking": bool, "reasoning_effort": str, "documents": list}
_EMPTY: tuple[Any, ...] = (None, False, [], {}, "none")
_UNSUPPORTED = (
    *("tools", "functions", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("suffix", "audio", "bad_words", "logits_processors", "use_beam_search", "prompt_embeds"),
)


def refuse_unsupported(value: dict[str, Any]) -> None:
    """What would change the answer and is not there is an error, not ignored.

    Raises:
        HttpError: 400 that names the field.
    """
    for name in _UNSUPPORTED:
        if value.get(name) not in _EMPTY and value[name] != "":
            raise HttpError(400, f"{name} is not supported by this server.", param=name)
    if value.get("tool_choice") not in (None, "none", "auto"):
        raise HttpError(400, "tool_choice is not supported by this server.", param="tool_choice")
    kind = value.get("response_format")
    if kind is not None and not (isinstance(kind, dict) and kind.get("type") == "text"):
        raise HttpError(400, "response_format is not supported by this server, except type text.", param="response_format")
    if value.get("best_of") not in (None, value.get("n") or 1):
        raise HttpError(400, "best_of is not supported by this server, except equal to n.", param="best_of")
    if value.get("chat_template") is not None:
        raise HttpError(400, "A request may not bring its own chat_template.", param="chat_template")


def check_messages(messages: list[dict[str, Any]]) -> None:
    """Roles and contents.

    Raises:
        HttpError: 400 that names the message.
    """
    if not messages:
        raise HttpError(400, "messages must hold at least one message.", param="messages")
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise HttpError(
                400, f"messages[{index}].role must be one of: {', '.join(_ROLES)}.", param=f"messages[{index}].role"
            )
        if content is None and role != "assistant":
            raise HttpError(400, f"messages[{index}].content is missing.", param=f"messages[{index}].content")
        if message.get("tool_calls"):
            raise HttpError(400, "tool_calls is not supported by this server.", param=f"messages[{index}].tool_calls")


def template_variables(request: ChatRequest) -> dict[str, Any]:
    """What the template may read of the request.

    Raises:
        HttpError: 400 for a variable that is not on the list.
    """
    variables = dict(request.chat_template_kwargs or {})
    for name, value in variables.items():
        kind = _TEMPLATE_VARIABLES.get(name)
        if kind is None or not isinstance(value, kind):
            known = ", ".join(_TEMPLATE_VARIABLES)
            raise HttpError(
                400,
                f"chat_template_kwargs.{name} is not known or of the wrong type; these are: {known}.",
                param="chat_template_kwargs",
            )
    if request.reasoning_effort == "none":
        variables.setdefault("enable_thinking", False)
    return variables


def unknown_fields(value: dict[str, Any], kind: type[msgspec.Struct]) -> list[str]:
    """Fields of a body that nothing reads."""
    known = {item.name for item in msgspec.structs.fields(kind)}
    refused = {
        *_UNSUPPORTED,
        "tool_choice",
        "response_format",
        "best_of",
        "chat_template",
        "parallel_tool_calls",
        "metadata",
        "store",
    }
    return [name for name in value if name not in known and name not in refused]
