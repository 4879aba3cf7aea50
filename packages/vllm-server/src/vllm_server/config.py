"""The server's settings, from flags, ``VLLM_*`` variables and a TOML file, in that order of precedence."""

import argparse
import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from vllm_server.options import OPTIONS, Option
from vllm_traits.errors import ConfigError

MODEL = Option(name="model", parse=str, default=None, section="", help="")
OTHER_ENV = frozenset({"VLLM_CONFIG", "VLLM_CACHE_ROOT"})
"""Variables with our prefix that are no option: the file to read, and where models are cached."""

_DESCRIPTION = """\
Serve a language model over the OpenAI API.

MODEL is a folder with safetensors, a .gguf file, or a Hugging Face id. Without one, the
embedded default is served: SmolLM2-135M-Instruct, fetched once.
"""

_EPILOG = """\
Every option is also a variable, VLLM_ and its name in capitals (VLLM_MAX_MODEL_LEN=4096), and a key of
the TOML file (max-model-len = 4096, model = "..."). A flag wins over a variable, a variable over the file.
A variable holds several values with commas between them.

examples:
  vllm-server
  vllm-server serve ./Qwen3-0.6B --port 8080 --served-model-name qwen3
  vllm-server serve ./model.gguf --kv-cache-memory-bytes 2G --max-model-len 8192
  VLLM_API_KEY=secret vllm-server serve Qwen/Qwen3-0.6B --host 0.0.0.0
  vllm-server --config server.toml
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The settings; ``vllm_server.options.OPTIONS`` says what each one means.

    Raises:
        ConfigError: A value is out of its range; the message names the setting.
    """

    model: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    api_key: tuple[str, ...] = ()
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    seed: int = 0
    chat_template: str | None = None
    backend: str | None = None
    tensor_parallel_size: int = 1
    num_threads: int | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    block_size: int = 16
    enable_prefix_caching: bool = True
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 4096
    scheduling_policy: str = "fcfs"
    max_num_waiting: int = 10_000
    max_body_bytes: int = 16 * 2**20
    body_timeout: float = 30.0
    send_timeout: float = 60.0
    log_level: str = "info"
    disable_log_requests: bool = False
    shutdown_timeout: float = 60.0

    def __post_init__(self) -> None:
        for option in OPTIONS:
            _check(option, getattr(self, option.name), option.flag)
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                f"--tensor-parallel-size is {self.tensor_parallel_size}: this version runs a model on one device; leave it at 1."
            )
        if any(not key.strip() for key in self.api_key):
            raise ConfigError("--api-key is empty: give a key, or leave the option out to serve without one.")


