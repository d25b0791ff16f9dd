"""Read and write models in the Hugging Face layouts: `config.json` and safetensors.

Weights pass one tensor at a time, so memory holds the model and one tensor more. Weights in fp32,
bf16 or fp16 are read as fp32. Pickled weights are refused: they can run code.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm.artifact import ArtifactWriter
from llm.errors import ArtifactError, ConfigError
from llm.exchange.hf_config import Shape
from llm.exchange.layouts import LAYOUTS, Layout, layout_for, read_shape, write_shape
from llm.model.transformer import Transformer
from llm.model.weights import WEIGHTS, check_tensors, make_outline, weights_of, write_tensors

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
HEAD = "lm_head.weight"
READABLE_TYPES = ("F32", "BF16", "F16")
WRITABLE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """A tensor of a safetensors file, not read yet."""

    source: Path
    name: str
    shape: Sequence[int]
    type_name: str

    def read(self) -> Tensor:
        # mapped anew for each tensor, so that those read before leave memory
        with cast(Any, safe_open(self.source, framework="pt")) as file:
            return file.get_tensor(self.name)


class LayoutTensors(Mapping[str, Tensor]):
    """The weights of a model under a layout's names, each made on demand."""

    def __init__(
        self, layout: Layout, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        self._layout, self._weights, self._dtype = layout, weights, dtype
        self._ours: dict[str, list[tuple[int, str]]] = {}
        for name in weights:
            theirs, part, _ = layout.locate(name)
            self._ours.setdefault(theirs, []).append((part, name))

    def __getitem__(self, name: str) -> Tensor:
        parts = [self._theirs(ours) for _, ours in sorted(self._ours[name])]
        axis = -1 if self._layout.is_transposed else 0
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)
        return whole.to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ours)

    def __len__(self) -> int:
        return len(self._ours)

    def _theirs(self, name: str) -> Tensor:
        weight, offset = self._weights[name], self._layout.offset(name)
        weight = weight - offset if offset else weight
        return weight.T if self._layout.transposes(name) and weight.ndim == 2 else weight


def write_model(
    writer: ArtifactWriter,
    model: Transformer,
    dtype: str = "float32",
    control_ids: Mapping[str, int] | None = None,
) -> Layout:
    """Write `config.json` and `model.safetensors` in a layout that can express the model.

    `control_ids` (`bos_token_id`, ...) are written to `config.json` beside the shape.

    Raises:
        ConfigError: no layout can, or `dtype` is not in WRITABLE_TYPES.
    """
    dtype_written = writable_dtype(dtype)
    shape = Shape(model.config, model.vocab_size, model.seq_len)
    layout = layout_for(shape)
    config = write_shape(layout, shape) | {"torch_dtype": dtype, "use_cache": True}
    config |= control_ids or {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    writer.write_json(CONFIG, config)
    with writer.open(WEIGHTS) as file:
        tensors = LayoutTensors(layout, weights_of(model), dtype_written)
        write_tensors(file, tensors, metadata={"format": "pt"})
    return layout


def writable_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name.

    Raises:
        ConfigError: it is not in WRITABLE_TYPES.
    """
    if name not in WRITABLE_TYPES:
        raise ConfigError(f"dtype: found {name!r}, expected one of {', '.join(WRITABLE_TYPES)}")
    return WRITABLE_TYPES[name]


def read_model(folder: Path, min_vocab_size: int = 0) -> Transformer:
    """Read a model from a folder in one of the layouts, its weights as fp32.

    A vocabulary below `min_vocab_size` is extended, with the mean of all vectors for new tokens:
    the best guess until they are learned.

    Raises:
        ArtifactError: a file is missing, damaged or pickled; a setting has no counterpart here; a
        tensor is missing, unknown, or of another shape or dtype. Each is named.
    """
    config = read_json_object(folder / CONFIG)
    name = config.get("model_type")
    if not isinstance(name, str) or name not in LAYOUTS:
        raise ArtifactError(
            f"{folder / CONFIG}: model_type: found {name!r}, expected one of {', '.join(LAYOUTS)}"
        )
    layout = LAYOUTS[name]
    shape = read_shape(layout, config, str(folder / CONFIG))
    stored = _find_weights(folder, layout)
    _check_weights(layout, shape, stored, folder)
    model = Transformer(shape.config, max(shape.vocab_size, min_vocab_size), seq_len=shape.seq_len)
    _copy_weights(layout, model, stored)
    return model


def read_json_object(path: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        ArtifactError: the file is missing or not a JSON object.
    """
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not there; expected the folder of a model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: no readable JSON ({error})") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: found {type(data).__name__}, expected a JSON object")
    return cast(dict[str, object], data)


