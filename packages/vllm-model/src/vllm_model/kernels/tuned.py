"""Launch shapes that were measured on this machine's cards, by ``python -m vllm_model.tune``; they go before the shipped ones.

A card has a file in the cache folder, lines of text in JSON::

    "thin": {
      "n=4096 k=1024 gated=0 rows=1": "block_n=2 block_k=512 num_warps=1",

It is read once a process.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
import triton

from vllm_model import __version__
from vllm_model.hub import cache_root

logger = logging.getLogger(__name__)

Ints = tuple[int, ...]
Shapes = dict[tuple[str, Ints], Ints]
"""Launch shapes by kind and key."""

KINDS = {
    "decode": ("head_dim group few several fp8", "tile programs_per_sm num_warps num_stages"),
    "prefill": ("head_dim group", "block_m block_n num_warps num_stages"),
    "thin": ("n k gated rows", "block_n block_k num_warps"),
}
"""What launch shapes are chosen by, and what they are: ``few`` is 1 for up to 16 rows, ``several`` for more than one query
token a row, ``fp8`` for a cache of e4m3."""


@cache
def card(device: torch.device) -> str | None:
    """Name of a CUDA device; None for another."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def path_of(name: str) -> Path:
    """The file of the card of that name."""
    return cache_root() / "tuned" / f"{re.sub('[^A-Za-z0-9]+', '-', name).strip('-')}.json"


def lookup(kind: str, key: Ints, device: torch.device) -> Ints | None:
    """The launch shape of a kind (see :data:`KINDS`) that was measured on this card, if there is one."""
    name = card(device)
    return None if name is None else _read(name).get((kind, key))


def save(shapes: Mapping[tuple[str, Ints], Ints | None], name: str) -> Path:
    """Keep launch shapes for the card of that name, beside those of other keys; None: forget this key's.

    Returns:
        The file.

    Raises:
        OSError: It cannot be written.
    """
    _read.cache_clear()
    path, merged = path_of(name), {**_read(name), **shapes}
    kinds: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    for (kind, key), shape in sorted(merged.items()):
        if shape is not None:
            kinds[kind][spelt(KINDS[kind][0], key)] = spelt(KINDS[kind][1], shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_text(json.dumps({"card": name, **_versions(), **kinds}, indent=2) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
        _read.cache_clear()
    return path


def spelt(names: str, values: Ints) -> str:
    """``tile=64 num_warps=4``."""
    return " ".join(f"{name}={value}" for name, value in zip(names.split(), values, strict=True))


@cache
def _read(name: str) -> Shapes:
    path = path_of(name)
    try:
        kept = json.loads(path.read_bytes())
        for program, version in _versions().items():
            other = kept.get(program, "an older version")
            if _minor(other) != _minor(version):
                raise ValueError(f"it is of {program} {other}, and here is {version}")
        return {
            (kind, _parsed(by, key)): _parsed(what, shape)
            for kind, (by, what) in KINDS.items()
            for key, shape in kept[kind].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s is ignored: %s. `python -m vllm_model.tune MODEL` measures anew.", path, error)
        return {}


def _versions() -> dict[str, str]:
    """What kernels, and with them the times of their shapes, come from."""
    return {"triton": triton.__version__, "vllm_model": __version__}


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _parsed(names: str, text: str) -> Ints:
    """What :func:`spelt` wrote."""
    pairs = [part.partition("=") for part in text.split()]
    if [name for name, _, _ in pairs] != names.split():
        raise ValueError(f"{text!r} does not say {names}")
    return tuple(int(value) for _, _, value in pairs)
