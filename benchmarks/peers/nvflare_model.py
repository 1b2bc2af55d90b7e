"""The adapter as NVFlare's server wants it: a torch module with the same tensors as ours."""

import torch

from benchmarks.geometry import GEOMETRIES, RANK


class Payload(torch.nn.Module):
    """The factors of every module of a geometry, as parameters."""

    def __init__(self, geometry: str) -> None:
        """Draw the factors."""
        super().__init__()
        for name, (out, inn) in GEOMETRIES[geometry].shapes().items():
            for letter, shape in (("A", (RANK, inn)), ("B", (out, RANK))):
                key = f"{name}_{letter}".replace(".", "_")
                self.register_parameter(key, torch.nn.Parameter(torch.randn(shape) * 0.01))
