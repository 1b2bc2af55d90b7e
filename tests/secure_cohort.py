"""A cohort in memory: real sites, a real server, and faults as one-liners.

Cohort(4).sum()                                    all answer
Cohort(4).sum({"s1": Stage.MASK})                  s1 is silent from that stage on
Cohort(4).sum(spoil={("s1", Stage.SHARE): flip})   what arrives from s1 is changed
"""

from collections.abc import Callable, Collection, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import secure_sum as site_half
from client.secure_sum import Held, Membership
from federation.masking import pack
from federation.secure_messages import Stage, Terms
from federation.secure_sum import SecureSum

STAGES = list(Stage)
BITS = 8
HALF = 127
LENGTH = 37
IDENTITIES = [Ed25519PrivateKey.from_private_bytes(bytes([n + 1]) * 32) for n in range(64)]
Spoil = Callable[[bytes], bytes]


def public(identity: Ed25519PrivateKey) -> str:
    return identity.public_key().public_bytes_raw().hex()


def terms_of(cohort: int, threshold: int, **changes: object) -> Terms:
    """Return terms under which a whole number up to HALF is its own level, so rounds to itself."""
    values: dict[str, object] = {
        "run": "beef",
        "server_round": 1,
        "subject": "5" * 64,
        "cohort": cohort,
        "threshold": threshold,
        "num_coordinates": LENGTH,
        "clip": float(HALF),
        "bits": BITS,
    }
    return Terms(**(values | changes))


class Site:
    """One site in memory."""

    def __init__(self, place: int, cohort: int, threshold: int) -> None:
        identities = frozenset(public(identity) for identity in IDENTITIES[:cohort])
        self.member = Membership(IDENTITIES[place], threshold, identities)
        self.values = np.random.default_rng(place).integers(-HALF, HALF + 1, LENGTH)
        self.num_examples = 1
        self.held: Held | None = None

    def answer(self, stage: Stage, request: bytes, terms: Terms) -> bytes:
        if stage == Stage.ADVERTISE:
            self.held = site_half.advertise(terms, self.member)
        elif stage == Stage.MASK:
            return self.masked(request)
        elif not site_half.is_repeated(self.held, stage, request):
            self.held = site_half.ANSWERS[stage](self.held, request, self.member)
        return self.held.answers[stage].encode()

    def masked(self, request: bytes) -> bytes:
        halves = np.split(self.values.astype(np.float32), [LENGTH // 3])
        rng = np.random.default_rng(0)
        vector = site_half.mask(self.held, request, self.member, halves, self.num_examples, rng)
        pieces = list(vector.pieces)
        self.held = site_half.masked(self.held, request, sum(count for _, count in pieces))
        return vector.head + b"".join(piece for piece, _ in pieces)


class Cohort:
    """Sites and their server, in one attempt."""

    def __init__(self, cohort: int, threshold: int, **changes: object) -> None:
        self.terms = terms_of(cohort, threshold, **changes)
        self.sites = {f"s{n}": Site(n, cohort, threshold) for n in range(cohort)}
        self.server = SecureSum(self.terms, list(self.sites))
        self.arrived: dict[Stage, dict[str, bytes]] = {stage: {} for stage in Stage}
        """What the server saw."""

    def run_stage(
        self,
        silent: Mapping[str, Stage] | None = None,
        spoil: Mapping[tuple[str, Stage], Spoil] | None = None,
    ) -> None:
        """Ask every site that is waited for; the stage stays open."""
        stage, request = self.server.stage, self.server.request()
        for name in sorted(self.server.waiting):
            gone = (silent or {}).get(name)
            if gone is not None and STAGES.index(gone) <= STAGES.index(stage):
                continue
            reply = self.sites[name].answer(stage, request, self.terms)
            reply = (spoil or {}).get((name, stage), bytes)(reply)
            self.arrived[stage][name] = reply
            self.server.take(name, reply)

    def places(self) -> dict[str, int]:
        """Return where in the roster each site stands, if all advertise."""
        order = sorted(self.sites, key=lambda name: public(self.sites[name].member.identity))
        return {name: place for place, name in enumerate(order)}

    def until(self, last: Stage) -> bytes:
        """Run and close the stages before ``last``; return its request."""
        while self.server.stage != last:
            self.run_stage()
            self.server.close()
        return self.server.request()

    def sum(self, silent: Mapping[str, Stage] | None = None, **faults: object) -> bytes:
        """Run every stage; return the sum of the sites' numbers, packed as it lies in the ring."""
        while self.server.stage is not None:
            self.run_stage(silent, **faults)
            self.server.close()
        return pack(self.server.result.elements_N[:LENGTH], self.terms.ring_bits)

    def plain_sum(self, names: Collection[str]) -> bytes:
        """Return the same of some sites in plain Python integers."""
        columns = zip(*(self.sites[name].values.tolist() for name in names), strict=True)
        bits = self.terms.ring_bits
        return b"".join((sum(c) % 2**bits).to_bytes(bits // 8, "little") for c in columns)
