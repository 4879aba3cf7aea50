"""Settings, from flags, ``VLLM_*`` variables and a TOML file, in that order of precedence."""

import argparse
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import msgspec

from vllm_model import SpeculativeConfig
from vllm_traits.errors import ConfigError

OTHER_VARIABLES = frozenset({"VLLM_CACHE_ROOT", "VLLM_CPU_ISA", "VLLM_VENV"})
"""Known variables that are no setting of the server: the cache folder, the compiled kernels to use, the quick start's
environment."""
MODEL, ENGINE, SERVER = "Model", "Engine", "Server"


def _option(default: Any, group: str, text: str, *, choices: tuple[str, ...] | None = None) -> Any:
    metadata = {"group": group, "help": text, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Every setting of the server. Names are vLLM's; a field ``max_model_len`` is the flag ``--max-model-len``, the variable
    ``VLLM_MAX_MODEL_LEN`` and the TOML key ``max_model_len``.
    """

    model: str = _option("default", MODEL, "folder, .gguf file, Hugging Face id, or 'default' for SmolLM2-135M-Instruct")
    served_model_name: str | None = _option(None, MODEL, "the name that clients ask for; the model's own if not given")
    revision: str | None = _option(None, MODEL, "branch, tag or commit of a Hugging Face id")
    load_format: str = _option(
        "auto", MODEL, "dummy: random weights from the configuration", choices=("auto", "safetensors", "gguf", "dummy")
    )
    dtype: str = _option("auto", MODEL, "what to compute in", choices=("auto", "bfloat16", "float16", "float32"))
    quantization: str | None = _option(
        None,
        MODEL,
        "weights of 8 or 4 bits (CPU), or none: dequantized; as the file stores them if not given",
        choices=("none", "int8", "int4"),
    )
    device: str = _option("auto", MODEL, "auto, cpu, cuda or cuda:N")
    num_threads: int | None = _option(None, MODEL, "CPU threads of the model; the physical cores it may use if not given")
    chat_template: str | None = _option(None, MODEL, "a Jinja file in place of the model's own template")
    backend: str | None = _option(
        None, MODEL, "another backend: package.module:factory, called with the model's path, or the name of an entry point"
    )
    max_model_len: int | None = _option(
        None, ENGINE, "longest request in tokens, prompt and answer; the model's own if not given"
    )
    max_num_seqs: int = _option(256, ENGINE, "requests that run at once")
    max_num_batched_tokens: int = _option(4096, ENGINE, "tokens that one step runs")
    block_size: int = _option(16, ENGINE, "tokens per KV block")
    gpu_memory_utilization: float = _option(0.9, ENGINE, "share of a GPU's memory to use")
    kv_cache_memory_bytes: int | None = _option(None, ENGINE, "memory for the KV cache; sized by itself if not given")
    kv_cache_dtype: str = _option(
        "auto", ENGINE, "what the KV cache holds; fp8: half the memory, on a GPU", choices=("auto", "fp8", "fp8_e4m3")
    )
    enable_prefix_caching: bool = _option(True, ENGINE, "keep KV blocks for prompts that begin alike")
    scheduling_policy: str = _option(
        "fcfs",
        ENGINE,
        "who runs first; lpm: the longest cached prefix among the first that wait",
        choices=("fcfs", "priority", "lpm"),
    )
    priority_aging: int = _option(1024, ENGINE, "later requests that a level of priority lets overtake; 0: any number")
    max_num_waiting: int = _option(10_000, ENGINE, "requests that may wait; more are refused with 429")
    long_prefill_token_threshold: int = _option(0, ENGINE, "most tokens of one prompt in one step; 0: no limit of its own")
    speculative_config: str | None = _option(
        None, ENGINE, 'who guesses tokens ahead, as JSON: {"method": "ngram"}, or suffix, or draft_model with a model'
    )
    seed: int = _option(0, ENGINE, "seeds of requests without one derive from it")
    tensor_parallel_size: int = _option(1, ENGINE, "devices; only 1 is supported")
    host: str = _option("127.0.0.1", SERVER, "address to listen on; 0.0.0.0 for all")
    port: int = _option(8000, SERVER, "port to listen on")
    api_key: list[str] = _option([], SERVER, "a key that clients must send; may be given several times")
    max_body_bytes: int = _option(32 << 20, SERVER, "largest request body")
    shutdown_timeout: float = _option(60.0, SERVER, "seconds that running requests get to finish after SIGTERM")
    log_level: str = _option("info", SERVER, "what is logged", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        if self.tensor_parallel_size != 1:
            raise ConfigError(f"tensor_parallel_size is {self.tensor_parallel_size}; only 1 is supported.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be 0 to 65535.")
        if self.max_body_bytes < 1 or self.shutdown_timeout < 0:
            raise ConfigError("max_body_bytes must be at least 1 and shutdown_timeout at least 0.")
        if self.speculative_config is not None:
            SpeculativeConfig.parse(self.speculative_config)
        if any(not key for key in self.api_key):
            raise ConfigError("api_key must not be empty.")


_FIELDS = {item.name: item for item in fields(ServerConfig)}
_EPILOG = """\
Each flag can also be given as a variable (--max-model-len: VLLM_MAX_MODEL_LEN) or in the TOML file named by --config or
VLLM_CONFIG (max_model_len = 4096). Flags win over variables, variables over the file.

examples:
  vllm-server                                        the default model on http://127.0.0.1:8000
  vllm-server serve ./model.gguf --port 9000
  vllm-server serve Qwen/Qwen3-0.6B --max-model-len 8192 --api-key secret

then:
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
"""


def parse_config(arguments: Sequence[str], environment: Mapping[str, str], version: str) -> ServerConfig:
    """Put the settings together.

    Args:
        arguments: Of the command line, without the program.
        environment: Where to look for ``VLLM_*``.
        version: What ``--version`` prints.

    Raises:
        ConfigError: A key is not known or a value cannot be; the message names it.
        SystemExit: After ``--help``, ``--version`` or a wrong flag.
    """
    given = vars(_parser(version).parse_args([] if list(arguments) == ["serve"] else _without_serve(arguments)))
    values: dict[str, Any] = {}
    config_file = given.pop("config", None) or environment.get("VLLM_CONFIG")
    if config_file:
        values |= _from_file(Path(config_file))
    values |= _from_environment(environment)
    values |= given
    return ServerConfig(**values)


def _without_serve(arguments: Sequence[str]) -> list[str]:
    return list(arguments[1:] if arguments and arguments[0] == "serve" else arguments)


class _Parser(argparse.ArgumentParser):
    """Names the nearest flag to one that is not known."""

    def error(self, message: str) -> NoReturn:
        words = message.removeprefix("unrecognized arguments: ").split()
        if words and message.startswith("unrecognized") and words[0].startswith("--"):
            near = difflib.get_close_matches(words[0].partition("=")[0], list(self._option_string_actions), n=1)
            message += f" (did you mean {near[0]}?)" if near else ""
        super().error(message)


def _parser(version: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vllm-server",
        usage="vllm-server [serve] [MODEL] [options]",
        description="Serve a language model over the OpenAI API.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=_FIELDS["model"].metadata["help"])
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    parser.add_argument("--version", action="version", version=f"vllm-server {version}")
    groups = {name: parser.add_argument_group(name) for name in (MODEL, ENGINE, SERVER)}
    for item in fields(ServerConfig):
        if item.name == "model":
            continue
        kind = _kind(item.type)
        flag = "--" + item.name.replace("_", "-")
        default = "" if item.default is None or kind is list else f" (default: {item.default})"
        options: dict[str, Any] = {"help": item.metadata["help"] + default}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is list:
            options |= {"action": "append", "metavar": "TEXT"}
        else:
            options |= {"type": kind, "choices": item.metadata["choices"]}
            if item.metadata["choices"] is None:
                options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
        groups[item.metadata["group"]].add_argument(flag, **options)
    return parser


def _kind(annotation: Any) -> type:
    """``int``, ``float``, ``str``, ``bool`` or ``list``, of a field's type."""
    if get_origin(annotation) is list:
        return list
    options = [option for option in get_args(annotation) if option is not type(None)]
    kind = options[0] if options else annotation
    assert isinstance(kind, type)
    return kind


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith("VLLM_") or variable in OTHER_VARIABLES or variable == "VLLM_CONFIG":
            continue
        name = variable.removeprefix("VLLM_").lower()
        _check_known(name, variable, [f"VLLM_{known.upper()}" for known in _FIELDS])
        values[name] = _converted(name, text, variable)
    return values


def _from_file(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error}.") from error
    for name, value in table.items():
        _check_known(name, f"{name} in {path}", list(_FIELDS))
        if name == "speculative_config" and isinstance(value, dict):  # a table here is what is JSON elsewhere
            table[name] = msgspec.json.encode(value).decode()
            continue
        kind = _kind(_FIELDS[name].type)
        fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{name} in {path} is {value!r}; it must be of type {kind.__name__}.")
        _check_choice(name, value, f"{name} in {path}")
    return table


def _converted(name: str, text: str, source: str) -> Any:
    kind = _kind(_FIELDS[name].type)
    if kind is list:
        return [part.strip() for part in text.split(",") if part.strip()]
    if kind is bool:
        known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
        if text.lower() not in known:
            raise ConfigError(f"{source} is {text!r}; it must be true or false.")
        return known[text.lower()]
    try:
        value = kind(text)
    except ValueError as error:
        raise ConfigError(f"{source} is {text!r}; it must be of type {kind.__name__}.") from error
    _check_choice(name, value, source)
    return value


def _check_choice(name: str, value: Any, source: str) -> None:
    choices = _FIELDS[name].metadata["choices"]
    if choices is not None and value not in choices:
        raise ConfigError(f"{source} is {value!r}; it must be one of: {', '.join(choices)}.")


def _check_known(name: str, source: str, known: list[str]) -> None:
    if name not in _FIELDS:
        near = difflib.get_close_matches(source.split(" ")[0], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{source} is not a setting of vllm-server.{hint}")