def _find_weights(folder: Path, layout: Layout) -> dict[str, _Stored]:
    """Return every stored tensor by the layout's full name."""
    stored: dict[str, _Stored] = {}
    for path in _weight_files(folder):
        for tensor in _tensors_in(path):
            if tensor.name in stored:
                other = stored[tensor.name].source.name
                raise ArtifactError(f"{path}: {tensor.name}: found in {other} too")
            stored[tensor.name] = tensor
    is_whole = any(name.startswith(layout.prefix) for name in stored)
    return {
        name if is_whole or name == HEAD else layout.prefix + name: tensor
        for name, tensor in stored.items()
        if not layout.ignored.fullmatch(name)
    }


def _tensors_in(path: Path) -> list[_Stored]:
    try:
        with cast(Any, safe_open(path, framework="pt")) as file:
            found = {name: file.get_slice(name) for name in sorted(file.keys())}
            return [
                _Stored(source=path, name=name, shape=part.get_shape(), type_name=part.get_dtype())
                for name, part in found.items()
            ]
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: no readable safetensors file ({error})") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only {', '.join(pickled)}, pickled, which can run code" if pickled else "neither"
        raise ArtifactError(
            f"{folder}: found {found}, expected {WEIGHTS} or {INDEX};"
            " `save_pretrained` of transformers writes it"
        )
    names = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ArtifactError(f"{folder / INDEX}: weight_map: expected tensors with their files")
    files = sorted({str(name) for name in cast(dict[str, object], names).values()})
    for name in files:
        # a plain name: no folder, no drive, no parent
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise ArtifactError(
                f"{folder / INDEX}: weight_map: found the file {name!r}, expected the name of a"
                " safetensors file beside it"
            )
    return [folder / name for name in files]


def _check_weights(layout: Layout, shape: Shape, stored: dict[str, _Stored], folder: Path) -> None:
    """Compare the stored tensors with the model's, before any memory is allocated."""
    outline = make_outline(*shape, len(stored), folder / CONFIG)
    needed = LayoutTensors(layout, weights_of(outline))
    wrong = [
        f"{name}: found type {tensor.type_name}, expected one of {', '.join(READABLE_TYPES)}"
        for name, tensor in stored.items()
        if tensor.type_name not in READABLE_TYPES
    ]
    if wrong:
        raise ArtifactError(f"{folder}: weights\n" + "\n".join(f"  {line}" for line in wrong))
    head = stored.get(HEAD)
    if head and HEAD not in needed:  # tied embeddings, stored twice
        embedding = stored.get(layout.locate("embedding.weight")[0])
        if embedding is None or not torch.equal(head.read(), embedding.read()):
            raise ArtifactError(
                f"{head.source}: {HEAD}: found other weights than the embedding's, expected the"
                f" same, since tie_word_embeddings is true in {CONFIG}"
            )
        del stored[HEAD]
    found = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
    check_tensors(found, {name: tensor.shape for name, tensor in needed.items()}, folder)


@torch.no_grad()
def _copy_weights(layout: Layout, model: Transformer, stored: Mapping[str, _Stored]) -> None:
    for name in ("embedding.weight", "head.weight"):
        model.get_parameter(name)[model.vocab_size :] = 0.0
    for name, weight in weights_of(model).items():
        theirs, part, num_parts = layout.locate(name)
        is_transposed = layout.transposes(name)
        found = stored[theirs].read().chunk(num_parts, dim=-1 if is_transposed else 0)[part]
        found = found.T if is_transposed and found.ndim == 2 else found
        weight[: len(found)] = found
        weight[len(found) :] = weight[: len(found)].mean(dim=0)  # new tokens
        weight += layout.offset(name)
