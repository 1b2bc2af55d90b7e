import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from edge.chat import ChatError, render_chat
from edge.fidelity import (
    FidelityError,
    SourceReference,
    check_full_precision,
    check_tokenizer,
    measure_fidelity,
    read_source,
)
from edge.heldout import DataError, Example, encode_examples, read_heldout
from edge.manifest import Fidelity
from edge.runtime import open_runtime
from edge.vocabulary import load_tokenizer
from tests.edge.conftest import write_tokenizer


class Answers:
    """A runtime that predicts what it is told."""

    def __init__(self, logits_PV: np.ndarray) -> None:
        self.rows = iter(logits_PV.astype(np.float32))

    def logits(self, _ids: Sequence[int], positions: Sequence[int]) -> Iterator[np.ndarray]:
        return (next(self.rows) for _ in positions)


def reference(num_positions: int, vocabulary: int) -> SourceReference:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_positions, 16, generator=generator)
    head = torch.randn(vocabulary, 16, generator=generator)
    ids = [(7 * index) % vocabulary for index in range(num_positions + 1)]
    half = num_positions // 2
    first = Example(ids[: half + 1], list(range(half)))
    second = Example(ids[half:], list(range(num_positions - half)))
    return SourceReference([first, second], hidden, head)


def test_figures_are_those_of_torch() -> None:
    source = reference(75, 50)  # more than two chunks
    p_PV = torch.log_softmax((source.hidden_PE @ source.head_VE.T).double(), dim=-1)
    logits = torch.randn(75, 50, generator=torch.Generator().manual_seed(1))
    q_PV = torch.log_softmax(logits.double(), dim=-1)
    found = measure_fidelity(source, Answers(logits.numpy()), "heldout")
    kl_P = torch.nn.functional.kl_div(q_PV, p_PV, reduction="none", log_target=True).sum(-1)
    targets = torch.tensor([(7 * index) % 50 for index in range(1, 76)])
    assert found.kl == pytest.approx(kl_P.mean().item(), rel=1e-5)
    assert found.kl_max == pytest.approx(kl_P.max().item(), rel=1e-5)
    assert found.kl_p99 == pytest.approx(kl_P.quantile(0.99).item(), rel=1e-5)
    assert found.top1_agreement == (p_PV.argmax(-1) == q_PV.argmax(-1)).double().mean().item()
    nll = torch.nn.functional.nll_loss
    assert found.perplexity == pytest.approx(nll(q_PV, targets).exp().item(), rel=1e-5)
    assert found.source_perplexity == pytest.approx(nll(p_PV, targets).exp().item(), rel=1e-5)
    assert (found.num_tokens, found.data) == (75, "heldout")


def test_a_source_does_not_diverge_from_itself() -> None:
    source = reference(10, 30)
    logits = (source.hidden_PE @ source.head_VE.T).numpy()
    found = measure_fidelity(source, Answers(logits), "probe")
    assert found.kl < 1e-12
    assert found.top1_agreement == 1.0
    assert found.perplexity == pytest.approx(found.source_perplexity)


def test_logits_that_are_not_finite_are_an_error() -> None:
    logits = np.zeros((10, 30))
    logits[3] = np.nan
    with pytest.raises(FidelityError, match="not finite"):
        measure_fidelity(reference(10, 30), Answers(logits), "probe")


def test_a_float_build_that_diverges_is_an_error() -> None:
    fidelity = Fidelity(
        kl=2e-3,
        kl_p99=0.1,
        kl_max=0.2,
        top1_agreement=0.9,
        perplexity=5.0,
        source_perplexity=4.9,
        num_tokens=10,
        data="probe",
    )
    check_full_precision(fidelity, "gguf:bf16", 1e-2)
    with pytest.raises(FidelityError, match=r"gguf:f16 diverges .* 0.002 nats"):
        check_full_precision(fidelity, "gguf:f16", 1e-3)


