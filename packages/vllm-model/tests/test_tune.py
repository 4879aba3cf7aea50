"""The command, where there is no device, and on a card."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_core import Engine, EngineConfig, SamplingParams
from vllm_model import load_backend, tune


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["default"]) == 1
    assert capsys.readouterr().err == "vllm_model.tune needs a CUDA device\n"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_an_unknown_model_has_its_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert tune.main(["./nowhere"]) == 1
    assert capsys.readouterr().err == "There is no model at nowhere.\n"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_heads_that_no_kernel_takes_are_named(
    random_model: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    folder, _ = random_model("Qwen3ForCausalLM", head_dim=320, num_attention_heads=2)
    assert tune.main([str(folder)]) == 1
    assert "head_dim is 320: heads of 16 to 256" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_backend_runs_with_what_was_kept(
    random_model: Callable[..., tuple[Path, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_model.cuda import tuning
    from vllm_model.kernels import tuned

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    tuned._read.cache_clear()
    decode, prefill, thin = (16, 4, 4, 4), (64, 64, 4, 2), (4, 256, 1)
    for name, shape in (("DECODE", decode), ("PREFILL", prefill), ("THIN", thin)):
        monkeypatch.setattr(tuning, name, [shape])
    measure = tuning.measure

    def ours_are_faster(launches: list[Any]) -> float:
        config = launches[0].keywords.get("config") or launches[0].args[2].config
        shape = (config.block_n, config.block_k, config.num_warps) if hasattr(config, "kind") else tuning.astuple(config)
        return measure(launches) * (1e-3 if shape in (decode, prefill, thin) else 1)

    monkeypatch.setattr(tuning, "measure", ours_are_faster)
    folder, _ = random_model("Qwen3ForCausalLM", head_dim=64, hidden_size=512, intermediate_size=768)
    try:
        assert tune.main([str(folder)]) == 0
        (file,) = (tmp_path / "tuned").iterdir()
        kept = json.loads(file.read_text())
        kv_dtypes = 1 + (torch.cuda.get_device_capability() >= (8, 9))
        assert [len(kept[kind]) for kind in ("decode", "prefill", "thin")] == [4 * kv_dtypes, 1, 10]
        backend = load_backend(folder, device="cuda", dtype="bfloat16", kv_cache_memory_bytes=1 << 26)
        engine = Engine(backend, config=EngineConfig(max_num_seqs=32, max_num_batched_tokens=64))
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        outputs = [engine.add_request(str(i), [5 + i] * (40 + i), params) for i in range(20)]
        while engine.has_unfinished_requests():
            engine.step()
        plans = backend.steps.decode._plans
        assert [tuning.astuple(plans.of(rows, several=rows > 20).config) for rows in (1, 17, 32)] == [decode] * 3
        assert [len(output.outputs[0].token_ids) for output in outputs] == [8] * 20
        engine.close()
    finally:
        tuned._read.cache_clear()
