"""A model on disk: `model.safetensors`, `model.json` and its tokenizer, written and read here.

The safetensors layout (8 bytes of header length, a JSON header, the bytes of every tensor) is
written here tensor by tensor, so that a model is hashed on its way out and never stands in memory
twice; it is read by the library. Source: https://github.com/huggingface/safetensors#format.
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
HEADER_ALIGNMENT_BYTES = 8
MAX_SEQ_LEN = 1 << 22  # of a model that is loaded: rotary positions take memory for each
TYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}


def save_model(
    writer: ArtifactWriter, model: Transformer, tokenizer_files: Mapping[str, bytes]
) -> None:
    """Write a model folder: weights, shape and tokenizer, all that is needed to use it."""
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
        ArtifactError: a file is missing or damaged, or a tensor does not have the shape it should.
    """
    path = folder / MODEL
    try:
        data = json.loads(path.read_bytes())
        config = read_section(ModelConfig, data["model"])
        vocab_size, seq_len = int(data["vocab_size"]), int(data["seq_len"])
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path}: not there; expected the folder of a model, as `fromscratch run` leaves in"
            " artifacts/pretrain/ and artifacts/finetune/"
        ) from error
    except (
        OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, ConfigError
    ) as error:  # fmt: skip
        raise ArtifactError(
            f"{path}: no model description of this version ({type(error).__name__}: {error});"
            " train the model again"
        ) from error
    tensors = read_tensors(folder / WEIGHTS)
    outline = make_outline(config, vocab_size, seq_len, len(tensors), path)
    needed = {name: weight.shape for name, weight in weights_of(outline).items()}
    check_tensors(tensors, needed, folder / WEIGHTS)
    model = Transformer(config, vocab_size, seq_len)
    set_weights(model, tensors, folder / WEIGHTS)
    return model.to(device)


def make_outline(
    config: ModelConfig, vocab_size: int, seq_len: int, num_tensors: int, source: Path
) -> Transformer:
    """Make a model without memory for its weights, to compare with `num_tensors` that are stored.

    Raises:
        ArtifactError: what `source` says goes together with no weights, or not with so few.
    """
    if config.num_layers > num_tensors or not 0 < seq_len <= MAX_SEQ_LEN or vocab_size < 1:
        raise ArtifactError(
            f"{source}: found {config.num_layers} layers, a vocabulary of {vocab_size} and a"
            f" context of {seq_len} beside {num_tensors} tensors; expected a tensor a layer at"
            f" least, a vocabulary, and a context up to {MAX_SEQ_LEN}"
        )
    try:
        with torch.device("meta"):
            return Transformer(config, vocab_size, seq_len)
    except (ConfigError, RuntimeError) as error:  # torch's: a size beyond 2^63
        raise ArtifactError(f"{source}: no shape of a model: {error}") from error


def weights_of(model: Transformer) -> dict[str, Tensor]:
    """Return the weights by name as they are stored: tied ones once, without the vocabulary's
    padding.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name in _padded_names(model):
        weights[name] = weights[name][: model.vocab_size]
    return weights


def set_weights(model: Transformer, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy `tensors` into `model`.

    Raises:
        ArtifactError: a tensor is missing, unknown or of another shape; all of them are named.
    """
    weights = weights_of(model)
    check_tensors(tensors, {name: weight.shape for name, weight in weights.items()}, source)
    with torch.no_grad():
        for parameter in (dict(model.named_parameters())[name] for name in _padded_names(model)):
            parameter[model.vocab_size :] = 0.0
        for name, weight in weights.items():
            weight.copy_(tensors[name])


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: Path
) -> None:
    """Compare names and shapes.

    Raises:
        ArtifactError: with every difference, found and expected.
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
    """Write tensors in the safetensors layout, sorted by name, one after another.

    Each is asked for twice, for its size and for its bytes, and never held beside another.
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
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in sorted(tensors):
        whole = tensors[name].detach().cpu().contiguous().reshape(-1)
        file.write(whole.view(torch.uint8).numpy().data)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file into memory.

    Raises:
        ArtifactError: the file is missing or is none.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: no readable safetensors file ({error})") from error


def _padded_names(model: Transformer) -> list[str]:
    """Return the parameters whose first axis is the padded vocabulary."""
    names = ("embedding.weight", "head.weight")
    return [name for name, _ in model.named_parameters() if name in names]
