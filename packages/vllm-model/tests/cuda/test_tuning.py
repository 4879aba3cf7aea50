"""Tuning without measuring: the launches run on the interpreter, their times are made up."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from vllm_model.cuda import tuning
from vllm_model.cuda.device import Device
from vllm_model.kernels import tuned
from vllm_model.kernels.gemv import GemvConfig
from vllm_model.loaders import load_config
from vllm_model.tune import tune_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the launches are the interpreter's")

FAST = {"decode": (16, 1, 1, 2), "prefill": (16, 16, 1, 1), "thin": (4, 32, 1)}
BROKEN = (3, 3, 3)
HEAD_DIM = 16


@pytest.fixture
def folder(random_model: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Of a model in half precision; few and small loads, a fast launch shape of each kind and one that does not compile."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(tuned, "card", lambda device: "A Card")
    monkeypatch.setattr(tuning, "DECODE", [FAST["decode"]])
    monkeypatch.setattr(tuning, "PREFILL", [FAST["prefill"]])
    monkeypatch.setattr(tuning, "THIN", [FAST["thin"], BROKEN])
    monkeypatch.setattr(tuning, "_may_suit", lambda *shape: True)
    monkeypatch.setattr(tuning, "FEW_LOADS", [(1, 20), (2, 5)])
    monkeypatch.setattr(tuning, "MANY_LOADS", [(3, 20)])
    monkeypatch.setattr(tuning, "CHUNKS", [(1, 0, 5), (2, 16, 3)])
    monkeypatch.setattr(tuning, "MAX_DRAFT_TOKENS", 1)
    folder, _ = random_model("Qwen3ForCausalLM", head_dim=HEAD_DIM, num_attention_heads=4)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"dtype": "float16"}))  # the interpreter's tl.dot takes no bf16
    return folder


def timed(times: dict[tuple[int, ...], float], run: bool = False) -> Callable[[list[Any]], float]:
    """A function that says the time of a launch shape, 10 of one that it does not know."""

    def measure(launches: list[Any]) -> float:
        (launch,) = launches
        if run:
            launch()
        config = launch.keywords.get("config") or launch.args[2].config
        return times.get(tuning.astuple(config), 10.0)

    return measure


def test_the_command_keeps_what_is_faster(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "measure", timed({FAST["decode"]: 5.0, FAST["prefill"]: 9.8, FAST["thin"]: 8.0}, run=True))
    assert tune_model(str(folder), torch.device("cpu")) == 0
    kept = json.loads((tmp_path / "tuned" / "A-Card.json").read_text())
    assert kept["decode"] == dict.fromkeys(
        [f"head_dim={HEAD_DIM} group=2 few={few} several={several} fp8=0" for few in (0, 1) for several in (0, 1)],
        "tile=16 programs_per_sm=1 num_warps=1 num_stages=2",
    )
    assert kept["prefill"] == {}  # not by 3 %
    assert len(kept["thin"]) == 2 * 5
    assert kept["thin"]["n=80 k=48 gated=1 rows=2"] == "block_n=4 block_k=32 num_warps=1"
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    change = "default 10.0 10.0 us 5.0 5.0 us 50% less: tile=16 programs_per_sm=1 num_warps=1 num_stages=2"
    assert f"decode head_dim=16 group=2 few=1 several=0 fp8=0 {change}" in lines
    assert "prefill head_dim=16 group=2 default 10.0 10.0 us is kept" in lines
    assert "14 of 15 are faster than the defaults" in out


def test_a_second_run_measures_against_the_defaults_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "measure", timed({FAST["decode"]: 5.0}))
    tune_model(str(folder), torch.device("cpu"))
    monkeypatch.setattr(tuning, "measure", timed({}))
    tune_model(str(folder), torch.device("cpu"))
    assert tuned.lookup("decode", (HEAD_DIM, 2, 1, 0, 0), torch.device("cpu")) is None


def test_layers_with_a_bias_are_the_librarys(random_model: Callable[..., tuple[Path, Any]]) -> None:
    config = load_config(random_model("Qwen2ForCausalLM")[0])
    keys = {case.key[:2] for case in tuning.Cases(config, Device(torch.device("cpu"))) if case.kind == "thin"}
    assert keys == {(48, 48), (80, 48), (48, 80), (97, 48)}  # not (80, 48) of QKV, ungated


def test_a_default_that_does_not_run_gives_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(launches: list[Any]) -> float:
        config = launches[0].keywords.get("config") or launches[0].args[2].config
        if not isinstance(config, GemvConfig) and tuning.astuple(config) not in FAST.values():
            raise RuntimeError("out of shared memory")
        return 1.0

    monkeypatch.setattr(tuning, "measure", measure)
    results = {(found.kind, found.key): found for found in tuning.tune(load_config(folder), Device(torch.device("cpu")))}
    found = results["prefill", (HEAD_DIM, 2)]
    assert (found.shape, found.default, found.ratio) == (FAST["prefill"], None, 0.0)
    assert results["thin", (48, 80, 0, 1)].ratio == 1.0


def test_nothing_is_kept_where_nothing_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(launches: list[Any]) -> float:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(tuning, "measure", fail)
    with pytest.raises(RuntimeError, match="no launch shape of decode"):
        tune_model(str(folder), torch.device("cpu"))
    assert not (tmp_path / "tuned").exists()
