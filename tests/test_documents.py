"""What the documents promise by naming a test is held by that test: it has to exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docker/*.md")])
OFFICER = ROOT / "docs" / "for-the-security-officer.md"
TEST = re.compile(r"(tests/[a-z_0-9/]+\.py)::(test_[a-z_0-9]+)")


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_exists(document):
    for path, name in TEST.findall(document.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file(), f"{document.name} names {path}"
        assert name in names_in(ROOT / path), f"{document.name} names {path}::{name}"


def test_a_missing_test_would_be_noticed():
    assert TEST.findall("see `tests/client/test_gate.py::test_no_such_thing`.") == [
        ("tests/client/test_gate.py", "test_no_such_thing")
    ]
    assert "test_no_such_thing" not in names_in(ROOT / "tests" / "client" / "test_gate.py")


def test_every_claim_of_the_officers_guide_names_a_test():
    claims, is_claim = [], False
    for line in OFFICER.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            is_claim = False
        elif cells[-1] == "test":
            is_claim = True
        elif is_claim and not set(line) <= set("|-"):
            claims.append(line)
    assert len(claims) > 25
    for claim in claims:
        assert TEST.search(claim), claim


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_within_the_repository_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
