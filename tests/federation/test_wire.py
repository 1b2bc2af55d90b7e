import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from federation.adapter import Adapter, LowRank
from federation.wire import MAGIC, VERSION, WireError, encode, open_update


def adapter(rank: int = 3, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layers.0.q_proj": (8, 6), "layers.1.down_proj": (5, 9)}
    return Adapter(
        rank,
        2.0 * rank,
        {
            name: LowRank(
                torch.randn(out, rank, generator=generator),
                torch.randn(rank, inn, generator=generator),
            )
            for name, (out, inn) in shapes.items()
        },
    )


def store(tmp_path: Path, message: bytes) -> Path:
    path = tmp_path / "message"
    path.write_bytes(message)
    return path


def test_float32_comes_back_bit_for_bit(tmp_path: Path) -> None:
    sent = adapter()
    update = open_update(store(tmp_path, encode(sent, dtype="float32", base_model="d" * 64)))
    assert (update.rank, update.alpha, update.base_model) == (3, 6.0, "d" * 64)
    assert update.shapes() == {"layers.0.q_proj": (8, 6), "layers.1.down_proj": (5, 9)}
    received = update.adapter()
    for name, factors in sent.modules.items():
        assert torch.equal(received.modules[name].b_OR, factors.b_OR)
        assert torch.equal(received.modules[name].a_RI, factors.a_RI)


def test_bfloat16_rounds_to_nearest_and_halves_the_bytes(tmp_path: Path) -> None:
    sent = adapter()
    message = encode(sent, dtype="bfloat16", base_model="")
    received = open_update(store(tmp_path, message)).adapter()
    for name, factors in sent.modules.items():
        assert torch.equal(received.modules[name].b_OR, factors.b_OR.bfloat16().float())
    numbers = 3 * (8 + 6 + 5 + 9)
    other = encode(sent, dtype="float32", base_model="")
    assert len(other) - len(message) == 2 * numbers - len("bfloat16") + len("float32")


@given(st.data())
def test_any_changed_byte_is_noticed(data: st.DataObject) -> None:
    import tempfile

    message = bytearray(encode(adapter(), dtype="bfloat16", base_model="m"))
    index = data.draw(st.integers(0, len(message) - 1))
    message[index] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as directory, pytest.raises(WireError):
        open_update(store(Path(directory), bytes(message)))


@given(st.integers(0, 10_000))
def test_any_truncation_is_noticed(cut: int) -> None:
    import tempfile

    message = encode(adapter(), dtype="float32", base_model="m")
    with tempfile.TemporaryDirectory() as directory, pytest.raises(WireError):
        open_update(store(Path(directory), message[: cut % len(message)]))


def test_trailing_bytes_are_noticed(tmp_path: Path) -> None:
    message = encode(adapter(), dtype="float32", base_model="m")
    with pytest.raises(WireError, match="cut off or altered"):
        open_update(store(tmp_path, message + b"\0"))


def test_another_version_is_refused_with_both_numbers(tmp_path: Path) -> None:
    message = encode(adapter(), dtype="float32", base_model="m")
    other = struct.pack("<4sH", MAGIC, VERSION + 1) + message[6:]
    with pytest.raises(WireError, match=f"version {VERSION + 1}, this side reads {VERSION}"):
        open_update(store(tmp_path, other))


def test_a_forged_header_of_absurd_size_costs_no_memory(tmp_path: Path) -> None:
    header = struct.pack("<4sHI", MAGIC, VERSION, 2**32 - 1)
    with pytest.raises(WireError, match="claims 4294967295 bytes"):
        open_update(store(tmp_path, header + b"{}" * 100))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_never_leave_or_enter(tmp_path: Path, value: float) -> None:
    import hashlib

    poisoned = adapter()
    poisoned.modules["layers.0.q_proj"].b_OR[2, 1] = value
    with pytest.raises(WireError, match="layers.0.q_proj.B"):
        encode(poisoned, dtype="float32", base_model="m")
    message = bytearray(encode(adapter(), dtype="float32", base_model="m"))
    length = struct.unpack_from("<I", message, 6)[0]
    start = 10 + length  # the first number of layers.0.q_proj.B
    message[start : start + 4] = struct.pack("<f", value)
    message[-32:] = hashlib.sha256(message[:-32]).digest()
    with pytest.raises(WireError, match="holds NaN, infinity"):
        open_update(store(tmp_path, bytes(message)))


def test_a_header_whose_shapes_contradict_its_rank_is_refused(tmp_path: Path) -> None:
    import hashlib

    message = encode(adapter(), dtype="float32", base_model="m")
    length = struct.unpack_from("<I", message, 6)[0]
    header = json.loads(message[10 : 10 + length])
    header["rank"] = 4
    raw = json.dumps(header).encode()
    body = struct.pack("<4sHI", MAGIC, VERSION, len(raw)) + raw + message[10 + length : -32]
    with pytest.raises(WireError, match="in rank 4"):
        open_update(store(tmp_path, body + hashlib.sha256(body).digest()))


def forged(change: dict[str, object]) -> bytes:
    """A message whose header was changed and whose checksum is right."""
    import hashlib

    message = encode(adapter(), dtype="float32", base_model="m")
    length = struct.unpack_from("<I", message, 6)[0]
    header = json.loads(message[10 : 10 + length]) | change
    raw = json.dumps(header).encode()
    body = struct.pack("<4sHI", MAGIC, VERSION, len(raw)) + raw + message[10 + length : -32]
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    "change",
    [
        {"factors": "BA"},
        {"factors": "B"},
        {"factors": ["AB"]},
        {"factors": None},
        {"reference": "0" * 64},
        {"reference": None},
        {"dtype": "int8"},
        {"dtype": "int8", "reference": "0" * 64},
        {"dtype": "int4", "reference": "../../etc/passwd"},
        {"tensors": []},
        {"tensors": [["layers.0.q_proj.C", [3, 8]]]},
        {"tensors": [["layers.0.q_proj.B", [3, 10**4000]]]},
        {"tensors": [["layers.0.q_proj.B", [3, 8]], ["layers.0.q_proj.B", [3, 8]]]},
        {"rank": float("inf")},
        {"rank": 3.0},
        {"rank": True},
        {"rank": 10**9},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"alpha": 1e300},
        {"alpha": "6"},
        {"dtype": ["float32"]},
        {"base_model": "\x1b[2J\nround 9: done"},
        {"base_model": "m" * 100_000},
        {"base_model": "m" * 65},
        {"base_model": ["m"]},
        {"tensors": [["\x1b[2J" + "y" * 100_000 + ".B", [3, 8]]]},
        {"tensors": [["layers.0.q_proj.B", ["\x1b[2J", 8]]]},
        {"tensors": 5},
        {"tensors": [[5, [8, 3]]]},
        {"tensors": [["layers.0.q_proj.B", [3, 8.0]]]},
        {"tensors": [["layers.0.q_proj.B", [3]]]},
        {"tensors": [["layers.0.q_proj.B", [3, 8]]]},
        {"tensors": [["layers.0.q_proj.B", [8, 3]], ["layers.0.q_proj.A", [3, 6]]]},
    ],
)
def test_a_hostile_header_is_a_wire_error_and_nothing_else(
    tmp_path: Path, change: dict[str, object]
) -> None:
    with pytest.raises(WireError) as caught:
        open_update(store(tmp_path, forged(change)))
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable(), "it goes to a log and a terminal"


def test_a_header_nested_without_end_is_a_wire_error(tmp_path: Path) -> None:
    import hashlib

    raw = b"[" * 200_000
    body = struct.pack("<4sHI", MAGIC, VERSION, len(raw)) + raw
    with pytest.raises(WireError, match="not readable"):
        open_update(store(tmp_path, body + hashlib.sha256(body).digest()))
