"""Conversations to text, and to token ids, with the model's own Jinja template.

Templates run in Jinja's immutable sandbox. They are the model's: a request cannot bring one. What users write is text: a
special token spelled out in a message is encoded letter by letter, so no message can open a role.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vllm_model.tokenizer import Tokenizer
from vllm_traits.errors import InvalidRequestError, ModelLoadError

MAX_SOURCE_LENGTH = 1 << 20
MAX_RENDERED_LENGTH = 1 << 26
Message = Mapping[str, Any]


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    @staticmethod
    def _same(caller: Any) -> str:
        return str(caller())


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja.
        bos_token, eos_token: What the template may insert.

    Raises:
        ModelLoadError: It does not compile.
    """

    def __init__(self, source: str, *, bos_token: str | None = None, eos_token: str | None = None) -> None:
        if len(source) > MAX_SOURCE_LENGTH:
            raise ModelLoadError(f"The chat template has {len(source)} characters; at most {MAX_SOURCE_LENGTH}.")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
        try:
            self._template = environment.from_string(source)
        except (TemplateSyntaxError, RecursionError) as error:
            raise ModelLoadError(f"The chat template does not compile: {error}.") from error
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """The model's own; None if it has none."""
        if tokenizer.chat_template is None:
            return None
        return cls(tokenizer.chat_template, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """A conversation as the model was trained to read it.

        Args:
            messages: ``role`` and ``content`` (text, or a list of text parts), and what else the template reads.
            tools: Function schemas.
            add_generation_prompt: Open the assistant's turn.
            continue_final_message: Leave the last message open, to be continued.
            variables: Others that the template reads, such as ``enable_thinking``.

        Raises:
            InvalidRequestError: A message is malformed or the template refuses the conversation.
        """
        conversation = _normalized(messages)
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other.", "continue_final_message"
            )
        arguments = {**variables, **self._tokens, "tools": list(tools) if tools else None}
        try:
            text = self._template.render(
                messages=conversation, add_generation_prompt=add_generation_prompt, documents=None, **arguments
            )
        except TemplateError as error:
            raise InvalidRequestError(f"The chat template refuses these messages: {error.message}.", "messages") from error
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InvalidRequestError("The chat template cannot render these messages.", "messages") from error
        if len(text) > MAX_RENDERED_LENGTH:
            raise InvalidRequestError(f"messages render to more than {MAX_RENDERED_LENGTH} characters.", "messages")
        return _cut_after_last(text, conversation) if continue_final_message else text


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> list[int]:
    """Token ids of a conversation; ``options`` are those of :meth:`ChatTemplate.render`.

    The template's special tokens are special. Those that users wrote are text.

    Raises:
        InvalidRequestError: As :meth:`ChatTemplate.render`, or the model has no template.
    """
    if template is None:
        raise InvalidRequestError("This model has no chat template: use completions, or set one.", "messages")
    mark = f"\ue000{secrets.token_hex(8)}\ue001"
    given = (list(messages), list(tools) if tools else None)
    marked = _break_special(given, tokenizer, mark)
    text = template.render(*marked, **options)
    if mark not in text:
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode_parts(text, mark)


def _break_special(value: Any, tokenizer: Tokenizer, mark: str) -> Any:
    """``value`` with ``mark`` inside every special token that a string in it spells."""
    if isinstance(value, str):
        return tokenizer.special_pattern.sub(lambda hit: hit[0][:1] + mark + hit[0][1:], value)
    if isinstance(value, Mapping):
        return {_break_special(key, tokenizer, mark): _break_special(item, tokenizer, mark) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_break_special(item, tokenizer, mark) for item in value)
    return value


def _normalized(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if not messages:
        raise InvalidRequestError("messages must hold at least one message.", "messages")
    result = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"messages[{index}].role must be a string.", f"messages[{index}].role")
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise InvalidRequestError(
                    f"messages[{index}].content may only hold parts of type text.", f"messages[{index}].content"
                )
            content = "".join(map(str, parts))
        elif content is not None and not isinstance(content, str):
            raise InvalidRequestError(
                f"messages[{index}].content must be a string or a list of text parts.", f"messages[{index}].content"
            )
        result.append({**message, "content": content} if "content" in message else dict(message))
    return result


def _cut_after_last(text: str, conversation: list[dict[str, Any]]) -> str:
    """Everything up to the end of the last message's content."""
    content = (conversation[-1].get("content") or "").strip()
    place = text.rfind(content)
    if not content or place < 0:
        raise InvalidRequestError("continue_final_message needs a last message whose text the template keeps.", "messages")
    return text[: place + len(content)]


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
