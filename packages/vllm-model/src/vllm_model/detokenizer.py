"""Tokens to text while they come: no broken characters, no part of a stop string."""

import codecs
from collections.abc import Sequence

from vllm_model.tokenizer import Tokenizer
from vllm_traits.sampling_params import SamplingParams

_CONTEXT = 6
"""Prompt tokens to decode along, where a token's text depends on what is before it."""


class IncrementalDetokenizer:
    """Text of one choice.

    Args:
        tokenizer: The model's.
        prompt_token_ids: What the output continues.
        params: ``stop``, ``include_stop_str_in_output``, ``skip_special_tokens`` and ``min_tokens`` matter.

    Attributes:
        text: All text that was returned.
        stopped: The stop string that was met; nothing comes after it.
        num_tokens: Tokens taken in, up to and including the one that completed the stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._params = params
        self._stops = params.stop_strings
        self._decoder = _Bytes(tokenizer, params) if tokenizer.is_byte_level else _Window(tokenizer, prompt_token_ids, params)
        self._held = ""
        self._emitted: list[str] = []
        self.stopped: str | None = None
        self.num_tokens = 0

    @property
    def text(self) -> str:
        """All text that was returned."""
        if len(self._emitted) > 1:
            self._emitted = ["".join(self._emitted)]
        return self._emitted[0] if self._emitted else ""

    def push(self, token_ids: Sequence[int], *, finished: bool = False, drop_last: bool = False) -> str:
        """Take in new tokens.

        Args:
            token_ids: The new ones.
            finished: No more will come: what was held back is returned, incomplete characters as U+FFFD.
            drop_last: The last one ended the output and is no text (unless ``include_stop_str_in_output``).

        Returns:
            Text that is safe to show.
        """
        if self.stopped is not None:
            return ""
        shown = ""
        last = len(token_ids) - 1
        for place, token in enumerate(token_ids):
            self.num_tokens += 1
            if place == last and drop_last and not self._params.include_stop_str_in_output:
                break
            piece = self._decoder.push(token)
            if piece:
                shown += self._take(piece)
                if self.stopped is not None:
                    return self._show(shown)
        if finished:
            shown += self._take(self._decoder.flush())
            if self.stopped is None:
                shown, self._held = shown + self._held, ""
        return self._show(shown)

    def _take(self, piece: str) -> str:
        """Add to what is held back, look for stop strings, return what cannot be part of one."""
        self._held += piece
        if not self._stops:
            shown, self._held = self._held, ""
            return shown
        if self.num_tokens >= self._params.min_tokens:
            # The one that is complete first wins; of those, the one that begins first.
            hits = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
            if hits:
                end, at, self.stopped = min(hits)
                return self._held[: end if self._params.include_stop_str_in_output else at]
        keep = 0
        if self.num_tokens >= self._params.min_tokens:
            longest = min(len(self._held), max(map(len, self._stops)) - 1)
            keep = next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stops)), 0)
        at = len(self._held) - keep
        shown, self._held = self._held[:at], self._held[at:]
        return shown

    def _show(self, text: str) -> str:
        if text:
            self._emitted.append(text)
        return text


class _Bytes:
    """Byte-level tokens: text is the concatenation of their bytes."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.all_special_ids if params.skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return "" if token in self._skipped else self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Window:
    """Tokens whose text depends on their neighbours: decode a short window twice, with and without the new ones."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skip = params.skip_special_tokens
        self._ids = list(prompt_token_ids[-_CONTEXT:])
        self._shown = len(self._ids)  # tokens whose text was returned

    def push(self, token: int) -> str:
        self._ids.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown], self._skip)
        now = self._tokenizer.decode(self._ids, self._skip)
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return ""
        new = self._ids[self._shown :]
        self._ids = self._ids[max(0, self._shown - _CONTEXT) : self._shown][-_CONTEXT:] + new
        self._shown = len(self._ids)
        return now[len(before) :]
