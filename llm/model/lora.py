"""LoRA: train a low-rank adapter beside each frozen linear layer, W x + alpha / rank * B A x.

A matrix of rank r has r (I + O) weights instead of I O, and only these have gradients and optimizer
state. Merged into W at the end, it costs nothing in use.

Source: "LoRA" (arXiv 2106.09685), section 4; scale, dropout and initialization as in PEFT.

    I  inputs of a layer    O  outputs    r  rank
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llm.artifact import ArtifactWriter, file_sha256
from llm.config import LoraConfig, read_section
from llm.consistency import lora_problems
from llm.errors import ArtifactError, ConfigError
from llm.model.kernels.linear import Linear, linear
from llm.model.transformer import Transformer
from llm.model.weights import WEIGHTS, check_tensors, read_tensors, write_tensors

ADAPTER_JSON, ADAPTER_WEIGHTS = "adapter.json", "adapter.safetensors"


class Adapter(nn.Module):
    """The output alpha / r * B A x that is added to a linear layer's."""

    def __init__(self, layer: Linear, lora: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = lora.alpha / lora.rank  # so that another rank needs no other learning rate
        # on the inputs of A only: the frozen path stays exact
        self.dropout = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()
        self.a = nn.Parameter(torch.empty(lora.rank, layer.in_features))  # (r, I)
        self.b = nn.Parameter(torch.zeros(layer.out_features, lora.rank))  # (O, r)
        # B = 0: the adapted model starts as its base. A is not, or both gradients would be zero.
        # sqrt(5): uniform within 1 / sqrt(I), as nn.Linear has it
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output: (..., I) -> (..., O)."""
        low = linear(self.dropout(x), self.a, None)  # (..., I) -> (..., r)
        return linear(low * self.scale, self.b, None)  # scaled where it is small: -> (..., O)

    def product(self) -> Tensor:
        """Return alpha / r * B A, which merging adds to the weight (O, I)."""
        return (self.b * self.scale) @ self.a


def add_adapters(model: Transformer, lora: LoraConfig, seed: int, prefix: str) -> None:
    """Freeze the model and add an adapter to each target layer of its blocks.

    Embedding, head, norms and biases are frozen too, as in the paper and in PEFT.

    Raises:
        ConfigError: a target that the model does not have, under the dotted name `prefix`.
    """
    if problems := lora_problems(model.config, lora, prefix):
        raise ConfigError("; ".join(problems))
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in _linear_layers(model):
        if name.rpartition(".")[2] in lora.targets:
            layer.adapter = Adapter(layer, lora, generator)  # its weights do have gradients


def merge_adapters(model: Transformer) -> None:
    """Add every adapter to the weight beside it, remove it, and unfreeze the model."""
    with torch.no_grad():
        for _, layer in _linear_layers(model):
            layer.weight.copy_(layer.merged_weight())
            layer.adapter = None
    model.requires_grad_(True)


def adapters_of(model: Transformer) -> dict[str, Adapter]:
    """Return the adapters by the name of their layer, as `blocks.0.attention.query`."""
    return {
        name: layer.adapter
        for name, layer in _linear_layers(model)
        if isinstance(layer.adapter, Adapter)
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterInfo:
    """The content of adapter.json."""

    lora: LoraConfig
    base_sha256: str
    """Of the weights' file of the model it was trained beside; beside others it means nothing."""


def save_adapter(writer: ArtifactWriter, model: Transformer, lora: LoraConfig, base: Path) -> None:
    """Write adapter.json and adapter.safetensors of a model that started as the one in `base`."""
    info = AdapterInfo(lora=lora, base_sha256=file_sha256(base / WEIGHTS))
    writer.write_json(ADAPTER_JSON, asdict(info))
    with writer.open(ADAPTER_WEIGHTS) as file:
        write_tensors(file, _weights_of_adapters(model))


def read_adapter_info(folder: Path) -> AdapterInfo:
    """Read adapter.json.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    path = folder / ADAPTER_JSON
    try:
        return read_section(AdapterInfo, json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path}: not found; expected a model that was trained with lora.rank above 0"
        ) from error
    except (OSError, ValueError, TypeError, RecursionError, ConfigError) as error:
        raise ArtifactError(f"{path}: not an adapter of this version ({error})") from error


def load_adapter(folder: Path, model: Transformer) -> None:
    """Add the adapter in `folder` to a model of its base's shape.

    Raises:
        ArtifactError: a file is missing or damaged, or the adapter belongs to another shape.
    """
    path = folder / ADAPTER_WEIGHTS
    try:
        add_adapters(model, read_adapter_info(folder).lora, 0, "lora")
    except ConfigError as error:
        raise ArtifactError(f"{folder / ADAPTER_JSON}: does not fit the model: {error}") from error
    tensors, weights = read_tensors(path), _weights_of_adapters(model)
    check_tensors(tensors, {name: weight.shape for name, weight in weights.items()}, path)
    for name, weight in weights.items():
        weight.copy_(tensors[name])


def _weights_of_adapters(model: Transformer) -> dict[str, Tensor]:
    return {
        f"{layer}.{name}": weight.detach()
        for layer, adapter in adapters_of(model).items()
        for name, weight in adapter.named_parameters()
    }


def _linear_layers(model: Transformer) -> list[tuple[str, Linear]]:
    """Return the linear layers of the blocks with their names; the head is none of them."""
    return [
        (f"blocks.{name}", layer)
        for name, layer in model.blocks.named_modules()
        if isinstance(layer, Linear)
    ]
