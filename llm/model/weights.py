"""A model folder on disk: `model.safetensors`, `model.json` and the tokenizer's files.

Source: https://github.com/huggingface/safetensors#format (8 bytes of header length, a JSON header,
the bytes of every tensor).
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llm.artifact import ArtifactWriter
from llm.config import ModelConfig, read_section
from llm.errors import ArtifactError, ConfigError
from llm.model.transformer import Transformer

MODEL, WEIGHTS = "model.json", "model.safetensors"
HEADER_ALIGNMENT_BYTES = 8  # as the safetensors library pads its header
# of a model that is loaded: rotary tables take memory per position, and a hostile file sets it
MAX_SEQ_LEN = 1 << 22
# names of the format; the dtypes that are written
TYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}


def save_model(
    writer: ArtifactWriter, model: Transformer, tokenizer_files: Mapping[str, bytes]
) -> None:
    """Write a model folder: weights, config and tokenizer."""
    writer.write_json(
        MODEL,
        {
            "model": asdict(model.config),
            "vocab_size": model.vocab_size,
            "seq_len": model.seq_len,
        },
    )
    with writer.open(WEIGHTS) as file:
        write_tensors(file, weights_of(model))
    for name, data in tokenizer_files.items():
        writer.write_bytes(name, data)


def load_model(folder: Path, device: torch.device | str = "cpu") -> Transformer:
    """Read the model in `folder`.

    Raises:
        ArtifactError: a file is missing or damaged, or a tensor has another shape than the config.
    """
    path = folder / MODEL
    try:
        data = json.loads(path.read_bytes())
        config = read_section(ModelConfig, data["model"])
        vocab_size, seq_len = int(data["vocab_size"]), int(data["seq_len"])
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path}: not found; expected a model folder, as `fromscratch run` writes to"
            " artifacts/pretrain/ and artifacts/finetune/"
        ) from error
    # OverflowError: int(1e999), RecursionError: JSON nested thousands deep
    except (
        OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, ConfigError
    ) as error:  # fmt: skip
        raise ArtifactError(
            f"{path}: not a model config of this version ({type(error).__name__}: {error});"
            " train the model again"
        ) from error
    tensors = read_tensors(folder / WEIGHTS)
    # compared before any weight is allocated: model.json may claim any size
    outline = make_outline(config, vocab_size, seq_len, len(tensors), path)
    needed = {name: weight.shape for name, weight in weights_of(outline).items()}
    check_tensors(tensors, needed, folder / WEIGHTS)
    model = Transformer(config, vocab_size, seq_len)
    set_weights(model, tensors, folder / WEIGHTS)
    return model.to(device)


def make_outline(
    config: ModelConfig, vocab_size: int, seq_len: int, num_tensors: int, source: Path
) -> Transformer:
    """Build a model on the meta device, without memory, to compare with the stored tensors.

    Raises:
        ArtifactError: `source` describes no model, or one with more layers than `num_tensors`.
    """
    if config.num_layers > num_tensors or not 0 < seq_len <= MAX_SEQ_LEN or vocab_size < 1:
        raise ArtifactError(
            f"{source}: found {config.num_layers} layers, a vocabulary of {vocab_size} and a"
            f" context of {seq_len} beside {num_tensors} tensors; expected at least a tensor"
            f" per layer, a vocabulary, and a context up to {MAX_SEQ_LEN}"
        )
    try:
        with torch.device("meta"):
            return Transformer(config, vocab_size, seq_len)
    except (ConfigError, RuntimeError) as error:  # torch's: a size beyond 2^63
        raise ArtifactError(f"{source}: not a valid model config: {error}") from error


def weights_of(model: Transformer) -> dict[str, Tensor]:
    """Return the weights by name as stored: tied ones once, without padding of the vocabulary."""
    # named_parameters lists a tied parameter once, under its first name: embedding.weight
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name in _padded_names(model):
        weights[name] = weights[name][: model.vocab_size]
    return weights


def trained_weights_of(model: Transformer) -> dict[str, Tensor]:
    """Return the weights that are not frozen, by name as stored: with an adapter, its own alone."""
    parameters = dict(model.named_parameters())
    weights = weights_of(model).items()
    return {name: weight for name, weight in weights if parameters[name].requires_grad}


def set_weights(model: Transformer, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy `tensors` into the weights of `model` that are not frozen.

    Raises:
        ArtifactError: naming every tensor that is missing, unknown or of another shape.
    """
    weights = trained_weights_of(model)
    check_tensors(tensors, {name: weight.shape for name, weight in weights.items()}, source)
    with torch.no_grad():
        for parameter in (dict(model.named_parameters())[name] for name in _padded_names(model)):
            # the file has no padding; zero, as `Transformer.initialize` leaves it
            parameter[model.vocab_size :] = 0.0
        for name, weight in weights.items():
            weight.copy_(tensors[name])


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: Path
) -> None:
    """Compare names and shapes.

    Raises:
        ArtifactError: listing every difference.
    """
    problems = [f"{name}: missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name}: unknown" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name}: found shape {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise ArtifactError(
            f"{source}: does not fit the model\n"
            + "\n".join(f"  {line}" for line in sorted(problems))
        )


def write_tensors(
    file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors in the safetensors format, sorted by name.

    One at a time: `tensors` may load each on access, and the model is never in memory twice.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        header[name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # spaces, which JSON ignores
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in sorted(tensors):  # a second access: the header needs all sizes first
        whole = tensors[name].detach().cpu().contiguous().reshape(-1)
        # as bytes: numpy has no bfloat16
        file.write(whole.view(torch.uint8).numpy().data)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file into memory.

    Raises:
        ArtifactError: the file is missing or not in that format.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: no readable safetensors file ({error})") from error


def _padded_names(model: Transformer) -> list[str]:
    """Return the parameters whose first axis is the padded vocabulary."""
    names = ("embedding.weight", "head.weight")
    return [name for name, _ in model.named_parameters() if name in names]