class _Parser(argparse.ArgumentParser):
    """Errors of the command line are ConfigErrors, so that all settings fail in one way."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message[:1].upper() + message[1:] + ".")


def make_parser(version: str) -> argparse.ArgumentParser:
    """The command line; options that are not given are absent from the namespace."""
    parser = _Parser(
        prog="vllm-server",
        usage="vllm-server [serve] [MODEL] [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder, .gguf file or Hugging Face id")
    general = parser.add_argument_group("General")
    general.add_argument("-h", "--help", action="help", help="Show this text and exit.")
    general.add_argument("--version", action="version", version=f"vllm-server {version}", help="Show the version and exit.")
    general.add_argument("--config", metavar="FILE", help="TOML file with settings. [VLLM_CONFIG]")
    groups: dict[str, Any] = {}
    for option in OPTIONS:
        group = groups.setdefault(option.section, None) or parser.add_argument_group(option.section)
        groups[option.section] = group
        _add(group, option)
    return parser


def _add(group: Any, option: Option) -> None:
    default = "" if option.default in (None, ()) else f" Default: {_show(option)}."
    text = f"{option.help}{default} [{option.env}]".replace("%", "%%")
    if option.is_bool:
        action: Any = argparse.BooleanOptionalAction if option.default else "store_true"
        group.add_argument(option.flag, dest=option.name, action=action, help=text)
        return
    metavar = option.metavar or (None if option.choices else "N" if option.parse is not str else option.name.upper())
    group.add_argument(
        option.flag,
        dest=option.name,
        help=text,
        metavar="{" + ",".join(option.choices) + "}" if option.choices else metavar,
        action="append" if option.many else "store",
    )


def _show(option: Option) -> str:
    if option.is_bool:
        return "on" if option.default else "off"
    if option.name == "max_body_bytes":
        return f"{option.default // 2**20}M"
    return f"{option.default:g}" if isinstance(option.default, float) else str(option.default)


def read_config(argv: Sequence[str], environ: Mapping[str, str], *, version: str = "") -> ServerConfig:
    """Settle every setting.

    Args:
        argv: The command line without the program's name.
        environ: The environment; only names that begin with ``VLLM_`` are looked at.
        version: What ``--version`` prints.

    Raises:
        ConfigError: An unknown key or a value that cannot be; the message names it, and the nearest known key.
    """
    words = list(argv)
    if words[:1] == ["serve"]:
        del words[0]
    namespace, rest = make_parser(version).parse_known_args(words)
    if rest:
        flags = ["--config", "--version", "--help", *(option.flag for option in OPTIONS), "--no-enable-prefix-caching"]
        if rest[0].startswith("-"):
            raise _unknown("option", rest[0].partition("=")[0], flags)
        raise ConfigError(f"One MODEL at most: there is {rest[0]!r} besides {namespace.model!r}.")
    given = vars(namespace)
    config_file = given.pop("config", None) or environ.get("VLLM_CONFIG")
    values: dict[str, Any] = _from_file(config_file) if config_file else {}
    values.update(_from_environ(environ))
    by_name = {option.name: option for option in (*OPTIONS, MODEL)}
    for name, value in given.items():
        option = by_name[name]
        if option.is_bool:
            values[name] = value
        else:
            values[name] = _parse_many(option, value, option.flag) if option.many else _parse(option, value, option.flag)
    return ServerConfig(**values)


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    by_env = {option.env: option for option in (*OPTIONS, MODEL)}
    values = {}
    for name, text in sorted(environ.items()):
        if not name.startswith("VLLM_") or name in OTHER_ENV:
            continue
        option = by_env.get(name)
        if option is None:
            raise _unknown("environment variable", name, [*by_env, *OTHER_ENV])
        if option.many:
            values[option.name] = _parse_many(option, [part for part in text.split(",") if part], name)
        else:
            values[option.name] = _parse(option, text, name)
    return values


def _from_file(path: str) -> dict[str, Any]:
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The settings in {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    by_name = {option.name: option for option in (*OPTIONS, MODEL)}
    values = {}
    for key, value in document.items():
        option = by_name.get(key.replace("-", "_"))
        if option is None:
            raise _unknown(f"key in {path}:", key, [name.replace("_", "-") for name in by_name])
        where = f"{key} in {path}"
        if option.many:
            values[option.name] = _parse_many(option, value if isinstance(value, list) else [value], where)
        else:
            values[option.name] = _from_toml(option, value, where)
    return values


def _from_toml(option: Option, value: Any, where: str) -> Any:
    """A TOML value has a type already: it must be the option's, save that a size may be text."""
    if isinstance(value, str) and not option.is_bool:
        return _parse(option, value, where)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, bool) != option.is_bool or (not option.is_bool and (option.parse is str or not number)):
        raise ConfigError(f"{where} is {value!r}, which is of the wrong type.")
    return value if option.is_bool else _parse(option, repr(value), where)


def _parse_many(option: Option, texts: Iterable[Any], where: str) -> tuple[Any, ...]:
    return tuple(_parse(option, text, where) for text in texts)


def _parse(option: Option, text: Any, where: str) -> Any:
    if not isinstance(text, str):
        raise ConfigError(f"{where} is {text!r}; expected text.")
    try:
        value = option.parse(text)
    except ValueError as error:
        raise ConfigError(f"{where} is {text!r}; {error}.") from None
    _check(option, value, where)
    return value


def _check(option: Option, value: Any, where: str) -> None:
    if value is None or option.many:
        return
    if option.choices is not None and value not in option.choices:
        raise ConfigError(f"{where} is {value!r}; it must be one of {', '.join(option.choices)}.")
    if option.minimum is not None and not value >= option.minimum:
        raise ConfigError(f"{where} is {value}; it must be at least {option.minimum:g}.")
    if option.maximum is not None and not value <= option.maximum:
        raise ConfigError(f"{where} is {value}; it must be at most {option.maximum:g}.")


def _unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    hint = f"Did you mean {near[0]}?" if near else "See vllm-server --help."
    return ConfigError(f"Unknown {kind} {name}. {hint}")


assert {field.name for field in fields(ServerConfig)} == {option.name for option in (*OPTIONS, MODEL)}
