"""Simulated workloads: each seed a world, each law held after every step."""

import pytest

from vllm_core.scenario import draw
from vllm_core.simulation import SimulationFailure, main, simulate
from vllm_traits.fake_backend import Fault


@pytest.mark.parametrize("first", range(0, 300, 25))
def test_every_output_equals_its_solo_run_and_every_law_holds(first: int) -> None:
    for seed in range(first, first + 25):
        simulate(seed)


def test_a_seed_replays() -> None:
    seed = 3
    assert repr(draw(seed)) == repr(draw(seed)) != repr(draw(seed + 1))
    assert simulate(seed) == simulate(seed)


def test_the_seeds_reach_what_they_should() -> None:
    reports = [simulate(seed) for seed in range(1000, 1060)]
    total = sum((report.counts for report in reports), start=reports[0].counts)
    wanted = {"preemptions", "hits", "drafted", "right", "abort", "choice", "reset", "priority", "given up"}
    wanted |= {fault.name for fault in Fault if fault is not Fault.DIE}
    assert not wanted - set(+total)
    assert total["drafted"] > total["right"] > 100
    assert all(report.num_steps and report.seconds for report in reports)


def test_a_failure_names_its_seed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("vllm_core.scenario.expected_tokens", lambda *args, **kwargs: [0])
    with pytest.raises(SimulationFailure, match="seed 7: "):
        simulate(7)
    assert main(["--seeds", "2", "--first", "7"]) == 1
    out = capsys.readouterr().out
    assert "seed 7: AssertionError" in out
    assert "2 seeds, 2 failed" in out


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "17"]) == 0
    assert "EngineConfig" in capsys.readouterr().out
    assert main(["--seeds", "3", "--first", "5"]) == 0
    assert "3 seeds, 0 failed" in capsys.readouterr().out
