"""A Flower grid whose sites answer with ready-made updates, so that only the server costs memory.

All replies come from one message on disk. Each is that message with its numbers moved by some
places, and a checksum that fits: different bytes, and rows that depend on no other site's, without
a site's memory or training in the server's process. A reply is made when it is pulled, one
at a time.
"""

import hashlib
import json
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.geometry import Geometry
from federation.header import DIGEST_BYTES

_PIECE = 1 << 20
_SHIFT_BYTES = 4 * 1009
"""1009 float32 numbers: no multiple of a rank, so no site's columns are another's."""


def write_base_model(directory: Path, geometry: Geometry) -> None:
    """Write a model directory as far as a server reads it: a header without weights."""
    directory.mkdir()
    (directory / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}\n')
    header, end = {}, 0
    for name, shape in geometry.shapes().items():
        begin, end = end, end + 2 * shape[0] * shape[1]
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)


class CannedGrid:
    """Flower's grid in this process: a reply waits for every message that was pushed."""

    def __init__(self, canned: Path, num_examples: Sequence[int]) -> None:
        """Answer for ``len(num_examples)`` sites with what ``canned`` holds.

        Args:
            canned: A float32 message.
            num_examples: Of each site.
        """
        from flwr.supercore.task_identity import TaskIdentity

        from federation.wire import open_update, payload_bytes

        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._canned = canned
        self._reply = canned.with_suffix(".reply")
        update = open_update(canned)
        payload = payload_bytes(update.shapes(), update.rank, update.dtype)
        self._start = update.num_bytes - payload - DIGEST_BYTES
        self._num_examples = dict(enumerate(num_examples, start=1))
        self._asked: dict[str, Any] = {}
        self.seconds_by_round: list[float] = []
        """That making the replies took; no server's time."""

    def get_node_ids(self) -> list[int]:
        """Return the sites."""
        return list(self._num_examples)

    def push_messages(self, messages: Sequence[Any]) -> list[str]:
        """Take the requests of a round and let go of what they hold, as if it were sent."""
        from flwr.app import Message, RecordDict

        self.seconds_by_round.append(0.0)
        names = []
        for message in messages:
            asked = message.metadata
            names.append(f"push-{len(self.seconds_by_round)}-{asked.dst_node_id}")
            empty = Message(
                RecordDict(),
                dst_node_id=asked.dst_node_id,
                message_type=asked.message_type,
                ttl=asked.ttl,
                group_id=asked.group_id,
            )
            empty.metadata.__dict__["_message_id"] = names[-1]  # as a SuperLink would
            self._asked[names[-1]] = empty
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
        """Return the replies to these messages."""
        asked = [self._asked.pop(name) for name in message_ids if name in self._asked]
        return [self._answer(message) for message in asked]

    def _answer(self, message: Any) -> Any:
        from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

        from federation.grid_sites import ADAPTER, RESULT, SITE

        started = time.perf_counter()
        site = message.metadata.dst_node_id
        # Another shift in every round: nobody trains to the same bits twice, and rows that a tail
        # of the round before already has would send the average its slow way.
        turn = site + len(self.seconds_by_round) * len(self._num_examples)
        num_bytes = write_reply(self._canned, self._start, turn * _SHIFT_BYTES, self._reply)
        # As Flower's grid would hold it: the bytes of numpy's file format, once.
        array = Array("uint8", (num_bytes,), "numpy.ndarray", self._reply.read_bytes())
        result = {"num-examples": self._num_examples[site], "train_loss": 2.0, "seconds": 0.0}
        records = RecordDict(
            {
                ADAPTER: ArrayRecord({ADAPTER: array}),
                RESULT: MetricRecord(result),
                SITE: ConfigRecord({"name": f"site {site}"}),
            }
        )
        self.seconds_by_round[-1] += time.perf_counter() - started
        return Message(records, reply_to=message)


def write_reply(canned: Path, start: int, shift: int, reply: Path) -> int:
    """Write a message with its numbers moved by ``shift`` bytes, as a numpy file.

    A piece is in memory at a time, so that no site adds to the server's peak.

    Args:
        canned: The message to start from.
        start: Where its numbers begin.
        shift: Less than the numbers' bytes; those that fall off the front come in at the back.
        reply: Where to write.

    Returns:
        The bytes of the message.
    """
    import numpy as np

    size = canned.stat().st_size
    end = size - DIGEST_BYTES
    digest = hashlib.sha256()
    with canned.open("rb") as source, reply.open("wb") as target:
        head = {"descr": "|u1", "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(target, head)
        for span in ((0, start), (start + shift, end), (start, start + shift)):
            for piece in _pieces(source, *span):
                digest.update(piece)
                target.write(piece)
        target.write(digest.digest())
    return size


def _pieces(source: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    source.seek(begin)
    while begin < end:
        piece = source.read(min(_PIECE, end - begin))
        begin += len(piece)
        yield piece
