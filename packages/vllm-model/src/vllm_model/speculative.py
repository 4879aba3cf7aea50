"""What a user says about speculative decoding, under vLLM's names."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec

from vllm_core import EngineConfig
from vllm_traits.backend import ModelBackend, ModelSpec
from vllm_traits.errors import ConfigError

Method = Literal["ngram", "suffix", "draft_model"]
DEFAULT_DRAFT_TOKENS = 8


class SpeculativeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who guesses, and how much.

    Raises:
        ConfigError: A value that cannot work; the message names its key.
    """

    method: Method | tuple[Method, ...] = ()
    """One or several: ``ngram`` (the sequence itself said it before), ``suffix`` (another one did), ``draft_model``. Asked in
    this order, the draft last. Not needed beside ``model``."""
    num_speculative_tokens: int = DEFAULT_DRAFT_TOKENS
    """Most guesses for a sequence in one step; fewer, down to none, where they do not pay."""
    model: str | None = None
    """The draft: a folder, a ``.gguf`` file or a Hugging Face id; it needs the target's vocabulary."""
    prompt_lookup_min: int | None = None
    """Fewest last tokens that ``ngram`` looks for."""
    prompt_lookup_max: int | None = None
    """Most last tokens that ``ngram`` looks for."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ConfigError(f"speculative_config: method is missing; it must be {_METHODS}, or a list of them.")
        for method in self.methods:
            if self.methods.count(method) > 1:
                raise ConfigError(f"speculative_config: method holds {method!r} twice.")
        if ("draft_model" in self.methods) != (self.model is not None):
            problem = "is missing, the draft of method draft_model" if self.model is None else "needs the method draft_model"
            raise ConfigError(f"speculative_config: model {problem}.")
        if self.num_speculative_tokens < 1:
            raise ConfigError(
                f"speculative_config: num_speculative_tokens is {self.num_speculative_tokens}; it must be at least 1."
            )
        for name in ("prompt_lookup_min", "prompt_lookup_max"):
            value = getattr(self, name)
            if value is not None and "ngram" not in self.methods:
                raise ConfigError(f"speculative_config: {name} needs the method ngram.")
            if value is not None and value < 1:
                raise ConfigError(f"speculative_config: {name} is {value}; it must be at least 1.")
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        if low is not None and high is not None and low > high:
            raise ConfigError(f"speculative_config: prompt_lookup_min ({low}) must be at most prompt_lookup_max ({high}).")

    @property
    def methods(self) -> tuple[Method, ...]:
        """``method`` as a tuple."""
        if isinstance(self.method, str):
            return (self.method,)
        return self.method or (("draft_model",) if self.model is not None else ())

    @classmethod
    def parse(cls, value: "str | Mapping[str, Any] | SpeculativeConfig") -> "SpeculativeConfig":
        """From JSON, or from what it says.

        Raises:
            ConfigError: It is no JSON object, or a key is not known, or its value cannot be; the message names it.
        """
        if isinstance(value, SpeculativeConfig):
            return value
        if isinstance(value, str):
            try:
                value = msgspec.json.decode(value, type=dict[str, Any])
            except msgspec.DecodeError as error:
                raise ConfigError(f"speculative_config is not a JSON object: {error}.") from error
        for key in value:
            if key not in cls.__struct_fields__:
                near = difflib.get_close_matches(key, cls.__struct_fields__, n=1)
                hint = f" Did you mean {near[0]}?" if near else f" Known are {', '.join(cls.__struct_fields__)}."
                raise ConfigError(f"speculative_config: {key} is not known.{hint}")
        for method in _listed(value.get("method", ())):
            if method not in get_args(Method):
                raise ConfigError(f"speculative_config: method is {method!r}; it must be {_METHODS}, or a list of them.")
        try:
            return msgspec.convert(dict(value), cls)
        except msgspec.ValidationError as error:
            problem, _, key = str(error).rpartition(" - at `$.")
            raise ConfigError(f"speculative_config: {key.rstrip('`')}: {problem[:1].lower()}{problem[1:]}.") from error

    def applied_to(self, config: EngineConfig, target: ModelSpec) -> EngineConfig:
        """An engine's configuration with this speculation.

        Raises:
            ConfigError: The target cannot verify so many guesses.
        """
        if self.num_speculative_tokens > target.max_draft_tokens:
            most = f"at most {target.max_draft_tokens}" if target.max_draft_tokens else "no"
            raise ConfigError(
                f"speculative_config: num_speculative_tokens is {self.num_speculative_tokens}; {target.name} verifies {most} "
                "guesses in a step."
            )
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        low = min(config.prompt_lookup_min, high or config.prompt_lookup_min) if low is None else low
        return msgspec.structs.replace(
            config,
            max_draft_tokens=self.num_speculative_tokens,
            proposers=tuple(method for method in self.methods if method != "draft_model"),
            prompt_lookup_min=low,
            prompt_lookup_max=max(config.prompt_lookup_max, low) if high is None else high,
        )

    def load_draft(self, **settings: Any) -> ModelBackend | None:
        """The draft model, if there is one.

        Args:
            settings: Of :func:`~vllm_model.load_backend`, as for the target: device, memory, threads. The draft's ``dtype`` is
                its own best, so a small format may guess for a large one.

        Raises:
            ConfigError, ModelLoadError: See :func:`~vllm_model.load_backend`.
        """
        if self.model is None:
            return None
        from vllm_model.backend import load_backend

        return load_backend(self.model, **settings)


_METHODS = ", ".join(get_args(Method)[:-1]) + f" or {get_args(Method)[-1]}"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
