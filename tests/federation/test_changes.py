"""Messages that stand on a reference: changes in blocks, and one factor of two."""

import hashlib
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.adapter import Adapter, LowRank
from federation.header import PREFIX
from federation.wire import (
    MissingReferenceError,
    Update,
    WireError,
    content_digest,
    encode,
    message_bytes,
    open_update,
    payload_bytes,
    reference_of,
    tensors_of,
    whole_message,
    write_known,
    write_message,
)
from tests.federation.test_wire import adapter, store

SEVEN_B = {
    f"layers.{layer}.{name}": shape
    for layer in range(28)
    for name, shape in {
        "q_proj": (3584, 3584),
        "k_proj": (512, 3584),
        "v_proj": (512, 3584),
        "o_proj": (3584, 3584),
        "gate_proj": (18944, 3584),
        "up_proj": (18944, 3584),
        "down_proj": (3584, 18944),
    }.items()
}


def moved(start: Adapter, seed: int = 1, size: float = 0.01) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        start.rank,
        start.alpha,
        {
            name: LowRank(
                f.b_OR + size * torch.randn(f.b_OR.shape, generator=generator),
                f.a_RI + size * torch.randn(f.a_RI.shape, generator=generator),
            )
            for name, f in start.modules.items()
        },
    )


def stored(directory: Path, held: Adapter, name: str = "reference") -> Update:
    write_message(directory / name, held, dtype="float32", base_model="m")
    return open_update(directory / name)


def change(directory: Path, dtype: str, **arguments: object) -> Path:
    start = adapter()
    message = encode(moved(start), dtype=dtype, base_model="m", reference=start, **arguments)
    return store(directory, message)


def equal(one: Adapter, other: Adapter) -> bool:
    return one.modules.keys() == other.modules.keys() and all(
        torch.equal(f.b_OR, other.modules[n].b_OR) and torch.equal(f.a_RI, other.modules[n].a_RI)
        for n, f in one.modules.items()
    )


@pytest.mark.parametrize(("dtype", "levels", "size"), [("int8", 127, 64), ("int4", 7, 32)])
def test_a_change_arrives_within_half_a_step_of_its_block(
    tmp_path: Path, dtype: str, levels: int, size: int
) -> None:
    start = adapter()
    target = moved(start)
    received = open_update(change(tmp_path, dtype), reference=stored(tmp_path, start)).adapter()
    for name, factors in target.modules.items():
        pairs = [
            (received.modules[name].b_OR.T, factors.b_OR.T, start.modules[name].b_OR.T),
            (received.modules[name].a_RI, factors.a_RI, start.modules[name].a_RI),
        ]
        for got, wanted, origin in pairs:
            wanted_change = (wanted - origin).numpy().astype(np.float64).ravel()
            error = np.abs(got.numpy().astype(np.float64) - wanted.numpy()).ravel()
            for first in range(0, len(error), size):
                step = np.abs(wanted_change[first : first + size]).max() / levels
                # 2^-8: the scale is a bfloat16; 3e-7: the sum is rounded to float32.
                assert error[first : first + size].max() <= step / 2 * (1 + 2**-8) + 3e-7


def test_decoding_is_a_product_and_a_sum_in_float32(tmp_path: Path) -> None:
    """The bytes are taken apart by numpy: both sides must get these very bits."""
    start = adapter()
    path = change(tmp_path, "int8")
    update = open_update(path, reference=stored(tmp_path, start))
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<I", raw, 6)
    offset = PREFIX.size + length
    scale = np.frombuffer(raw, np.uint16, 1, offset).astype(np.uint32) << 16
    codes = np.frombuffer(raw, np.int8, 24, offset + 2)
    values = codes.astype(np.float32) * scale.view(np.float32)
    origin = start.modules["layers.0.q_proj"].b_OR.T.numpy().ravel()
    got = update.read("layers.0.q_proj").b_OR.T.numpy().ravel()
    assert np.array_equal(got, values + origin)


