"""Export a model to GGUF for llama.cpp: weights, shape, tokenizer and chat template in one file.

Tensor names come from llama.cpp's own package `gguf`. One tensor at a time is made and written.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's conversion of the
same architectures.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llm.errors import ConfigError
from llm.exchange.folders import load_both, new_folder
from llm.exchange.hf_config import Shape
from llm.exchange.hf_tokenizer import chat_template, control_names, marked_library_json
from llm.exchange.huggingface import LayoutTensors
from llm.exchange.layouts import Layout, expressible, layout_for
from llm.model.positions import ROPE_SCALINGS, head_dim_of
from llm.model.transformer import Transformer
from llm.model.weights import weights_of
from llm.tokenizer.base import Tokenizer

FILE = "model.gguf"
DTYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
ROPE_FACTORS = "rope_freqs.weight"

# llama.cpp supports a fixed set of pre-tokenizers, by name. `code` is not one of them: deepseek-v3
# gives the same tokens if no word contains an underscore, except for spaces before digits.
_GPT4_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_GPT4_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRE_TOKENIZATION_NAMES = {
    r" ?[\p{L}_]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "deepseek-v3",
    _GPT2_PATTERN: "gpt-2",
    _GPT4_WORDS + r"\p{N}{1,3}" + _GPT4_REST: "dbrx",
    _GPT4_WORDS + r"\p{N}" + _GPT4_REST: "qwen2",
}


def export_gguf(source: Path, target: Path, *, dtype: str = "float32") -> None:
    """Write the model in `source` as `model.gguf` in a new folder.

    Vectors and learned positions stay fp32.

    Raises:
        ArtifactError: `source` has no complete model.
        ConfigError: the package `gguf` is missing, `dtype` is unknown, `target` exists, or
        llama.cpp cannot express the model or its tokenizer.
    """
    gguf = _import_gguf()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    model, tokenizer = load_both(source)
    model = expressible(model)
    layout = layout_for(Shape(model.config, model.vocab_size, model.seq_len))
    _refuse(layout, model)
    with new_folder(target) as folder:
        writer = gguf.GGUFWriter(None, layout.name)
        writer.add_type("model")
        writer.add_name(target.name)
        writer.add_file_type(getattr(gguf.LlamaFileType, DTYPES[dtype]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, layout, model)
        _add_tokenizer(writer, gguf, tokenizer)
        _write_tensors(writer, gguf, folder.folder / FILE, _Tensors(gguf, layout, model, dtype))


def permute_heads(weight: Tensor, num_heads: int) -> Tensor:
    """Put the channels of each rotary pair side by side, (heads * D, ...) as before.

    llama.cpp's `llama` architecture rotates neighbors, as Meta's weights have them; here, as in
    transformers, channel d is paired with d + D/2.
    """
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])  # -> (heads, 2, D/2, ...)
    return halves.transpose(1, 2).reshape(weight.shape)


class _Tensors:
    """The tensors of a GGUF file by name, each made on demand."""

    def __init__(self, gguf: ModuleType, layout: Layout, model: Transformer, dtype: str) -> None:
        plain = replace(layout, is_transposed=False, norm_offset=0.0)  # as they are here
        self._stored: Mapping[str, Tensor] = LayoutTensors(plain, weights_of(model))
        self._config, self._dtype = model.config, getattr(torch, dtype)
        self._is_interleaved = layout.name == "llama"
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.name)
        names = gguf.get_tensor_name_map(arch, model.config.num_layers)
        self.names: dict[str, str] = {
            names.get_name(name, try_suffixes=(".weight", ".bias")): name for name in self._stored
        }
        if self._config.rope_scaling != "none":
            self.names[ROPE_FACTORS] = ""

    def make(self, name: str) -> Tensor:
        """Return the tensor that the file calls `name`."""
        if name == ROPE_FACTORS:
            ones = torch.ones(head_dim_of(self._config) // 2)
            frequencies = self._config.rope_theta ** -(
                torch.arange(len(ones), dtype=torch.float64) / len(ones)
            )
            scaled = ROPE_SCALINGS[self._config.rope_scaling](frequencies, self._config)
            return (frequencies / scaled).float()  # llama.cpp divides by it
        weight = self._stored[self.names[name]]
        if self._is_interleaved and ".attn_q." in name:
            weight = permute_heads(weight, self._config.num_heads)
        if self._is_interleaved and ".attn_k." in name:
            weight = permute_heads(weight, self._config.num_kv_heads)
        is_matrix = weight.ndim > 1 and not name.startswith("position_embd")
        return weight.to(self._dtype if is_matrix else torch.float32).contiguous()


def _write_tensors(writer: Any, gguf: ModuleType, path: Path, tensors: _Tensors) -> None:
    dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for name in tensors.names:
        tensor = tensors.make(name)
        writer.add_tensor_info(
            name,
            list(tensor.shape),
            None,
            tensor.nbytes,
            raw_dtype=gguf.GGMLQuantizationType[dtypes[tensor.dtype]],
        )
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in tensors.names:
        writer.write_tensor_data(tensors.make(name).view(torch.uint8).numpy())
    writer.flush()
    os.fsync(writer.fout[0].fileno())
    writer.close()


def _add_shape(writer: Any, layout: Layout, model: Transformer) -> None:
    config = model.config
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    if config.norm == "layernorm":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.positions == "rope":
        writer.add_key_length(head_dim_of(config))
        writer.add_value_length(head_dim_of(config))
        writer.add_rope_dimension_count(head_dim_of(config))
        writer.add_rope_freq_base(config.rope_theta)


def _add_tokenizer(writer: Any, gguf: ModuleType, tokenizer: Tokenizer) -> None:
    """Write the vocabulary, with the exported names of control tokens."""
    library = marked_library_json(tokenizer)
    model = library["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", ())]
    if not merges or (library["decoder"] or {}).get("type") != "ByteLevel":
        found = "pieces with byte fallback" if model.get("byte_fallback") else "which has no merges"
        raise ConfigError(
            f"train_tokenizer.kind: found {tokenizer.kind}, {found}; expected a byte-level BPE with"
            " merges, which llama.cpp can run; use `--format hf` for this one"
        )
    types, token_types = gguf.TokenType, [gguf.TokenType.UNUSED] * tokenizer.vocab_size
    tokens = [f"[PAD{index}]" for index in range(tokenizer.vocab_size)]
    for token, index in model["vocab"].items():
        tokens[index], token_types[index] = token, types.NORMAL
    for token in library["added_tokens"]:
        tokens[token["id"]] = token["content"]
        token_types[token["id"]] = types.CONTROL if token["special"] else types.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer_name(library))
    writer.add_token_list(tokens)
    writer.add_token_types(token_types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.end_id)
    writer.add_eot_token_id(tokenizer.end_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_mask_token_id(tokenizer.mask_id)
    writer.add_add_bos_token(True)
    writer.add_chat_template(chat_template(tokenizer, control_names(tokenizer, library)))


def _pre_tokenizer_name(library: Mapping[str, Any]) -> str:
    steps = library["pre_tokenizer"].get("pretokenizers", [library["pre_tokenizer"]])
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    if [step["type"] for step in steps] == ["ByteLevel"] and steps[0]["use_regex"]:
        patterns = [_GPT2_PATTERN]
    pattern = str(patterns[0]) if len(patterns) == 1 else ""
    for written, plain in (
        (r"[\p{L}]", r"\p{L}"),
        (r"[\p{N}]", r"\p{N}"),
        (r"[\s]", r"\s"),
        (r"[^\s]", r"\S"),
        ("{1,1}", ""),
    ):
        pattern = pattern.replace(written, plain)
    if pattern not in PRE_TOKENIZATION_NAMES:
        raise ConfigError(
            f"train_tokenizer.pre_tokenization: found {patterns}, expected one that llama.cpp"
            " supports: code with max_digits=3, gpt2 with 0, gpt4 with 3 or 1"
        )
    name = PRE_TOKENIZATION_NAMES[pattern]
    return "llama-bpe" if name == "dbrx" and library["model"].get("ignore_merges") else name


def _refuse(layout: Layout, model: Transformer) -> None:
    """Raise for settings that llama.cpp's architecture lacks, unlike that of transformers.

    Raises:
        ConfigError: with all of them.
    """
    config, problems = model.config, list[str]()
    if config.sliding_window:
        problems.append(f"model.sliding_window: found {config.sliding_window}, expected 0")
    if config.rope_scaling != "none" and layout.name != "llama":
        problems.append(f"model.rope_scaling: found {config.rope_scaling}, expected none")
    if layout.name == "gemma" and not config.tie_embeddings:
        problems.append("model.tie_embeddings: found False, expected True")
    if problems:
        raise ConfigError(
            f"llama.cpp cannot express this {layout.name} model: {'; '.join(problems)}; use"
            " `--format hf`"
        )


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            "the package gguf is not installed; `pip install 'fromscratch[gguf]'`"
        ) from error
    return gguf
