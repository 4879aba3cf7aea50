"""Every setting of the server, once: the flags, the ``VLLM_*`` variables and the keys of the TOML file come from this table."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(?:i?b)?|b)?", re.IGNORECASE)
_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})


def parse_bool(text: str) -> bool:
    """``true``/``1``/``yes``/``on`` or their opposites."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError("expected true or false")


def parse_int(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise ValueError("expected a whole number") from None


def parse_float(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise ValueError("expected a number") from None


def parse_size(text: str) -> int:
    """Bytes: a number, with K, M, G or T for powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("expected bytes, such as 536870912 or 512M or 4GiB")
    return int(float(match[1]) * 1024 ** ("kmgt".index(match[2].lower()) + 1 if match[2] else 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting.

    Attributes:
        name: Field of ``ServerConfig``; ``--max-model-len`` is ``max_model_len``, ``VLLM_MAX_MODEL_LEN``.
        parse: Text to value; raises ValueError with what was expected.
        default: Value when it is given nowhere.
        section: Heading in ``--help``.
        help: One sentence or two.
        metavar: Shown for the value.
        choices: The only values allowed.
        many: May be given several times; a variable holds several with commas between them.
        minimum, maximum: Bounds of a number, inclusive.
    """

    name: str
    parse: Callable[[str], Any]
    default: Any
    section: str
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    many: bool = False
    minimum: float | None = None
    maximum: float | None = None

    @property
    def flag(self) -> str:
        """``--max-model-len``."""
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        """``VLLM_MAX_MODEL_LEN``."""
        return "VLLM_" + self.name.upper()

    @property
    def is_bool(self) -> bool:
        """Whether it is a switch."""
        return self.parse is parse_bool


_HTTP, _AUTH, _MODEL = "HTTP", "Access", "Model"
_MEMORY, _SCHEDULING, _LIMITS, _LOG = "Memory", "Scheduling", "Limits", "Logging and shutdown"

OPTIONS: tuple[Option, ...] = (
    Option(name="host", parse=str, default="127.0.0.1", section=_HTTP, help="Address to listen on; 0.0.0.0 for all."),
    Option(
        name="port", parse=parse_int, default=8000, section=_HTTP, minimum=0, maximum=65535, help="Port; 0 takes a free one."
    ),
    Option(
        name="served_model_name",
        parse=str,
        default=(),
        many=True,
        section=_HTTP,
        metavar="NAME",
        help="Name of the model in the API; several may be given, answers carry the first. Default: MODEL as you wrote it.",
    ),
    Option(
        name="api_key",
        parse=str,
        default=(),
        many=True,
        section=_AUTH,
        metavar="KEY",
        help="Require this key (Authorization: Bearer KEY); several may be given. /health and /ping stay open.",
    ),
    Option(
        name="tokenizer",
        parse=str,
        default=None,
        section=_MODEL,
        metavar="PATH",
        help="Folder or .gguf to take the tokenizer from. Default: the model's.",
    ),
    Option(name="revision", parse=str, default=None, section=_MODEL, help="Branch, tag or commit of a Hugging Face model."),
    Option(
        name="dtype",
        parse=str,
        default="auto",
        section=_MODEL,
        choices=("auto", "bfloat16", "float16", "float32", "half", "float"),
        help="Type that the model computes in.",
    ),
    Option(name="device", parse=str, default="auto", section=_MODEL, help="auto, cpu, cuda or cuda:N."),
    Option(
        name="load_format",
        parse=str,
        default="auto",
        section=_MODEL,
        choices=("auto", "safetensors", "gguf", "dummy"),
        help="Which files to read; dummy makes random weights from the model's configuration.",
    ),
    Option(
        name="seed", parse=parse_int, default=0, section=_MODEL, help="Seeds what is random: dummy weights, unseeded requests."
    ),
    Option(
        name="chat_template",
        parse=str,
        default=None,
        section=_MODEL,
        metavar="FILE",
        help="Jinja file to use in place of the model's chat template.",
    ),
    Option(
        name="backend",
        parse=str,
        default=None,
        section=_MODEL,
        metavar="PACKAGE.MODULE:FACTORY",
        help="Use this model backend: FACTORY(model_path) returns a vllm_traits.ModelBackend. "
        "A name without a colon is looked up in the entry points of the group vllm.backends.",
    ),
    Option(
        name="tensor_parallel_size",
        parse=parse_int,
        default=1,
        section=_MODEL,
        minimum=1,
        help="Devices to split the model over; this version works with 1.",
    ),
    Option(name="num_threads", parse=parse_int, default=None, section=_MODEL, minimum=1, help="CPU threads of the model."),
    Option(
        name="max_model_len",
        parse=parse_int,
        default=None,
        section=_MEMORY,
        minimum=1,
        help="Longest sequence, prompt and output together, in tokens. Default: the model's context.",
    ),
    Option(
        name="gpu_memory_utilization",
        parse=parse_float,
        default=0.9,
        section=_MEMORY,
        minimum=0.01,
        maximum=1.0,
        help="Share of the device's memory to use for weights and KV cache together.",
    ),
    Option(
        name="kv_cache_memory_bytes",
        parse=parse_size,
        default=None,
        section=_MEMORY,
        metavar="BYTES",
        help="Memory for the KV cache (512M, 4G, or bytes) in place of what is found free.",
    ),
    Option(
        name="block_size", parse=parse_int, default=16, section=_MEMORY, minimum=1, maximum=1024, help="Tokens in a KV block."
    ),
    Option(
        name="enable_prefix_caching",
        parse=parse_bool,
        default=True,
        section=_MEMORY,
        help="Reuse the KV blocks of a prompt's beginning that was seen before.",
    ),
    Option(name="max_num_seqs", parse=parse_int, default=256, section=_SCHEDULING, minimum=1, help="Most sequences in a step."),
    Option(
        name="max_num_batched_tokens",
        parse=parse_int,
        default=4096,
        section=_SCHEDULING,
        minimum=1,
        help="Most tokens in a step.",
    ),
    Option(
        name="scheduling_policy",
        parse=str,
        default="fcfs",
        section=_SCHEDULING,
        choices=("fcfs", "priority"),
        help="First come, first served; or by a request's priority (lower is sooner).",
    ),
    Option(
        name="max_num_waiting",
        parse=parse_int,
        default=10_000,
        section=_LIMITS,
        minimum=1,
        help="Most requests that wait; more get 429.",
    ),
    Option(
        name="max_body_bytes",
        parse=parse_size,
        default=16 * 2**20,
        section=_LIMITS,
        metavar="BYTES",
        help="Largest request body; a larger one gets 413.",
    ),
    Option(
        name="body_timeout",
        parse=parse_float,
        default=30.0,
        section=_LIMITS,
        metavar="SECONDS",
        minimum=0.01,
        help="Time to send a request's body; later gets 408.",
    ),
    Option(
        name="send_timeout",
        parse=parse_float,
        default=60.0,
        section=_LIMITS,
        metavar="SECONDS",
        minimum=0.01,
        help="A client that takes nothing of its stream for this long is dropped.",
    ),
    Option(
        name="log_level",
        parse=str,
        default="info",
        section=_LOG,
        choices=("debug", "info", "warning", "error"),
        help="Least severe messages shown.",
    ),
    Option(name="disable_log_requests", parse=parse_bool, default=False, section=_LOG, help="No line for each request."),
    Option(
        name="shutdown_timeout",
        parse=parse_float,
        default=60.0,
        section=_LOG,
        metavar="SECONDS",
        minimum=0,
        help="After SIGTERM or SIGINT, running requests get this long to finish.",
    ),
)