def test_source_predictions_are_the_models_own(llama_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(llama_model)
    examples = encode_examples([("One?", "One."), ("Two?", "Two and more.")], tokenizer, 100)
    source = read_source(llama_model, examples)
    found = source.hidden_PE @ source.head_VE.T
    model = AutoModelForCausalLM.from_pretrained(llama_model, dtype=torch.float32)
    with torch.no_grad():
        whole = [model(torch.tensor([e.token_ids])).logits[0, e.positions] for e in examples]
    assert torch.allclose(found, torch.cat(whole), atol=1e-4)
    # The response and its end of turn are scored, the prompt is not.
    scored = [source.targets[: len(examples[0].positions)], source.targets[-4:]]
    assert tokenizer.decode(scored[0]) == "One.<|im_end|>"
    assert scored[1][-1] == tokenizer.eos_token_id


def test_scored_tokens_stop_at_the_limit(llama_model: Path) -> None:
    records = [("What?", "a b c d e f g h i j k l m n o p")] * 4
    examples = encode_examples(records, load_tokenizer(llama_model), 50)
    assert sum(len(example.positions) for example in examples) == 50
    long = [("word " * 600, "answer"), ("short", "answer " * 600)]
    (kept,) = encode_examples(long, load_tokenizer(llama_model), 10_000)
    assert len(kept.token_ids) == 512


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            (
                "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
                "{% if add_generation_prompt %}<assistant><think>{% endif %}"
            ),
            "begins a finished turn otherwise than the prompt",
        ),
        ("{{ messages[0]['content'] }}\n", "leaves no token"),
        ("{{ 1 + messages[0]['content'] }}", r"cannot render .* \(TypeError\)"),
    ],
)
def test_a_template_that_cannot_be_scored_is_refused(
    template: str, message: str, llama_model: Path
) -> None:
    tokenizer = load_tokenizer(llama_model)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=message) as error:
        encode_examples([("SECRET?", "SECRET.")], tokenizer, 100)
    assert "SECRET" not in str(error.value)


def test_another_tokenizer_is_seen(builds: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "qwen2")
    with (
        open_runtime(builds / "gguf-f16", threads=1) as runtime,
        pytest.raises(FidelityError, match="probe conversation 1"),
    ):
        check_tokenizer(runtime, load_tokenizer(tmp_path), "gguf:f16")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("SECRET", r":2: not JSON .* at column 1"),
        ('{"prompt": "SECRET"}', ":2: field 'response' is not a non-empty string"),
        ('{"prompt": "SECRET", "response": 5}', ":2: field 'response'"),
        ('{"prompt": " ", "response": "SECRET"}', ":2: field 'prompt'"),
        ('["SECRET"]', ":2: not a JSON object"),
        ('{"prompt": "SECRET\udce9"}', ":2: not UTF-8"),
    ],
)
def test_a_bad_line_is_named_and_its_text_is_not(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "heldout.jsonl"
    good = json.dumps({"prompt": "a", "response": "b"})
    path.write_bytes(f"{good}\n{line}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message) as error:
        read_heldout([path])
    assert "SECRET" not in str(error.value)


def test_each_heldout_file_has_a_say(tmp_path: Path) -> None:
    paths = []
    for name, count in (("x", 3), ("y", 1)):
        lines = [json.dumps({"prompt": f"{name}{i}", "response": "r"}) for i in range(count)]
        (tmp_path / name).write_text("\n".join([*lines, ""]))
        paths.append(tmp_path / name)
    assert [prompt for prompt, _ in read_heldout(paths)] == ["x0", "y0", "x1", "x2"]
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DataError, match="holds no record"):
        read_heldout([tmp_path / "empty"])


def test_chat_templates_render_as_in_transformers(llama_model: Path) -> None:
    tokenizer = load_tokenizer(llama_model)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}\n  {% if m['role'] == 'system' %}"
        "{% continue %}{% endif %}\n<{{ m['role'] }}> {{ m['content'] | tojson }} "
        "{{ m['content'] | trim }}\n{% endfor %}\n"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [
        {"role": "system", "content": "be <brief>"},
        {"role": "user", "content": " <b>naïve</b> & 'so' "},
    ]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    assert render_chat(tokenizer.chat_template, messages, special) == expected


def test_a_template_may_refuse_a_conversation() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ChatError, match="roles must alternate"):
        render_chat(template, [{"role": "user", "content": "x"}], {})
    with pytest.raises(ChatError, match="refuses"):
        render_chat("{{ messages.__class__.__mro__ }}", [{"role": "user", "content": "x"}], {})


@pytest.mark.parametrize(
    "template", ["{{ 1 + 'a' }}", "{{ range(0, 5, 0) | list }}", "{{ 1 / 0 }}"]
)
def test_a_template_that_fails_is_one_sentence(template: str) -> None:
    with pytest.raises(
        ChatError, match=r"template fails on the conversation \(\w+Error: "
    ) as error:
        render_chat(template, [{"role": "user", "content": "x"}], {})
    assert "\n" not in str(error.value)
