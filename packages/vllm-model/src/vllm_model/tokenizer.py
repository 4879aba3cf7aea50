"""Text to token ids and back, on the ``tokenizers`` library; from a folder's ``tokenizer.json`` or a GGUF file's metadata."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from vllm_model.loaders import read_gguf_metadata
from vllm_traits.errors import ModelLoadError, UnsupportedModelError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTROL, _USER_DEFINED = 3, 4
"""Token types of GGUF."""
GGUF_PRE_TOKENIZERS = ("gpt-2", "smollm", "qwen2", "llama-bpe")


class Tokenizer:
    """Byte-exact encoding and decoding.

    Args:
        tokenizer: Of the ``tokenizers`` library.
        bos_token, eos_token: Their text, if the model has them.
        chat_template: Jinja source, if the model comes with one.
    """

    def __init__(
        self,
        tokenizer: RustTokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.bos_token, self.eos_token = bos_token, eos_token
        self.chat_template = chat_template
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens: dict[str, int] = {token.content: index for index, token in added.items() if token.special}
        self.all_special_ids = frozenset(self.special_tokens.values())

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """From a folder with ``tokenizer.json``, or a ``.gguf`` file.

        Raises:
            ModelLoadError: It is not there or cannot be read.
            UnsupportedModelError: A kind of tokenizer that is not supported.
        """
        path = Path(path)
        return _from_gguf(path) if path.suffix == ".gguf" else _from_folder(path)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        """Of ``bos_token``."""
        return None if self.bos_token is None else self._tokenizer.token_to_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """Of ``eos_token``."""
        return None if self.eos_token is None else self._tokenizer.token_to_id(self.eos_token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``, in which special tokens are recognized; ``add_special_tokens`` adds what the model begins with."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of ``text`` in which nothing is special: ``<|im_start|>`` is ten characters."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_parts(self, text: str, mark: str) -> list[int]:
        """Ids of ``text`` in which special tokens that contain ``mark`` are ordinary text; ``mark`` itself is removed."""
        ids: list[int] = []
        for part in self.special_pattern.split(text):
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            elif part:
                ids.extend(self.encode_ordinary(part.replace(mark, "")))
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def to_json(self) -> str:
        """As the text of a ``tokenizer.json``."""
        return self._tokenizer.to_str()

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None if there is none."""
        return self._tokenizer.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, if the tokenizer is byte-level; nothing for an unknown id."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes([self._byte_of[char] for char in token])
        except KeyError:  # an added token outside the byte alphabet stands for itself
            return token.encode()

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every token is a string of bytes, so that text is the concatenation of ``token_bytes``."""
        decoder = json.loads(self._tokenizer.to_str()).get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        return bool(parts) and all(part.get("type") == "ByteLevel" for part in parts)

    @cached_property
    def _plain(self) -> RustTokenizer:
        copy = RustTokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        names = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, names)) + ")")

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """GPT-2's byte alphabet: printable bytes stand for themselves, the others for characters from 256 on."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _from_folder(folder: Path) -> Tokenizer:
    source = folder / "tokenizer.json"
    try:
        tokenizer = RustTokenizer.from_file(str(source))
    except Exception as error:  # the library raises bare Exception
        raise ModelLoadError(f"Cannot read the tokenizer {source}: {error}.") from error
    settings = _json(folder / "tokenizer_config.json")
    template = settings.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text()
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return Tokenizer(
        tokenizer,
        bos_token=_content(settings.get("bos_token")),
        eos_token=_content(settings.get("eos_token")),
        chat_template=template,
    )


def _from_gguf(path: Path) -> Tokenizer:
    metadata = read_gguf_metadata(path)

    def value(name: str) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}")

    if value("model") != "gpt2":
        raise UnsupportedModelError(
            f"{path}: a tokenizer of kind {value('model')!r} is not supported in GGUF files, only gpt2."
        )
    if value("pre") not in GGUF_PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{path}: pre-tokenizer {value('pre')!r} is not supported; these are: {', '.join(GGUF_PRE_TOKENIZERS)}."
        )
    tokens, types = value("tokens"), value("token_type")
    if not tokens or value("merges") is None:
        raise ModelLoadError(f"{path} has no vocabulary.")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in value("merges")]
    tokenizer = RustTokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=value("pre") == "llama-bpe"))
    if value("pre") == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(value("pre"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        names = [tokens[index] for index, type_ in enumerate(types or ()) if type_ == kind]
        tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    bos, eos = (None if value(f"{name}_token_id") is None else tokens[value(f"{name}_token_id")] for name in ("bos", "eos"))
    if value("add_bos_token") and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, vocabulary[bos])]
        )
    return Tokenizer(tokenizer, bos_token=bos, eos_token=eos, chat_template=metadata.get("tokenizer.chat_template"))


def _pre_tokenizer(name: str) -> Any:
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    words = Regex(_WORDS % (r"\p{N}" if name == "qwen2" else r"\p{N}{1,3}"))
    split = pre_tokenizers.Split(words, behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"Cannot read {path}: {error}.") from error
    return value if isinstance(value, dict) else {}


def _content(token: Any) -> str | None:
    """A token as ``tokenizer_config.json`` has it: its text, or an object around it."""
    return token.get("content") if isinstance(token, dict) else token
