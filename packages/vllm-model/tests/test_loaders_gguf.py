from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_model.loaders import read_gguf_metadata
from vllm_model.loaders.gguf_file import read_gguf_header
from vllm_model.loaders.gguf_loader import ROPE_FACTORS, SUPPORTED_TYPES, hf_name, llama3_scaling, load_gguf
from vllm_model.quantization import QuantizedTensor
from vllm_traits.errors import ModelLoadError, UnsupportedModelError, VllmError, WeightsError

Type = gguf.GGMLQuantizationType
EMBED, Q_PROJ = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
CPU = torch.device("cpu")


def write(
    path: Path, tensors: dict[str, np.ndarray], kinds: dict[str, Type] | None = None, *, arch: str = "qwen2", heads: int = 4
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_head_count(heads)
    writer.add_rope_freq_base(500000.0)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "<|im_end|>", ""])
    writer.add_array("tokenizer.ggml.scores", [1, 2, 3])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    for name, values in tensors.items():
        kind = (kinds or {}).get(name)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def raw_blocks(kind: Type, rows: int, columns: int) -> np.ndarray:
    """Any bytes are valid quants; scales are 16-bit floats, so the exponent's top bit is cleared to keep them finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(int(kind)).integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
    return raw & 0xBF


def test_metadata_has_python_values(tmp_path: Path) -> None:
    metadata = read_gguf_metadata(write(tmp_path / "m.gguf", {}))
    assert metadata["general.architecture"] == "qwen2"
    assert metadata["qwen2.attention.head_count"] == 4
    assert metadata["tokenizer.ggml.tokens"] == ["a", "é", "<|im_end|>", ""]
    assert metadata["tokenizer.ggml.scores"] == [1, 2, 3]
    assert metadata["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("kind", SUPPORTED_TYPES, ids=lambda kind: kind.name)
def test_every_type_reads_as_the_library_does(tmp_path: Path, kind: Type) -> None:
    if kind in (Type.F32, Type.F16):
        stored = np.random.default_rng(1).standard_normal((8, 512)).astype(np.float32 if kind == Type.F32 else np.float16)
        want = stored.astype(np.float32)
        path = write(tmp_path / "m.gguf", {"token_embd.weight": stored})
    else:
        stored = raw_blocks(kind, 8, 512)
        want = gguf.dequantize(stored, kind)
        path = write(tmp_path / "m.gguf", {"token_embd.weight": stored}, {"token_embd.weight": kind})
    weights = load_gguf(path, {EMBED: (8, 512)}, dtype=torch.float32, device=CPU)
    np.testing.assert_allclose(weights[EMBED].numpy(), want, rtol=1e-6, atol=1e-6)


def reference(stored: np.ndarray, kind: Type) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(stored, kind))


def packed(tmp_path: Path, stored: np.ndarray, kind: Type) -> QuantizedTensor:
    rows, width = len(stored), reference(stored[:1], kind).shape[1]
    path = write(tmp_path / "m.gguf", {"token_embd.weight": stored}, {"token_embd.weight": kind})
    got = load_gguf(path, {EMBED: (rows, width)}, dtype=torch.bfloat16, device=CPU, quantization=None)[EMBED]
    assert isinstance(got, QuantizedTensor)
    return got


@pytest.mark.parametrize(("kind", "bits"), [(Type.Q4_0, 4), (Type.Q4_1, 4), (Type.Q8_0, 8)], ids=lambda kind: str(kind))
def test_blocks_of_32_are_packed_as_they_are(tmp_path: Path, kind: Type, bits: int) -> None:
    stored = raw_blocks(kind, 8, 512)
    got = packed(tmp_path, stored, kind)
    assert got.bits == bits
    torch.testing.assert_close(got.dequantize(torch.float32), reference(stored, kind), rtol=1e-6, atol=1e-6)


def k_quants(kind: Type) -> np.ndarray:
    """Blocks as a file has them: values of any kind, the scales of a whole block between 2**-9 and 2**-8."""
    stored = raw_blocks(kind, 64, 1024)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    half = np.random.default_rng(0).uniform(2**-9, 2**-8, (64, stored.shape[1] // size, 2)).astype(np.float16).view(np.uint8)
    at = {Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q6_K: [208], Type.Q5_0: [0], Type.Q5_1: [0, 2]}.get(kind, [0, 2])
    blocks = stored.reshape(64, -1, size)
    for i, offset in enumerate(at):
        blocks[:, :, offset : offset + 2] = half[..., 2 * i : 2 * i + 2]
    return stored


@pytest.mark.parametrize(
    ("kind", "bits", "bound"),
    [
        (Type.Q4_K, 4, 0.0005),
        (Type.Q2_K, 8, 0.006),
        (Type.Q3_K, 8, 0.006),
        (Type.Q5_0, 8, 0.006),
        (Type.Q5_1, 8, 0.006),
        (Type.Q5_K, 8, 0.006),
        (Type.Q6_K, 8, 0.006),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_other_blocks_are_packed_near_to_what_they_are(tmp_path: Path, kind: Type, bits: int, bound: float) -> None:
    stored = k_quants(kind)
    got, want = packed(tmp_path, stored, kind), reference(stored, kind)
    assert got.bits == bits
    assert float((got.dequantize(torch.float32) - want).norm() / want.norm()) < bound


def test_floats_stay_floats_unless_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"token_embd.weight": np.ones((4, 32), np.float16)})
    shapes = {EMBED: (4, 32)}
    stored = load_gguf(path, shapes, dtype=torch.bfloat16, device=CPU, quantization=None)[EMBED]
    assert isinstance(stored, torch.Tensor)
    assert stored.dtype == torch.bfloat16
    asked = load_gguf(path, shapes, dtype=torch.bfloat16, device=CPU, quantization="int8")[EMBED]
    assert isinstance(asked, QuantizedTensor)


@pytest.mark.parametrize("quantization", ["none", None])
@pytest.mark.parametrize(("arch", "permuted"), [("llama", True), ("qwen2", False), ("qwen3", False)])
def test_rotary_rows_are_put_back_for_llama_only(tmp_path: Path, arch: str, permuted: bool, quantization: Any) -> None:
    original = np.repeat(np.arange(16, dtype=np.float32), 32).reshape(16, 32)
    stored = original
    if permuted:  # what llama.cpp's converter does: [head, half, pair] -> [head, pair, half]
        stored = np.ascontiguousarray(original.reshape(2, 2, 4, 32).swapaxes(1, 2)).reshape(16, 32)
    blocks = gguf.quantize(stored, Type.Q4_1)
    path = write(tmp_path / "m.gguf", {"blk.0.attn_q.weight": blocks}, {"blk.0.attn_q.weight": Type.Q4_1}, arch=arch, heads=2)
    got = load_gguf(path, {Q_PROJ: (16, 32)}, dtype=torch.float32, device=CPU, quantization=quantization)[Q_PROJ]
    plain = got.dequantize(torch.float32) if isinstance(got, QuantizedTensor) else got
    np.testing.assert_array_equal(plain.numpy(), original)


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"blk.0.attn_q.weight": np.ones((16, 32), np.float32)}, arch="llama", heads=3)
    with pytest.raises(ModelLoadError, match="q_proj"):
        load_gguf(path, {Q_PROJ: (16, 32)}, dtype=torch.float32, device=CPU)


def test_missing_surplus_and_misshapen_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"token_embd.weight": np.ones((4, 32), np.float32)})
    with pytest.raises(WeightsError, match=r"'model\.norm\.weight' is missing"):
        load_gguf(path, {EMBED: (4, 32), "model.norm.weight": (32,)}, dtype=torch.float32, device=CPU)
    with pytest.raises(WeightsError, match=r"token_embd.*surplus"):
        load_gguf(path, {}, dtype=torch.float32, device=CPU)
    with pytest.raises(WeightsError, match=r"token_embd.*\(4, 32\)"):
        load_gguf(path, {EMBED: (4, 64)}, dtype=torch.float32, device=CPU)


def test_unsupported_type_lists_those_that_work(tmp_path: Path) -> None:
    kinds = {"token_embd.weight": Type.IQ4_NL}
    path = write(tmp_path / "m.gguf", {"token_embd.weight": raw_blocks(Type.IQ4_NL, 4, 32)}, kinds)
    with pytest.raises(UnsupportedModelError, match=r"IQ4_NL.*Q4_0.*Q6_K"):
        load_gguf(path, {EMBED: (4, 32)}, dtype=torch.float32, device=CPU)


def test_a_second_copy_of_a_tied_head_is_tolerated(tmp_path: Path) -> None:
    head = np.ones((4, 32), np.float32)
    path = write(tmp_path / "m.gguf", {"token_embd.weight": head, "output.weight": head})
    assert list(load_gguf(path, {EMBED: (4, 32)}, dtype=torch.bfloat16, device=CPU)) == [EMBED]


def test_names() -> None:
    assert hf_name("blk.11.attn_k_norm.weight") == "model.layers.11.self_attn.k_norm.weight"
    assert hf_name("blk.0.attn_q.bias") == "model.layers.0.self_attn.q_proj.bias"
    assert hf_name("blk.0.ffn_gate_exps.weight") is None


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path: Path) -> None:
    # As llama.cpp's converter computes them, by wavelength.
    divisors = []
    for frequency in 500000.0 ** -(np.arange(64) / 64):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1.0) / 3.0
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(32.0)
        else:
            divisors.append(1 / ((1 - smooth) / 32 + smooth))
    path = write(tmp_path / "m.gguf", {ROPE_FACTORS: np.array(divisors, np.float32)}, arch="llama")
    scaling = llama3_scaling(path, read_gguf_header(path))
    assert scaling["llama.rope.scaling.type"] == "llama3"
    assert scaling["llama.rope.scaling.factor"] == 32.0
    path = write(tmp_path / "n.gguf", {ROPE_FACTORS: np.linspace(1, 9, 64, dtype=np.float32)}, arch="llama")
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        llama3_scaling(path, read_gguf_header(path))


def test_every_truncation_is_a_typed_error(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf", {"token_embd.weight": np.ones((4, 32), np.float32)}).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(0, len(whole) - 1, 3):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelLoadError):
            read_gguf_header(cut)


@settings(max_examples=150, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=12))
def test_damaged_headers_give_typed_errors_only(tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]]) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    raw = bytearray(write(folder / "m.gguf", {"token_embd.weight": np.ones((4, 32), np.float32)}).read_bytes())
    for position, value in edits:
        raw[position % len(raw)] = value
    (folder / "m.gguf").write_bytes(raw)
    try:
        load_gguf(folder / "m.gguf", {EMBED: (4, 32)}, dtype=torch.float32, device=CPU)
    except VllmError as error:
        assert error.message  # noqa: PT017 - loading it is right as well
