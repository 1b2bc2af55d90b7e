"""What the distillation tests share."""

from pathlib import Path

from client.batches import Example, encode_records
from client.model import load_tokenizer
from client.records import read_records
from tests.conftest import write_records


def examples_of(model: Path, directory: Path, count: int) -> list[Example]:
    """Return ``count`` encoded records."""
    records = read_records(write_records(directory / "records.jsonl", count))
    return encode_records(records, load_tokenizer(model), 64)
