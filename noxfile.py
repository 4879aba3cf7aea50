"""Every check of the project; ``nox`` runs all of them, ``nox -s NAME`` one, ``nox -l`` lists them."""

import importlib.util
from pathlib import Path

import nox

ROOT = Path(__file__).parent
LAYERS = ["traits", "core", "model", "server"]
"""From the lowest to the highest."""

nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["format", "lint", "types", "layers", "docs", "tests", "integration"]

_spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts" / "quickstart.py")
assert _spec is not None
assert _spec.loader is not None
quickstart = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(quickstart)


def _group(name: str) -> list[str]:
    return list(nox.project.dependency_groups(nox.project.load_toml(ROOT / "pyproject.toml"), name))


def _install(session: nox.Session, upto: str, *requirements: str) -> None:
    """The packages up to a layer, editable, and nothing above it; torch for the CPU where a layer needs it."""
    names = LAYERS[: LAYERS.index(upto) + 1]
    if "model" in names:
        quickstart.ensure_torch(Path(session.virtualenv.location) / "bin" / "python")
    session.install(*[part for name in names for part in ("-e", f"packages/vllm-{name}")], *requirements)


@nox.session
def format(session: nox.Session) -> None:  # noqa: A001 - the name one types
    """Check the formatting; ``nox -s format -- --fix`` applies it."""
    session.install(*_group("lint"))
    session.run("ruff", "format", *([] if "--fix" in session.posargs else ["--check"]), ".")


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's rules, each exception with its reason in pyproject.toml."""
    session.install(*_group("lint"))
    session.run("ruff", "check", ".", *session.posargs)


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict, over the four packages, the scripts and this file."""
    _install(session, "server", *_group("types"), *_group("ask"), "nox")
    session.run("mypy", *[f"packages/vllm-{name}/src" for name in LAYERS])
    session.run("mypy", "scripts", "noxfile.py")


@nox.session
def layers(session: nox.Session) -> None:
    """No layer imports one above it, and the engine imports no tensor library (import-linter)."""
    _install(session, "server", *_group("lint"))
    session.run("lint-imports")


@nox.session
def docs(session: nox.Session) -> None:
    """Links between the documents lead somewhere and their Python code parses."""
    session.install("pytest", "pytest-timeout")
    session.run("pytest", "tests-integration/test_docs.py", *session.posargs)


@nox.session
@nox.parametrize("layer", LAYERS, ids=LAYERS)
def tests(session: nox.Session, layer: str) -> None:
    """One package's tests with only the layers below it installed."""
    _install(session, layer, *_group("test"))
    session.run("pytest", f"packages/vllm-{layer}", *session.posargs)


@nox.session
def integration(session: nox.Session) -> None:
    """The four together: real clients on a real server, the README's code, the wheels in a fresh environment."""
    _install(session, "server", *_group("test"))
    session.run("pytest", "tests-integration", *session.posargs)


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """Branch coverage of the four packages by all tests (not run by default)."""
    _install(session, "server", *_group("test"), "coverage")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "report", "--skip-covered", "--show-missing")


@nox.session(default=False)
def nightly(session: nox.Session) -> None:
    """10,000 simulated workloads of the engine; ``nox -s nightly -- --seed 17`` runs one again (not run by default)."""
    _install(session, "core")
    session.run("python", "-m", "vllm_core.simulation", *(session.posargs or ["--seeds", "10000", "--jobs", "2"]))


@nox.session(default=False)
def mutation(session: nox.Session) -> None:
    """The share of changes to the engine that tests notice; ``-- --sample 50 --seed 3`` (not run by default)."""
    _install(session, "core", *_group("test"), "cosmic-ray")
    session.run("python", "scripts/mutation.py", *session.posargs)


@nox.session(default=False)
def sanitize(session: nox.Session) -> None:
    """The CPU kernels' tests under gcc's sanitizers, some minutes; ``-- address`` or ``-- thread`` (not run by default)."""
    _install(session, "model", *_group("test"))
    session.run("python", "scripts/sanitize_native.py", *session.posargs)


@nox.session(default=False)
def wheels(session: nox.Session) -> None:
    """Build the four wheels into dist/, the model's for this platform (not run by default)."""
    for name in LAYERS:
        session.run("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", "dist", f"packages/vllm-{name}")