def test_no_change_arrives_as_no_change(tmp_path: Path) -> None:
    start = adapter()
    for dtype in ("int8", "int4"):
        message = encode(start, dtype=dtype, base_model="m", reference=start)
        update = open_update(store(tmp_path, message), reference=stored(tmp_path, start))
        assert equal(update.adapter(), start)
        assert update.sha256_of_content == update.reference == content_digest(start, "m")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_change_needs_a_reference_on_both_sides(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(WireError, match=f"{dtype} AB stands on an adapter.*as float32"):
        encode(adapter(), dtype=dtype, base_model="m")
    path = change(tmp_path, dtype)
    wanted = content_digest(adapter(), "m")
    assert reference_of(path) == wanted
    with pytest.raises(MissingReferenceError, match=f"{wanted[:16]}…, this side holds none"):
        open_update(path)
    other = stored(tmp_path, adapter(seed=5))
    named = f"{wanted[:16]}…, this side holds {other.checksum[:16]}…"
    with pytest.raises(MissingReferenceError, match=named):
        open_update(path, reference=other)


def test_the_content_digest_names_the_adapter_whatever_brought_it(tmp_path: Path) -> None:
    start = adapter()
    whole = stored(tmp_path, start)
    digest = content_digest(start, "m")
    assert digest == whole.checksum == whole.sha256_of_content == content_digest(whole, "m")
    assert digest == encode(start, dtype="float32", base_model="m")[-32:].hex()
    assert digest != content_digest(start, "another model")
    arrived = open_update(change(tmp_path, "int4"), reference=whole)
    assert arrived.sha256_of_content == content_digest(arrived.adapter(), "m")
    narrow = open_update(store(tmp_path, encode(start, dtype="bfloat16", base_model="m")))
    assert narrow.sha256_of_content == content_digest(narrow.adapter(), "m") != narrow.checksum


def test_both_ends_of_a_chain_of_changes_hold_the_same_bits(tmp_path: Path) -> None:
    """Three rounds of int8 down: server and site name and hold the same adapter each time."""
    server = site = stored(tmp_path, adapter(), "round-0")
    for number in range(1, 4):
        path = tmp_path / f"change-{number}"
        target = moved(server.adapter(), seed=number)
        write_message(path, target, dtype="int8", base_model="m", reference=server)
        kept = []
        for end, held in (("server", server), ("site", site)):
            arrived = open_update(path, reference=held)
            place = tmp_path / f"{end}-{number}"
            assert arrived.sha256_of_content == write_message(
                place, arrived, dtype="float32", base_model="m"
            )
            kept.append(open_update(place))
        server, site = kept
        assert server.path.read_bytes() == site.path.read_bytes()


@pytest.mark.parametrize("factors", ["A", "B"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_one_factor_travels_and_the_other_comes_from_the_reference(
    tmp_path: Path, dtype: str, factors: str
) -> None:
    start = adapter()
    target = moved(start)
    with pytest.raises(WireError, match=f"{dtype} {factors} stands on"):
        encode(target, dtype=dtype, base_model="m", factors=factors)
    path = change(tmp_path, dtype, factors=factors)
    whole = encode(target, dtype=dtype, base_model="m", reference=start)
    assert path.stat().st_size < len(whole)
    update = open_update(path, reference=stored(tmp_path, start))
    assert (update.factors, update.shapes()) == (factors, start.shapes())
    for name, got in update.adapter().modules.items():
        trained, frozen = target.modules[name], start.modules[name]
        sent, kept = (got.a_RI, got.b_OR) if factors == "A" else (got.b_OR, got.a_RI)
        wanted = trained.a_RI if factors == "A" else trained.b_OR
        assert torch.equal(kept, frozen.b_OR if factors == "A" else frozen.a_RI)
        assert (
            torch.equal(sent, wanted) if dtype == "float32" else (sent - wanted).abs().max() < 0.1
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("factors", ["AB", "A", "B"])
def test_a_site_of_smaller_rank_stands_on_the_first_slices(
    tmp_path: Path, dtype: str, factors: str
) -> None:
    start = adapter(rank=7)
    small = start.first_slices(3)
    assert (small.rank, small.scale) == (3, start.scale)
    target = moved(small)
    message = encode(target, dtype=dtype, base_model="m", reference=start, factors=factors)
    update = open_update(store(tmp_path, message), reference=stored(tmp_path, start))
    assert (update.rank, update.alpha) == (3, small.alpha)
    alone = encode(target, dtype=dtype, base_model="m", reference=small, factors=factors)
    (tmp_path / "alone").write_bytes(alone)
    expected = open_update(tmp_path / "alone", reference=stored(tmp_path, small, "small"))
    assert equal(update.adapter(), expected.adapter())


def test_a_change_of_other_slices_or_scale_is_refused_with_both(tmp_path: Path) -> None:
    start = adapter()
    wide = Adapter(7, 14.0, adapter(rank=7).modules)
    with pytest.raises(WireError, match="rank 7 and alpha 14 do not fit a reference of rank 3"):
        encode(wide, dtype="int8", base_model="m", reference=start)
    louder = Adapter(3, 7.0, start.modules)
    with pytest.raises(WireError, match="alpha 7 do not fit .* alpha 6"):
        encode(louder, dtype="int8", base_model="m", reference=start)
    fewer = Adapter(3, 6.0, {"layers.0.q_proj": start.modules["layers.0.q_proj"]})
    with pytest.raises(WireError, match="not those of its reference"):
        encode(fewer, dtype="int8", base_model="m", reference=start)


@pytest.mark.parametrize(
    ("change_header", "sentence"),
    [
        ({"alpha": 7.0}, "alpha 7 do not fit a reference of rank 3 and alpha 6"),
        ({"base_model": "n"}, "belongs to base model n…, its reference to m…"),
        ({"renamed": True}, "not those of its reference"),
    ],
)
def test_a_forged_change_that_does_not_fit_its_reference_is_refused(
    tmp_path: Path, change_header: dict[str, object], sentence: str
) -> None:
    message = change(tmp_path, "int8").read_bytes()
    length = struct.unpack_from("<I", message, 6)[0]
    header = json.loads(message[10 : 10 + length])
    if change_header.pop("renamed", False):
        header["tensors"] = [[n.replace("q_proj", "k_proj"), s] for n, s in header["tensors"]]
        change_header["renamed"] = True
    else:
        header |= change_header
    raw = json.dumps(header).encode()
    body = message[:6] + struct.pack("<I", len(raw)) + raw + message[10 + length : -32]
    path = store(tmp_path, body + hashlib.sha256(body).digest())
    with pytest.raises(WireError, match=sentence):
        open_update(path, reference=stored(tmp_path, adapter()))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 3e38])
def test_a_forged_scale_that_is_not_finite_in_the_end_is_refused(
    tmp_path: Path, scale: float
) -> None:
    message = bytearray(change(tmp_path, "int8").read_bytes())
    start = 10 + struct.unpack_from("<I", message, 6)[0]
    message[start : start + 2] = struct.pack("<f", scale)[2:]
    message[-32:] = hashlib.sha256(message[:-32]).digest()
    with pytest.raises(WireError, match="layers.0.q_proj.B holds NaN, infinity"):
        open_update(store(tmp_path, bytes(message)), reference=stored(tmp_path, adapter()))


@settings(deadline=None)  # a stall of a shared machine is no fault of the format
@given(st.data())
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_any_changed_byte_or_truncation_of_a_change_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("changes")
    message = bytearray(change(directory, dtype).read_bytes())
    if data.draw(st.booleans()):
        message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del message[data.draw(st.integers(0, len(message) - 1)) :]
    with pytest.raises(WireError):
        open_update(store(directory, bytes(message)), reference=stored(directory, adapter()))


def test_a_message_that_claims_more_than_it_has_costs_no_memory(tmp_path: Path) -> None:
    """16 million columns at rank 1024 in a message of some hundred bytes: 17 GB if believed."""
    header = {
        "dtype": "int8",
        "rank": 1024,
        "alpha": 2048.0,
        "base_model": "m",
        "factors": "AB",
        "reference": "0" * 64,
        "tensors": [["q_proj.B", [1024, 1 << 24]], ["q_proj.A", [1024, 1 << 24]]],
    }
    raw = json.dumps(header).encode()
    body = PREFIX.pack(b"FDGW", 2, len(raw)) + raw + b"\0" * 100
    path = store(tmp_path, body + hashlib.sha256(body).digest())
    claimed = 2 * ((1 << 34) + 2 * (1 << 28))
    with pytest.raises(WireError, match=f"has 100 bytes of tensors, its header says {claimed}"):
        open_update(path)


@pytest.mark.parametrize(("dtype", "ratio"), [("bfloat16", 0.5), ("int8", 0.27), ("int4", 0.15)])
def test_a_7b_adapter_is_this_much_smaller(dtype: str, ratio: float) -> None:
    whole = payload_bytes(SEVEN_B, 16, "float32")
    assert whole == 161_480_704
    assert payload_bytes(SEVEN_B, 16, dtype) <= ratio * whole
    halves = payload_bytes(SEVEN_B, 16, dtype, "A") + payload_bytes(SEVEN_B, 16, dtype, "B")
    assert halves == payload_bytes(SEVEN_B, 16, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("factors", ["AB", "A", "B"])
def test_the_length_of_a_message_is_known_before_it_is_made(dtype: str, factors: str) -> None:
    start = adapter(rank=5)
    message = encode(
        moved(start), dtype=dtype, base_model="d" * 64, reference=start, factors=factors
    )
    expected = message_bytes(start.shapes(), 5, dtype, factors, alpha=start.alpha)
    assert len(message) == expected


def test_a_message_on_disk_is_the_message_in_memory(tmp_path: Path) -> None:
    start = adapter()
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        arguments = {"dtype": dtype, "base_model": "m", "reference": start}
        checksum = write_message(tmp_path / dtype, moved(start), **arguments)
        message = encode(moved(start), **arguments)
        assert (tmp_path / dtype).read_bytes() == message
        assert checksum == message[-32:].hex()
    poisoned = moved(start)
    poisoned.modules["layers.0.q_proj"].a_RI[0, 0] = math.inf
    with pytest.raises(WireError, match="q_proj.A holds NaN"):
        write_message(tmp_path / "bad", poisoned, dtype="float32", base_model="m")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["float32", "bfloat16", "int8", "int4"]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_rows_are_read_into_a_slab_and_nowhere_else(tmp_path: Path, dtype: str) -> None:
    start = adapter(rank=5)
    message = encode(moved(start), dtype=dtype, base_model="m", reference=start)
    update = open_update(store(tmp_path, message), reference=stored(tmp_path, start))
    whole = update.read("layers.1.down_proj")
    b_SO, a_SI = torch.full((9, 5), 7.0), torch.full((9, 9), 7.0)
    update.read_rows("layers.1.down_proj", b_SO[2:6], a_SI[2:6])
    assert torch.equal(b_SO[2:6], whole.b_OR.T[:4])
    assert torch.equal(a_SI[2:6], whole.a_RI[:4])
    for slab in (b_SO, a_SI):
        assert (slab[:2] == 7).all()
        assert (slab[6:] == 7).all()


@pytest.mark.parametrize("factors", ["AB", "A", "B"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_who_sends_hears_what_the_reader_will_have_bit_for_bit(
    tmp_path: Path, dtype: str, factors: str
) -> None:
    held = stored(tmp_path, adapter())
    trained, heard = moved(held.adapter()), {}
    message = encode(
        trained,
        dtype=dtype,
        base_model="m",
        reference=held,
        factors=factors,
        sent=lambda module, factor, _, sent_RC: heard.update({(module, factor): sent_RC.clone()}),
    )
    (tmp_path / "message").write_bytes(message)
    read = open_update(tmp_path / "message", reference=held)
    assert heard.keys() == {(module, factor) for module in read.modules for factor in factors}
    assert all(torch.equal(sent, read.rows(*name, read.rank)) for name, sent in heard.items())
    assert equal(trained, moved(held.adapter())), "what was trained stays as it was"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_numbers_kept_in_memory_are_those_on_disk(tmp_path: Path, dtype: str) -> None:
    held = stored(tmp_path, adapter())
    write_message(tmp_path / "sent", moved(adapter()), dtype=dtype, base_model="m", reference=held)
    read = open_update(tmp_path / "sent", reference=held)
    kept = open_update(tmp_path / "sent", reference=held, keeps=True)
    assert kept.sha256_of_content == read.sha256_of_content == content_digest(read, "m")
    copy = kept.adapter()
    assert equal(copy, read.adapter())
    for factors in copy.modules.values():
        factors.a_RI.zero_()
        factors.b_OR.zero_()
    assert equal(kept.adapter(), read.adapter()), "a copy is whoever's has it"
    write_known(tmp_path / "known", kept)
    write_message(tmp_path / "whole", read, dtype="float32", base_model="m")
    assert (tmp_path / "known").read_bytes() == (tmp_path / "whole").read_bytes()
    with whole_message(tmp_path / "by tensor", read, "m") as message:
        for module, factor in tensors_of(read):
            message.add(f"{module}.{factor}", read.rows(module, factor, read.rank))
    assert message.opened() == open_update(tmp_path / "by tensor")
    assert (tmp_path / "by tensor").read_bytes() == (tmp_path / "whole").read_bytes()
