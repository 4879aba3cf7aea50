"""The documents: links lead somewhere, Python code parses, commands exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(path for pattern in ("*.md", "docs/**/*.md", "packages/*/README.md") for path in ROOT.glob(pattern))
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)")
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere_and_code_parses(document: Path) -> None:
    text = document.read_text()
    for target in LINK.findall(text):
        assert (document.parent / target).exists(), f"{document.name} links to {target}, which is not there"
    for block in PYTHON.findall(text):
        ast.parse(block)


def test_every_decision_is_listed() -> None:
    listed = set(LINK.findall((ROOT / "docs/adr/README.md").read_text()))
    assert listed == {path.name for path in (ROOT / "docs/adr").glob("0*.md")}


def test_the_readmes_commands_exist() -> None:
    text = (ROOT / "README.md").read_text()
    scripts = re.findall(r"python3 (\S+\.py)", text)
    assert scripts
    for script in scripts:
        assert (ROOT / script).is_file()
    assert re.search(r"python3 scripts/quickstart.py test", (ROOT / ".ci/run").read_text())
