"""The LoRA adapter: the only file that knows peft's key names.

A module's update is `alpha / rank * B @ A`. Everything else in the project speaks of `LowRank`
factors by module name ("model.layers.0.self_attn.q_proj").

Shape letters: O out features, I in features, R rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation.atomic import new_directory, write_atomically
from federation.base_model import ModelError, weight_shapes

if TYPE_CHECKING:
    from torch import Tensor

TARGETS = {
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


@dataclass(frozen=True)
class LowRank:
    """The two factors of one module."""

    b_OR: Tensor
    a_RI: Tensor


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter over a base model."""

    rank: int
    alpha: float
    modules: Mapping[str, LowRank]
    """Factors by module name, sorted by name, float32."""

    @property
    def scale(self) -> float:
        """What `B @ A` is multiplied by."""
        return self.alpha / self.rank

    @property
    def target_modules(self) -> list[str]:
        """Last parts of the module names, as peft's configuration wants them."""
        return target_modules(self.modules)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out features, in features) by module."""
        return {n: (f.b_OR.shape[0], f.a_RI.shape[1]) for n, f in self.modules.items()}

    def rows(self, module: str, factor: str, num_rows: int) -> Tensor:
        """Return the first slices of one factor as contiguous float32 rows.

        Args:
            module: Its name.
            factor: "B" (the rows are those of B transposed, [num_rows, O]) or "A" ([num_rows, I]).
            num_rows: At most ``rank``.
        """
        factors = self.modules[module]
        rows = factors.b_OR.mT if factor == "B" else factors.a_RI
        return rows[:num_rows].float().contiguous()

    def first_slices(self, rank: int) -> Adapter:
        """Return the adapter of the first ``rank`` slices at the same scale, or all there are."""
        if rank >= self.rank:
            return self
        modules = {
            name: LowRank(factors.b_OR[:, :rank].contiguous(), factors.a_RI[:rank].contiguous())
            for name, factors in self.modules.items()
        }
        return Adapter(rank, self.scale * rank, modules)


def initial_adapter(
    base_model: Path, *, rank: int, alpha: float, targets: str, seed: int
) -> Adapter:
    """Lay out an adapter for a base model from its file headers: A random, B zero, so no change.

    A is drawn as peft draws it: uniform in +-1/sqrt(in features) (Kaiming with a = sqrt(5)). Each
    module has its own stream, so the values do not depend on the order of the files.

    Raises:
        ModelError: The model has none of the target projections.
    """
    import torch

    modules = {}
    for name, shape in sorted(weight_shapes(base_model).items()):
        module = name.removesuffix(".weight")
        if module == name or module.rsplit(".", 1)[-1] not in TARGETS[targets]:
            continue
        out_features, in_features = shape
        digest = hashlib.sha256(f"{seed}/{module}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        bound = 1 / math.sqrt(in_features)
        a_RI = (torch.rand(rank, in_features, generator=generator) * 2 - 1) * bound
        modules[module] = LowRank(torch.zeros(out_features, rank), a_RI)
    if not modules:
        raise ModelError(
            f"{base_model} has no projection named {', '.join(TARGETS[targets])}: "
            "expected a Llama- or Qwen-family model"
        )
    return Adapter(rank, alpha, modules)


def write_adapter(directory: Path, adapter: Adapter, base_model: str) -> None:
    """Write a new PEFT adapter directory: `PeftModel.from_pretrained` and llama.cpp load it.

    Args:
        directory: Must not exist, or be empty.
        adapter: What to write.
        base_model: Named in the configuration, for people; nothing loads from it.

    Raises:
        UserError: ``directory`` holds something already.
    """
    write_modules(
        directory,
        adapter.modules.items(),
        shapes=adapter.shapes(),
        rank=adapter.rank,
        alpha=adapter.alpha,
        base_model=base_model,
    )


def write_modules(
    directory: Path,
    modules: Iterable[tuple[str, LowRank]],
    *,
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    alpha: float,
    base_model: str,
) -> None:
    """Write an adapter directory while its modules are made: one of them is in memory.

    safetensors' own writer wants all tensors at once. Its format is a JSON header of names,
    shapes and offsets, and the numbers: https://github.com/huggingface/safetensors#format

    Args:
        directory: Must not exist, or be empty.
        modules: Names and factors, in the order of ``shapes``.
        shapes: Out features and in features of every module.
        rank: Of every module.
        alpha: LoRA alpha.
        base_model: As in `write_adapter`.

    Raises:
        UserError: ``directory`` holds something already.
    """
    import torch

    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": target_modules(shapes),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    with new_directory(directory) as building:
        with (building / "adapter_model.safetensors").open("wb") as file:
            file.write(_safetensors_header(shapes, rank))
            for expected, (name, factors) in zip(shapes, modules, strict=True):
                found = (len(factors.b_OR), factors.a_RI.shape[1], len(factors.a_RI))
                if name != expected or found != (*shapes[name], rank):
                    raise ValueError(f"{name} {found}: expected {expected} {shapes[expected]}")
                for factor in (factors.a_RI, factors.b_OR):
                    # Flat: of rank 1 a column is contiguous whatever its stride says.
                    flat = factor.to(torch.float32).contiguous().reshape(-1)
                    file.write(flat.view(torch.uint8).numpy().data)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_atomically(building / "adapter_config.json", text)


def _safetensors_header(shapes: Mapping[str, tuple[int, int]], rank: int) -> bytes:
    """Return the head of a file that holds A and B of every module, float32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (out_features, in_features) in shapes.items():
        for factor, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            end = offset + 4 * shape[0] * shape[1]
            header[f"base_model.model.{name}.lora_{factor}.weight"] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": (offset, end),
            }
            offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def target_modules(names: Iterable[str]) -> list[str]:
    """Return the last parts of module names, as peft's configuration wants them."""
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def read_adapter(directory: Path) -> Adapter:
    """Read a PEFT LoRA adapter directory.

    Raises:
        ModelError: It is missing or damaged, or no plain LoRA adapter.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_path = directory / "adapter_config.json"
    weights_path = directory / "adapter_model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ModelError(f"{path} is missing: expected a PEFT adapter directory")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        tensors = load_file(weights_path)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ModelError(f"{directory} is damaged ({error}): write the adapter again") from None
    _refuse_other_kinds(directory, config)
    return Adapter(int(config["r"]), float(config["lora_alpha"]), _pair(directory, tensors))


def _refuse_other_kinds(directory: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{directory}: peft_type is {config.get('peft_type')!r}: expected a LORA adapter"
        )
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(key):
            raise ModelError(
                f"{directory}: {key} is set, which this project cannot average or merge: "
                "expected plain LoRA"
            )


def _pair(directory: Path, tensors: dict[str, Tensor]) -> dict[str, LowRank]:
    modules = {}
    for key in sorted(tensors):
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            partner = tensors.get(key.replace(".lora_A.", ".lora_B."))
            if partner is None:
                raise ModelError(f"{directory}: {name} has a lora_A and no lora_B")
            modules[name] = LowRank(partner.float(), tensors[key].float())
    if 2 * len(modules) != len(tensors):
        raise ModelError(
            f"{directory} holds tensors that are not LoRA factors: expected plain LoRA"
        )
    return modules


def write_into_model(model: Any, adapter: Adapter) -> None:
    """Copy an adapter's factors into a peft model that has the same modules and rank.

    Raises:
        ModelError: The modules or the shapes differ; both are named.
    """
    import torch

    places = _places(model)
    if missing := places.keys() ^ adapter.modules.keys():
        raise ModelError(
            f"the adapter does not fit the model: {len(missing)} modules are only on one side, "
            f"for example {min(missing)}"
        )
    with torch.no_grad():
        for name, factors in adapter.modules.items():
            b, a = places[name]
            if b.shape != factors.b_OR.shape or a.shape != factors.a_RI.shape:
                raise ModelError(
                    f"{name}: the adapter has B {tuple(factors.b_OR.shape)} and A "
                    f"{tuple(factors.a_RI.shape)}, the model expects B {tuple(b.shape)} and A "
                    f"{tuple(a.shape)}: it was made for another base model"
                )
            b.data = factors.b_OR.to(b.device, torch.float32, copy=True)
            a.data = factors.a_RI.to(a.device, torch.float32, copy=True)


def train_only(model: Any, factors: str) -> None:
    """Let the named factors ("AB", "A" or "B") of a peft model learn and freeze the others."""
    for b, a in _places(model).values():
        for factor, parameter in (("B", b), ("A", a)):
            parameter.requires_grad_(factor in factors)
            parameter.grad = None  # one left of an earlier round would count in the clipping


def read_from_model(model: Any, *, rank: int, alpha: float) -> Adapter:
    """Return a copy of the factors of a peft model, on the CPU in float32."""
    modules = {
        name: LowRank(b.detach().float().cpu().clone(), a.detach().float().cpu().clone())
        for name, (b, a) in sorted(_places(model).items())
    }
    return Adapter(rank, alpha, modules)


def _places(model: Any) -> dict[str, tuple[Any, Any]]:
    """Return the (B, A) parameters of a peft model by module name."""
    parameters = dict(model.named_parameters())
    found = {}
    for key, a in parameters.items():
        if key.endswith(".lora_A.default.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            found[name] = (parameters[key.replace(".lora_A.", ".lora_B.")], a)
    return found
