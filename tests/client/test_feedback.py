from pathlib import Path

import numpy as np
import pytest
import torch

from client.feedback import encode_with_feedback
from federation.adapter import Adapter, LowRank
from federation.wire import Update, encode, open_update, write_message

OUT, IN, RANK = 40, 70, 3


def start(directory: Path) -> Update:
    generator = torch.Generator().manual_seed(0)
    modules = {
        name: LowRank(
            torch.randn(OUT, RANK, generator=generator), torch.randn(RANK, IN, generator=generator)
        )
        for name in ("layers.0.q_proj", "layers.1.q_proj")
    }
    path = directory / "reference"
    write_message(path, Adapter(RANK, 6.0, modules), dtype="float32", base_model="m")
    return open_update(path)


def plus(adapter: Adapter, b: float, a: float, *, spike: float = 0.0) -> Adapter:
    """Move every number by a constant and the first one of each row by ``spike`` more."""
    modules = {}
    for name, f in adapter.modules.items():
        b_OR, a_RI = f.b_OR + b, f.a_RI + a
        b_OR[0] += spike
        a_RI[:, 0] += spike
        modules[name] = LowRank(b_OR, a_RI)
    return Adapter(adapter.rank, adapter.alpha, modules)


def flat(adapter: Adapter) -> np.ndarray:
    tensors = [t for f in adapter.modules.values() for t in (f.b_OR, f.a_RI)]
    return np.concatenate([tensor.numpy().astype(np.float64).ravel() for tensor in tensors])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_what_was_sent_is_what_was_to_be_sent_but_for_one_residual(
    tmp_path: Path, dtype: str
) -> None:
    received = start(tmp_path)
    origin = received.adapter()
    generator = torch.Generator().manual_seed(1)
    to_be_sent, sent, residual = 0.0, 0.0, None
    for _ in range(30):
        trained = Adapter(
            RANK,
            6.0,
            {
                name: LowRank(
                    f.b_OR + 0.1 * torch.randn(f.b_OR.shape, generator=generator),
                    f.a_RI + 0.1 * torch.randn(f.a_RI.shape, generator=generator) ** 3,
                )
                for name, f in origin.modules.items()
            },
        )
        message, residual = encode_with_feedback(
            trained, residual, received, dtype=dtype, factors="AB"
        )
        (tmp_path / "message").write_bytes(message)
        arrived = open_update(tmp_path / "message", reference=received).adapter()
        to_be_sent = to_be_sent + flat(trained) - flat(origin)
        sent = sent + flat(arrived) - flat(origin)
    assert np.abs(sent + flat(residual) - to_be_sent).max() < 30 * 4e-7  # float32 sums near 1
    assert np.abs(flat(residual)).max() < 0.2, "one round's rounding, not thirty"


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_small_change_beside_a_large_one_arrives_with_feedback_alone(
    tmp_path: Path, dtype: str
) -> None:
    received = start(tmp_path)
    origin = received.adapter()
    small, rounds = 1e-3, 32
    trained = plus(origin, small, small, spike=1.0)
    arrived = {"with": np.zeros(0), "without": np.zeros(0)}
    for kind in arrived:
        residual, total = None, 0.0
        for _ in range(rounds):
            if kind == "with":
                message, residual = encode_with_feedback(
                    trained, residual, received, dtype=dtype, factors="AB"
                )
            else:
                message = encode(trained, dtype=dtype, base_model="m", reference=received)
            (tmp_path / "message").write_bytes(message)
            got = open_update(tmp_path / "message", reference=received).adapter()
            total = total + flat(got) - flat(origin)
        arrived[kind] = total
    # The first numbers of A's first row: one block with the spike.
    row = slice(OUT * RANK + 1, OUT * RANK + 30)
    assert not arrived["without"][row].any(), "less than half a step: never sent"
    step = 1.0 / {"int8": 127, "int4": 7}[dtype]
    assert np.abs(arrived["with"][row] - rounds * small).max() <= step


@pytest.mark.parametrize("factors", ["A", "B"])
def test_the_factor_that_rests_keeps_its_residual(tmp_path: Path, factors: str) -> None:
    received = start(tmp_path)
    origin = received.adapter()
    trained = plus(origin, 0.01, 0.01, spike=1.0)
    _, both = encode_with_feedback(trained, None, received, dtype="int8", factors="AB")
    _, after = encode_with_feedback(trained, both, received, dtype="int8", factors=factors)
    for name, f in after.modules.items():
        before = both.modules[name]
        assert torch.equal(f.a_RI, before.a_RI) == (factors == "B")
        assert torch.equal(f.b_OR, before.b_OR) == (factors == "A")


def test_a_site_of_smaller_rank_has_a_residual_of_its_own_shape(tmp_path: Path) -> None:
    received = start(tmp_path)
    trained = plus(received.adapter().first_slices(2), 0.01, 0.02, spike=0.5)
    message, residual = encode_with_feedback(trained, None, received, dtype="int4", factors="AB")
    assert (residual.rank, residual.shapes()) == (2, trained.shapes())
    (tmp_path / "message").write_bytes(message)
    arrived = open_update(tmp_path / "message", reference=received).adapter()
    assert np.abs(flat(arrived) + flat(residual) - flat(trained)).max() < 1e-6
