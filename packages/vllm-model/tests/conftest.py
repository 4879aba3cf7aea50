"""Small random models, and the reference that they are compared with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """A function from an architecture and changes to its configuration to a folder and transformers' model of it."""
    import transformers

    def make(architecture: str, **changes: Any) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp(architecture)
        config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
        config = config_class(**(SMALL | changes), attn_implementation="eager")
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(config).float().eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.2)  # the default is so small that errors would hide
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        save_file(weights, folder / "model.safetensors")
        raw = config.to_dict() | {"architectures": [architecture], "dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(raw, default=str))
        return folder, model

    return make


END = 95


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[[Path], int]:
    """A function that gives a folder a tokenizer of 96 tokens: the printable characters of ASCII, and the end of a sequence.

    It returns the token of that end.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def write(folder: Path) -> int:
        characters = {"\u0120" if code == 32 else chr(code): code - 32 for code in range(32, 32 + END)}
        tokenizer = Tokenizer(models.BPE(vocab=characters, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
        tokenizer.save(str(folder / "tokenizer.json"))
        return END

    return write
