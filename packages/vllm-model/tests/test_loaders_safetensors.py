import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vllm_model.loaders.dummy import dummy_weights
from vllm_model.loaders.safetensors_loader import load_safetensors, read_header
from vllm_traits.errors import ModelLoadError, UnsupportedModelError, VllmError, WeightsError

CPU = torch.device("cpu")
EXPECTED = {"a.weight": (4, 6), "b.weight": (3,)}


def tensors() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(24.0).view(4, 6), "b.weight": torch.tensor([1.0, 2.0, 3.0])}


def load(folder: Path, expected: dict[str, tuple[int, ...]] = EXPECTED) -> dict[str, torch.Tensor]:
    return load_safetensors(folder, expected, dtype=torch.float32, device=CPU)


def shard(folder: Path) -> None:
    for index, (name, value) in enumerate(tensors().items()):
        save_file({name: value.bfloat16()}, folder / f"model-{index}.safetensors")
    weight_map = {name: f"model-{index}.safetensors" for index, name in enumerate(EXPECTED)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def raw_file(path: Path, header: object) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    return path


@pytest.mark.parametrize("sharded", [False, True])
def test_values_come_back(tmp_path: Path, sharded: bool) -> None:
    if sharded:
        shard(tmp_path)
    else:
        save_file(tensors(), tmp_path / "model.safetensors")
    got = load(tmp_path)
    assert got.keys() == EXPECTED.keys()
    for name, value in tensors().items():
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], value)


def test_missing_surplus_and_misshapen_are_named(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"'c\.weight' is missing"):
        load(tmp_path, EXPECTED | {"c.weight": (1,)})
    with pytest.raises(WeightsError, match=r"'b\.weight' is surplus"):
        load(tmp_path, {"a.weight": (4, 6)})
    with pytest.raises(WeightsError, match=r"'a\.weight' has shape \(4, 6\)"):
        load(tmp_path, {"a.weight": (6, 4), "b.weight": (3,)})


def test_tied_head_and_rotary_buffers_are_tolerated(tmp_path: Path) -> None:
    extra = {"lm_head.weight": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(tensors() | extra, tmp_path / "model.safetensors")
    assert load(tmp_path).keys() == EXPECTED.keys()


def test_an_index_cannot_leave_its_folder(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": "../model.safetensors"}}))
    with pytest.raises(ModelLoadError, match="not a file of that folder"):
        load(inner)


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    shard(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"model-1\.safetensors"):
        load(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="holds no"):
        load(tmp_path)


def test_a_tensor_larger_than_the_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    with pytest.raises(WeightsError, match="'a'"):
        read_header(raw_file(tmp_path / "x.safetensors", {"a": entry}))


def test_unknown_dtype_lists_those_that_work(tmp_path: Path) -> None:
    entry = {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}
    with pytest.raises(UnsupportedModelError, match="BF16"):
        read_header(raw_file(tmp_path / "x.safetensors", {"a": entry}))


def test_every_truncation_is_a_typed_error(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ModelLoadError):
            load(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 70) | st.text(max_size=4) | st.sampled_from(["F32", "BF16"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a.weight"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(header=json_values)
def test_strange_headers_give_typed_errors_only(tmp_path_factory: pytest.TempPathFactory, header: object) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    raw_file(folder / "x.safetensors", {"a.weight": header} if not isinstance(header, dict) else header)
    with pytest.raises(VllmError):
        load(folder)


def test_dummy_weights_repeat_by_seed() -> None:
    expected = {"w": (64, 64), "model.norm.weight": (8,)}
    one, same, other = (dummy_weights(expected, dtype=torch.float32, device=CPU, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one["w"], same["w"])
    assert not torch.equal(one["w"], other["w"])
    assert torch.equal(one["model.norm.weight"], torch.ones(8))
    assert 0.015 < one["w"].std().item() < 0.025
