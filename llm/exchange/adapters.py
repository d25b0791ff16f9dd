"""LoRA adapters outside of training: export for PEFT, and merging into their base.

PEFT's layout is adapter_config.json and adapter_model.safetensors, whose tensors are named after
the layers of the exported base. GPT-2 has query, key and value in one layer, so their adapters
become one there, of the sum of their ranks.

Source: PEFT, tuners/lora/config.py and utils/save_and_load.py, version 0.21.

    I  inputs of a layer    O  outputs of one of our layers    r  rank
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llm.artifact import file_sha256
from llm.config import LoraConfig
from llm.errors import ArtifactError
from llm.exchange.folders import CARD, load_both, new_folder
from llm.exchange.hf_config import Shape
from llm.exchange.huggingface import writable_dtype
from llm.exchange.layouts import Layout, expressible_shape, layout_for
from llm.model.lora import (
    ADAPTER_JSON,
    Adapter,
    AdapterInfo,
    adapters_of,
    load_adapter,
    merge_adapters,
    read_adapter_info,
)
from llm.model.weights import WEIGHTS, load_model, save_model, write_tensors

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_adapter(source: Path, target: Path, *, dtype: str = "float32") -> None:
    """Write the adapter in `source` as a folder that `peft.PeftModel.from_pretrained` loads.

    It fits the base model as `export_model` writes it.

    Raises:
        ArtifactError: `source` has no adapter, or a file of it is damaged.
        ConfigError: no layout can express the model, or `target` exists.
    """
    dtype_written, info = writable_dtype(dtype), read_adapter_info(source)
    model = load_model(source)
    load_adapter(source, model)
    shape = Shape(model.config, model.vocab_size, model.seq_len)
    layout = layout_for(expressible_shape(shape))
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, (a, b) in _in_layout(layout, adapters_of(model)).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype_written)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(dtype_written)
        ranks[re.split(r"\.\d+\.", name)[-1]] = len(a)  # by the name within a block
    with new_folder(target) as writer:
        writer.write_json(PEFT_CONFIG, _peft_config(layout, info.lora, ranks))
        with writer.open(PEFT_WEIGHTS) as file:
            write_tensors(file, tensors, metadata={"format": "pt"})
        writer.write_bytes(CARD, _card(info).encode())


def merge_adapter(base: Path, adapter: Path, target: Path) -> None:
    """Write the model in `base` with the adapter in `adapter` merged into its weights.

    Raises:
        ArtifactError: a file is missing or damaged, or the adapter belongs to another base.
        ConfigError: `target` exists.
    """
    model, tokenizer = load_both(base)
    expected, found = read_adapter_info(adapter).base_sha256, file_sha256(base / WEIGHTS)
    if found != expected:
        raise ArtifactError(
            f"{adapter / ADAPTER_JSON}: the adapter of another base: {base / WEIGHTS} has the"
            f" sha256 {found}, expected {expected}; name the model that its training started from"
        )
    load_adapter(adapter, model)
    merge_adapters(model)
    with new_folder(target) as writer:
        save_model(writer, model, tokenizer.to_files())


def _in_layout(layout: Layout, adapters: Mapping[str, Adapter]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B by the layout's name of their layer."""
    parts: dict[str, list[tuple[int, int, Adapter]]] = {}
    for ours, adapter in adapters.items():
        theirs, part, num_parts = layout.locate(f"{ours}.weight")
        parts.setdefault(theirs.removesuffix(".weight"), []).append((part, num_parts, adapter))
    return {theirs: _joined(found) for theirs, found in parts.items()}


def _joined(parts: Sequence[tuple[int, int, Adapter]]) -> tuple[Tensor, Tensor]:
    """Return A and B of a layer that joins some of ours: (index, number of parts, adapter) each.

    The rows of all A are one A (sum of r, I). Each B (O, r) fills its rows and columns of one B
    (parts x O, sum of r), so an output depends on the inputs' product with its own A alone.
    """
    a = torch.cat([adapter.a.detach() for _, _, adapter in parts])
    num_outputs, rank = parts[0][2].b.shape
    b = a.new_zeros(parts[0][1] * num_outputs, len(a))
    for number, (part, _, adapter) in enumerate(parts):
        rows = slice(part * num_outputs, (part + 1) * num_outputs)
        b[rows, number * rank : (number + 1) * rank] = adapter.b.detach()
    return a, b


def _peft_config(layout: Layout, lora: LoraConfig, ranks: Mapping[str, int]) -> dict[str, object]:
    others = {name: rank for name, rank in ranks.items() if rank != lora.rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # a folder on the machine that exports it
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(ranks),
        # the scale alpha / rank stays that of the parts
        "rank_pattern": others,
        "alpha_pattern": {name: lora.alpha * rank / lora.rank for name, rank in others.items()},
        "bias": "none",
        "fan_in_fan_out": layout.is_transposed,  # GPT-2's Conv1D
        "inference_mode": True,
    }


def _card(info: AdapterInfo) -> str:
    return f"""\
# A LoRA adapter made with fromscratch

Rank {info.lora.rank}, alpha {info.lora.alpha:g}. It belongs to one base model: the one whose
`model.safetensors` in fromscratch has the sha256 `{info.base_sha256}`. Export that model with
`fromscratch export MODEL --to base`; then

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), ".")
```
"""
