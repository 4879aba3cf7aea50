"""Measure on this card which launch shapes are fastest for a model's sizes, and keep them for every later start.

    python -m vllm_model.tune MODEL

Cards other than an H200 start with shapes that were not measured on them. What is found goes into the cache folder, to
``tuned/<card>.json``, beside what was found for other models; remove the file to go back.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence

import torch

from vllm_model.hub import resolve_model
from vllm_model.loaders import load_config
from vllm_traits.errors import VllmError

LEAST_GAIN = 0.03
"""Part of the default's time that another shape must save to be kept."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vllm_model.tune", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder, a .gguf file, a Hugging Face id, or default; only its configuration is used")
    model = parser.parse_args(arguments).model
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return _failed("vllm_model.tune needs a CUDA device" + (", and Triton" if torch.cuda.is_available() else ""))
    try:
        return tune_model(model, torch.device("cuda", torch.cuda.current_device()))
    except VllmError as error:
        return _failed(error.message)


def tune_model(model: str, device: torch.device) -> int:
    """Measure, print and keep the launch shapes for a model; returns the exit status.

    Raises:
        ModelLoadError: There is no such model.
    """
    from vllm_model.backend import runs_on_kernels
    from vllm_model.cuda.device import Device
    from vllm_model.cuda.tuning import tune
    from vllm_model.kernels.tuned import KINDS, card, save, spelt

    config = load_config(resolve_model(model, only_config=True))
    if not runs_on_kernels(config):
        return _failed(
            f"head_dim is {config.head_dim}: heads of 16 to 256 run on the kernels that are tuned here, others on torch's."
        )
    name = card(device) or ""
    _say(f"{name}: compiling what may be worth a try, then measuring it")
    shapes = {}
    for found in tune(config, Device(device)):
        kept = found.ratio <= 1 - LEAST_GAIN
        shapes[found.kind, found.key] = found.shape if kept else None
        by, what = KINDS[found.kind]
        default = "does not run" if found.default is None else _micros(found.default)
        change = f"{_micros(found.micros)} {1 - found.ratio:4.0%} less: {spelt(what, found.shape)}" if kept else "is kept"
        _say(f"{found.kind:8}{spelt(by, found.key):36} default {default:>20}  {change}")
    try:
        path = save(shapes, name)
    except OSError as error:
        return _failed(f"Cannot keep this: {error}. Set VLLM_CACHE_ROOT.")
    _say(f"{sum(map(bool, shapes.values()))} of {len(shapes)} are faster than the defaults and kept in {path}")
    return 0


def _micros(times: Sequence[float]) -> str:
    """Of each load."""
    return " ".join(f"{time:.1f}" for time in times) + " us"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _failed(message: str) -> int:
    sys.stderr.write(f"{message}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
