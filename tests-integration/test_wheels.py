"""The four wheels build, install into a fresh environment without this repository, and work there."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from vllm_model.native.build import VARIANTS, library_path, machine

ROOT = Path(__file__).parent.parent
PACKAGES = ("vllm-traits", "vllm-core", "vllm-model", "vllm-server")
PROGRAM = """
import sys
from pathlib import Path
import vllm_traits, vllm_core, vllm_model, vllm_server
here = Path(sys.prefix)
assert all(Path(m.__file__).is_relative_to(here) for m in (vllm_traits, vllm_core, vllm_model, vllm_server))
from vllm_core import Engine, SamplingParams
from vllm_traits.fake_backend import FakeBackend, expected_tokens
engine = Engine(FakeBackend())
engine.add_request("1", [1, 2, 3], SamplingParams(temperature=0, max_tokens=8))
while engine.has_unfinished_requests():
    tokens = list(engine.step()[0].outputs[0].token_ids)
assert tokens == expected_tokens([1, 2, 3], 8, 256)
from vllm_model import LLM
from vllm_model.native import load_kernels
from vllm_model.native.build import VARIANTS, library_path, machine
assert (load_kernels() is not None) == any(library_path(name).exists() for name in VARIANTS.get(machine(), ()))
llm = LLM("default", max_model_len=256)
answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0, max_tokens=16))
print(answer[0].outputs[0].text)
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "-w", str(folder)]
    subprocess.run([*command, *(str(ROOT / "packages" / package) for package in PACKAGES)], check=True)
    return folder


def test_a_wheel_holds_its_package_and_no_tests(wheels: Path) -> None:
    names = sorted(wheels.glob("*.whl"))
    assert len(names) == len(PACKAGES)
    for wheel in names:
        package = wheel.name.split("-")[0]
        with zipfile.ZipFile(wheel) as archive:
            files = archive.namelist()
        assert f"{package}/py.typed" in files
        assert all(file.split("/")[0] == package or ".dist-info/" in file for file in files)


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="there is no C compiler")
def test_the_models_wheel_carries_the_kernels_for_this_platform_and_every_python(wheels: Path) -> None:
    assert sorted(wheel.stem.split("-", 2)[2] == "py3-none-any" for wheel in wheels.glob("*.whl")) == [False, True, True, True]
    (wheel,) = wheels.glob("vllm_model-*.whl")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.stem.endswith(f"-py3-none-{platform}")
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
    libraries = {file.rpartition("/")[2] for file in files if file.endswith(".so")}
    assert libraries == {library_path(name).name for name in VARIANTS[machine()]}
    assert "vllm_model/native/decoder.c" in files  # its fingerprint says whether the libraries are current


def test_the_wheels_work_in_a_fresh_environment(wheels: Path, tmp_path: Path) -> None:
    """Third-party packages come from this environment through a path file: torch alone takes a gigabyte."""
    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=False)
    python = fresh / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--no-index", *map(str, sorted(wheels.glob("*.whl")))], check=True)
    site = next((fresh / "lib").glob("python3*/site-packages"))
    others = [path for path in map(Path, sys.path) if path.name == "site-packages" and path.is_dir()]
    (site / "zz-third-party.pth").write_text("".join(f"{path}\n" for path in others))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [python, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    version = subprocess.run([fresh / "bin" / "vllm-server", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.split() == ["vllm-server", "0.1.0"]
