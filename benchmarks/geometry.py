"""The shapes of a model's adapters, and adapters of those shapes for the benchmarks to work on.

Nothing here needs a model: the cost of averaging and of sending follows from the shapes alone. The
numbers are drawn as adapters look after some local steps: A near a shared start, B partly shared.

Shape letters: O out features, I in features, R rank.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from federation.adapter import Adapter

RANK, ALPHA = 16, 32.0
DRIFT = 0.3
"""How far a site's A is from the shared start, in units of the start. Ten steps of AdamW at 5e-4
move each number of A by up to 5e-3; in 7B geometry A starts uniform in +-1.7e-2."""


@dataclass(frozen=True)
class Geometry:
    """A Llama- or Qwen-family model as far as its seven projections go."""

    layers: int
    hidden: int
    keys: int
    """Out features of the key and value projections."""
    mlp: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out features, in features) by module, sorted by name as an `Adapter` is."""
        hidden, keys, mlp = self.hidden, self.keys, self.mlp
        block = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }
        names = ((f"model.layers.{n}.{part}", part) for n in range(self.layers) for part in block)
        return {name: block[part] for name, part in sorted(names)}

    def num_parameters(self, rank: int = RANK) -> int:
        """Return the numbers in an adapter on all modules."""
        return sum(rank * (out + inn) for out, inn in self.shapes().values())


GEOMETRIES = {
    "7b": Geometry(layers=28, hidden=3584, keys=512, mlp=18944),  # Qwen2.5-7B
    "smollm2": Geometry(layers=30, hidden=576, keys=192, mlp=1536),  # SmolLM2-135M
}


def site_adapter(
    geometry: Geometry,
    seed: int,
    *,
    drift: float = DRIFT,
    rank: int = RANK,
    modules: Collection[str] | None = None,
) -> Adapter:
    """Return the adapter of one site after some local steps; seed 0 is where all sites started.

    Args:
        geometry: Whose shapes.
        seed: Of the site's own part.
        drift: Size of the site's own part, as a share of what is common.
        rank: Of the adapter; its scale is that of ``ALPHA / RANK``.
        modules: Only these of the model's modules. None = all.
    """
    import torch

    from federation.adapter import Adapter, LowRank

    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    factors = {}
    for name, (out, inn) in geometry.shapes().items():
        if modules is not None and name not in modules:
            continue
        a_RI = torch.randn(rank, inn, generator=shared).mul_(inn**-0.5)
        b_OR = torch.randn(out, rank, generator=shared).mul_(0.02)
        if seed:
            a_RI.add_(torch.randn(rank, inn, generator=own), alpha=drift * inn**-0.5)
            b_OR.add_(torch.randn(out, rank, generator=own), alpha=0.02 * drift)
        factors[name] = LowRank(b_OR, a_RI)
    return Adapter(rank, ALPHA / RANK * rank, factors)


def write_updates(
    directory: Path,
    geometry: Geometry,
    sites: int,
    *,
    drift: float = DRIFT,
    modules: Collection[str] | None = None,
    first_seed: int = 1,
) -> None:
    """Write the float32 message of each site as a server spools it; one adapter is held at a time.

    Args:
        directory: Gets the files `0000`, `0001` and so on.
        geometry: Whose shapes.
        sites: Number of messages.
        drift: As in `site_adapter`.
        modules: Only these of the model's modules. None = all.
        first_seed: Of the first site's own part; the others' follow.
    """
    from federation.wire import encode

    directory.mkdir(parents=True, exist_ok=True)
    for site in range(sites):
        adapter = site_adapter(geometry, first_seed + site, drift=drift, modules=modules)
        message = encode(adapter, dtype="float32", base_model="benchmark")
        (directory / f"{site:04d}").write_bytes(message)


def num_examples(sites: int) -> list[int]:
    """Return the weight of each site in every benchmark."""
    return [100 + 50 * site for site in range(sites)]
