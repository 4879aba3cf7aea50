"""The store of measured launch shapes, and that they are what is launched."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from vllm_model.kernels import gemv, paged_prefill, tuned
from vllm_model.kernels.decode_plan import DecodeConfig, DecodePlan, default_decode_config

CARD = "NVIDIA GeForce RTX 4090 (x)"
SHAPES = {
    ("decode", (64, 2, 0, 0, 0)): (16, 1, 1, 2),
    ("decode", (64, 2, 0, 1, 0)): (16, 2, 1, 2),
    ("decode", (64, 2, 1, 0, 1)): (16, 3, 1, 2),
    ("prefill", (64, 2)): (32, 16, 2, 1),
    ("thin", (32, 64, 0, 1)): (4, 32, 1),
}


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of a card, in a cache of its own."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(tuned, "card", lambda device: CARD)
    tuned._read.cache_clear()
    yield tmp_path / "tuned" / "NVIDIA-GeForce-RTX-4090-x.json"
    tuned._read.cache_clear()


def found() -> dict[tuple[str, tuple[int, ...]], Any]:
    tuned._read.cache_clear()
    return {key: tuned.lookup(*key, torch.device("cpu")) for key in SHAPES}


def test_what_is_kept_is_found_and_readable(file: Path) -> None:
    assert tuned.save(SHAPES, CARD) == file
    assert found() == SHAPES
    assert json.loads(file.read_text())["thin"] == {"n=32 k=64 gated=0 rows=1": "block_n=4 block_k=32 num_warps=1"}
    assert tuned.lookup("thin", (32, 64, 0, 2), torch.device("cpu")) is None


def test_shapes_of_other_keys_stay_and_none_forgets() -> None:
    tuned.save(SHAPES, CARD)
    tuned.save({("prefill", (64, 2)): None, ("prefill", (128, 2)): (64, 64, 4, 2)}, CARD)
    assert found() == SHAPES | {("prefill", (64, 2)): None}
    assert tuned.lookup("prefill", (128, 2), torch.device("cpu")) == (64, 64, 4, 2)


def test_without_a_card_or_a_file_there_is_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert set(found().values()) == {None}
    monkeypatch.undo()
    assert tuned.card(torch.device("cpu")) is None
    assert tuned.lookup("prefill", (64, 2), torch.device("cpu")) is None
    assert not caplog.records


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace("k=64", "m=64"),
        lambda text: text.replace("k=64", "k=many"),
        lambda text: text.replace('"thin"', '"thick"'),
        lambda text: json.dumps(json.loads(text) | {"triton": "2.1.0"}),
        lambda text: json.dumps(json.loads(text) | {"vllm_model": "0.0.9"}),
        lambda text: text.replace('"vllm_model"', '"of"'),
        lambda text: json.dumps(json.loads(text) | {"decode": [1]}),
    ],
)
def test_a_file_that_is_not_for_us_is_ignored_with_one_warning(
    change: Callable[[str], str], file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned.save(SHAPES, CARD)
    file.write_text(change(file.read_text()))
    with caplog.at_level(logging.WARNING):
        assert set(found().values()) == {None}
    assert [str(file) in record.getMessage() for record in caplog.records] == [True]
    tuned.save(SHAPES, CARD)
    assert found() == SHAPES


def test_another_patch_of_triton_or_ours_will_do(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned.triton, "__version__", "3.6.0")
    monkeypatch.setattr(tuned, "__version__", "0.1.0")
    tuned.save(SHAPES, CARD)
    monkeypatch.setattr(tuned.triton, "__version__", "3.6.1+git")
    monkeypatch.setattr(tuned, "__version__", "0.1.7")
    assert found() == SHAPES


def test_a_write_that_fails_leaves_what_was_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.save(SHAPES, CARD)

    def fail(path: Path, target: Path) -> None:
        assert json.loads(path.read_text())["card"] == CARD
        raise OSError("no")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no"):
        tuned.save(dict.fromkeys(SHAPES), CARD)
    assert found() == SHAPES
    assert [*file.parent.iterdir()] == [file]


def test_it_is_read_once(file: Path) -> None:
    tuned.save(SHAPES, CARD)
    found()
    file.unlink()
    assert tuned.lookup("prefill", (64, 2), torch.device("cpu")) == (32, 16, 2, 1)


def test_it_is_what_decode_plans_take(device: str) -> None:
    def plan(max_rows: int, heads: int = 4, **settings: Any) -> DecodeConfig:
        return DecodePlan(max_rows, heads, 2, 64, device, max_blocks=2, **settings).config

    tuned.save(SHAPES, CARD)
    given = DecodeConfig(32)
    assert plan(17) == DecodeConfig(16, 1, 1, 2)
    assert plan(17, config=given) is given
    assert plan(17, max_queries=3) == DecodeConfig(16, 2, 1, 2)
    assert plan(16, fp8=True) == DecodeConfig(16, 3, 1, 2)
    where = torch.device(device)
    assert plan(16) == default_decode_config(64, 16, where)
    assert plan(17, heads=8) == default_decode_config(64, 17, where)
    assert plan(16, max_queries=3, fp8=True) == default_decode_config(64, 16, where, several=True, fp8=True)


def launched(module: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of the module's latest launch, from now on; it launches nothing."""
    options: dict[str, Any] = {}
    monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **given: options.update(given))
    return options


def test_it_is_what_chunks_are_launched_with(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ints = torch.zeros(2, dtype=torch.int32, device=device)
    q = torch.zeros(1, 4, 64, dtype=torch.float16, device=device)
    cache = torch.zeros(1, 2, 2, 16, 64, dtype=torch.float16, device=device)

    options = launched(paged_prefill, monkeypatch)

    def block_m() -> int:
        paged_prefill.paged_prefill(q, cache, ints[None], ints[:1], ints, ints[:1])
        return int(options["BLOCK_M"])

    assert block_m() == paged_prefill.PrefillConfig().block_m
    tuned.save(SHAPES, CARD)
    assert block_m() == 32


def test_measured_goes_before_shipped_before_default(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(32, 64, dtype=torch.float16, device=device)

    options = launched(gemv, monkeypatch)

    def block_n(rows: int = 1) -> int:
        gemv.thin_linear(weight[:rows], weight)
        return int(options["BLOCK_N"])

    assert block_n() == 2
    monkeypatch.setitem(gemv.HOPPER, (32, 64, False), ((8, 32, 1), (16, 32, 1)))
    assert (block_n(), block_n(2)) == (8, 16)
    tuned.save(SHAPES, CARD)
    assert (block_n(), block_n(2)) == (4, 16)
