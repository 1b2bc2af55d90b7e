from pathlib import Path

import pytest
import torch

from client.batches import (
    IGNORED,
    Example,
    batches_of_like_length,
    collate,
    encode_records,
)
from client.model import ModelError, load_model, load_tokenizer, same_tokens
from client.records import DataError, Record


def test_response_and_end_of_turn_are_learned_and_the_prompt_is_not(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    record = Record("What is red?", "a cold heart", 1)
    (example,) = encode_records([record], tokenizer, 200)
    prompt = tokenizer.decode(example.input_ids[: example.num_prompt])
    learned = tokenizer.decode(example.input_ids[example.num_prompt :])
    assert prompt == "<|im_start|>user\nWhat is red?<|im_end|>\n<|im_start|>assistant\n"
    assert learned == "a cold heart<|im_end|>"


def test_a_long_response_is_cut_without_an_end_of_turn(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    (example,) = encode_records([Record("p", "red blue " * 100, 1)], tokenizer, 40)
    assert len(example.input_ids) == 40
    assert (
        tokenizer.convert_tokens_to_ids("<|im_end|>") not in example.input_ids[example.num_prompt :]
    )


def test_prompts_that_leave_no_room_are_left_out(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    records = [Record("x" * 300, "r", 1), Record("p", "r", 2)]
    assert len(encode_records(records, tokenizer, 60)) == 1
    with pytest.raises(DataError, match="no record fits 60 tokens"):
        encode_records(records[:1], tokenizer, 60)


def test_for_private_training_every_record_is_an_example(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    records = [Record("x" * 300, "r", 1), Record("p", "r", 2)]
    blank, whole = encode_records(records, tokenizer, 60, keeps_all=True)
    assert (blank.input_ids, blank.num_learned) == ((), 0)
    assert [whole] == encode_records(records, tokenizer, 60)
    assert whole.num_learned == len(whole.input_ids) - whole.num_prompt > 0
    assert encode_records(records[:1], tokenizer, 60, keeps_all=True) == [blank]


def test_collate_pads_on_the_right_and_hides_padding_and_prompt() -> None:
    batch = collate([Example((5, 6, 7), 1), Example((8, 9), 1)], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]


def test_a_tokenizer_that_knows_more_ids_than_the_model_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    import json
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    config = json.loads((broken / "config.json").read_text())
    config["vocab_size"] = 100
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="tokenizer mismatch: it knows token id"):
        load_tokenizer(broken)
    config["architectures"] = ["MambaForCausalLM"]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="MambaForCausalLM is not supported"):
        load_model(broken, "float32")
    (broken / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        load_tokenizer(broken)


def test_token_maps_are_compared_by_string(tiny_model: Path, tmp_path: Path) -> None:
    import json
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    assert same_tokens(tiny_model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert not same_tokens(tiny_model, other)


def test_padding_changes_no_logit(tiny_model: Path) -> None:
    model = load_model(tiny_model, "float32")
    short, long = Example(tuple(range(3, 13)), 2), Example(tuple(range(3, 33)), 2)
    alone = collate([short], pad_id=0)
    padded = collate([short, long], pad_id=0)
    with torch.inference_mode():
        one = model(alone["input_ids"], attention_mask=alone["attention_mask"]).logits[0]
        two = model(padded["input_ids"], attention_mask=padded["attention_mask"]).logits[0, :10]
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_batches_of_like_length_hold_the_same_examples_with_less_padding() -> None:
    lengths = [(7 * index) % 50 + 3 for index in range(200)]
    examples = [Example(tuple(range(length)), 1) for length in lengths]
    ordered = batches_of_like_length(examples, 8, seed=0)
    assert sorted(map(hash, ordered)) == sorted(map(hash, examples))
    assert ordered == batches_of_like_length(examples, 8, seed=0)

    def padded(stream: list[Example]) -> int:
        batches = [stream[i : i + 8] for i in range(0, len(stream), 8)]
        return sum(8 * max(len(e.input_ids) for e in batch) for batch in batches)

    assert padded(ordered) < 0.75 * padded(examples)
    # Stays near: an epoch is still seen once before it is seen twice.
    assert sorted(map(hash, ordered[:64])) == sorted(map(hash, examples[:64]))


def test_a_template_that_hides_where_the_answer_begins_is_refused(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    with pytest.raises(DataError, match="what is to be learned cannot be cut out"):
        encode_records([Record("p", "r", 1)], tokenizer, 60)
