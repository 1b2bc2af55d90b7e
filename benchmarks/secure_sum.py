"""What a secure sum costs a site and the server: CPU seconds and bytes.

    python -m benchmarks.secure_sum --geometry 7b --cohorts 4 8

runs every stage of federation.secure_sum in memory, on one thread, for an adapter of the geometry,
both factors, and prints one JSON line. For each cohort, with its number behind the name:

- site_cpu_s: one site, all stages: keys, shares, rounding, masks, packing.
- server_cpu_s: all the server does, when every site answers: adding, and one mask a site to undo.
- server_dropout_cpu_s: the same when one site drops out after it shared: its masks are undone too.
- site_bytes: what a site sends in all stages together.

Beside them what a plain update of these shapes takes: float32_bytes and int8_bytes. An alternating
run sends one factor of two a round, in a secure sum or not. CPU seconds are the least of the
repeats.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from benchmarks.geometry import GEOMETRIES, RANK, Geometry
from client import secure_sum as site_half
from client.secure_sum import Held, Membership
from federation.header import payload_bytes
from federation.secure_messages import Stage, Terms
from federation.secure_sum import SecureSum
from federation.settings import default_threshold

CLIP = 4e-3
"""Eight steps of AdamW at 5e-4."""
SITE = "0"
"""The site whose seconds count."""


@dataclass
class Costs:
    """Of one attempt."""

    site_cpu_s: float = 0.0
    server_cpu_s: float = 0.0
    site_bytes: int = 0


def pieces(geometry: Geometry) -> Iterator[NDArray[np.float32]]:
    """Yield the change of an adapter, a module at a time."""
    rng = np.random.default_rng(0)
    drawn = {
        size: rng.normal(0, CLIP / 3, size).astype(np.float32)
        for size in {RANK * (out + inn) for out, inn in geometry.shapes().values()}
    }
    for out, inn in geometry.shapes().values():
        yield drawn[RANK * (out + inn)]


class Site:
    """One site in memory."""

    def __init__(self, geometry: Geometry, threshold: int) -> None:
        self._geometry = geometry
        self._member = Membership(Ed25519PrivateKey.generate(), threshold)
        self._held: Held | None = None

    def answer(self, stage: Stage, request: bytes, terms: Terms) -> bytes:
        """Answer a stage as a site does, but for the disk."""
        if stage == Stage.ADVERTISE or self._held is None:
            self._held = site_half.advertise(terms, self._member)
        elif stage == Stage.MASK:
            values, rng = pieces(self._geometry), np.random.default_rng(0)
            vector = site_half.mask(self._held, request, self._member, values, 100, rng)
            packed = list(vector.pieces)
            self._held = site_half.masked(self._held, request, sum(count for _, count in packed))
            return vector.head + b"".join(piece for piece, _ in packed)
        else:
            self._held = site_half.ANSWERS[stage](self._held, request, self._member)
        return self._held.answers[stage].encode()


def attempt(geometry: Geometry, cohort: int, *, drops_out: bool) -> Costs:
    """Run one attempt; return what the first site and the server spent."""
    threshold = min(default_threshold(cohort), cohort - 1)
    terms = Terms(
        run="beef",
        server_round=1,
        subject="0" * 64,
        cohort=cohort,
        threshold=threshold,
        num_coordinates=geometry.num_parameters(),
        clip=CLIP,
        max_examples=1000,
    )
    sites = {str(n): Site(geometry, threshold) for n in range(cohort)}
    server, costs = SecureSum(terms, list(sites)), Costs()
    while (stage := server.stage) is not None:
        request = server.request()
        for name in sorted(server.waiting):
            if drops_out and stage == Stage.MASK and name == str(cohort - 1):
                continue
            started = time.process_time()
            reply = sites[name].answer(stage, request, terms)
            answered = time.process_time()
            server.take(name, reply)
            costs.server_cpu_s += time.process_time() - answered
            if name == SITE:
                costs.site_cpu_s += answered - started
                costs.site_bytes += len(reply)
        started = time.process_time()
        server.close()
        costs.server_cpu_s += time.process_time() - started
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="7b")
    parser.add_argument("--cohorts", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    geometry = GEOMETRIES[arguments.geometry]
    figures: dict[str, object] = {
        "benchmark": "secure_sum",
        "geometry": arguments.geometry,
        "num_coordinates": geometry.num_parameters(),
        "float32_bytes": payload_bytes(geometry.shapes(), RANK, "float32"),
        "int8_bytes": payload_bytes(geometry.shapes(), RANK, "int8"),
    }
    for cohort in arguments.cohorts:
        runs = range(arguments.repeats)
        whole = [attempt(geometry, cohort, drops_out=False) for _ in runs]
        dropped = [attempt(geometry, cohort, drops_out=True) for _ in runs]
        figures |= {
            f"site_cpu_s_{cohort}": round(min(c.site_cpu_s for c in whole), 3),
            f"server_cpu_s_{cohort}": round(min(c.server_cpu_s for c in whole), 3),
            f"server_dropout_cpu_s_{cohort}": round(min(c.server_cpu_s for c in dropped), 3),
            f"site_bytes_{cohort}": whole[0].site_bytes,
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
