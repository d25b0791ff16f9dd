"""The Hugging Face layouts of GPT-2, Llama-3, Qwen-3 and Gemma, as data.

A layout maps `config.json` to the shape of a model and back, and the names of our weights to those
in its safetensors files. A shape that the round trip changes cannot be expressed in it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import cast

from llm.errors import ArtifactError, ConfigError
from llm.exchange.hf_config import (
    ConfigJson,
    GemmaJson,
    GPT2Json,
    LlamaJson,
    Qwen3Json,
    Shape,
    normalized_config,
    read_gemma,
    read_gpt2,
    read_llama,
    read_qwen3,
    write_gemma,
    write_gpt2,
    write_llama,
    write_qwen3,
)
from llm.model.transformer import Transformer
from llm.model.weights import set_weights, weights_of
from llm.settings import build

GPT2_ALIASES = {  # transformers reads these names of GPT-2's keys too
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One architecture of transformers: its `config.json` and the names of its weights."""

    name: str
    """`model_type` in config.json, and the architecture in GGUF."""
    architecture: str
    """The class in transformers."""
    keys: type[ConfigJson]
    """The keys of config.json, required and optional."""
    read: Callable[..., Shape]
    """From the keys to a shape; takes a list to which it adds problems."""
    write: Callable[[Shape], ConfigJson]
    """From a shape to the keys, as far as they can express it."""
    modules: Mapping[str, str]
    """The name of each of our modules, N for the layer's number. Modules of one name are
    concatenated in one tensor.
    """
    prefix: str
    """Prefix of all names, unless the file is of the model without its head."""
    ignored: re.Pattern[str] = re.compile(r".*\.rotary_emb\.inv_freq")
    """Tensors of older files that the settings determine."""
    is_transposed: bool = False
    """Matrices inside the blocks are (in, out), as GPT-2's Conv1D has them."""
    norm_offset: float = 0.0
    """Added to stored norm weights: Gemma stores them minus one."""

    def locate(self, name: str) -> tuple[str, int, int]:
        """Return their tensor of our weight `name`, the part's index and the number of parts."""
        module, leaf = name.rsplit(".", 1)
        number = re.search(r"(?<=^blocks\.)\d+(?=\.)", module)
        generic = re.sub(r"^blocks\.\d+\.", "blocks.N.", module)
        theirs = self.modules[generic]
        shared = [ours for ours, other in self.modules.items() if other == theirs]
        filled = theirs.replace(".N.", f".{number[0]}.") if number else theirs
        return f"{filled}.{leaf}", shared.index(generic), len(shared)

    def transposes(self, name: str) -> bool:
        """Tell whether our weight `name` is stored transposed."""
        return self.is_transposed and name.startswith("blocks.")

    def offset(self, name: str) -> float:
        """Return the number to add to the stored weight."""
        return self.norm_offset if name.endswith("norm.weight") else 0.0


def read_shape(layout: Layout, config: Mapping[str, object], source: str) -> Shape:
    """Read the `config.json` of a model as its shape.

    Raises:
        ArtifactError: with all keys that are missing, of a wrong type, or of a value that cannot
        be expressed here.
    """
    problems: list[str] = []
    known = {key.name: key for key in fields(layout.keys)}
    settings = {key: value for key, value in config.items() if key in known and value is not None}
    if layout.keys is GPT2Json:
        settings |= {GPT2_ALIASES[key]: config[key] for key in GPT2_ALIASES.keys() & config.keys()}
    else:
        settings["rope_parameters"] = _rope_settings(config, problems)
    problems += [
        f"{name}: missing"
        for name, key in known.items()
        if key.default is MISSING and key.default_factory is MISSING and name not in settings
    ]
    if config.get("quantization_config") is not None:
        problems.append("quantization_config: found one, expected unquantized weights")
    keys = None
    if not problems:
        keys = cast(ConfigJson | None, build(layout.keys, settings, "", problems))
    shape = layout.read(keys, problems) if keys else None
    if problems or shape is None:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ArtifactError(f"{source}: not a {layout.name} model that fits here\n{listed}")
    return shape


def write_shape(layout: Layout, shape: Shape) -> dict[str, object]:
    """Return the content of `config.json`, without the ids of control tokens.

    Raises:
        ConfigError: with all settings that the layout cannot express.
    """
    problems = unsupported_settings(layout, shape)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"the {layout.name} layout cannot express this model\n{listed}")
    keys = asdict(layout.write(shape))
    rope = keys.get("rope_parameters")
    if rope is not None:
        del rope["partial_rotary_factor"]
        keys["rope_theta"] = rope["rope_theta"]  # where transformers 4 and llama.cpp look
        if rope["rope_type"] == "default":
            keys["rope_parameters"] = {key: rope[key] for key in ("rope_type", "rope_theta")}
        else:
            keys["rope_scaling"] = {key: rope[key] for key in rope if key != "rope_theta"}
    else:
        keys["n_ctx"] = shape.seq_len  # where llama.cpp looks
        keys |= {"embd_pdrop": shape.config.dropout, "resid_pdrop": shape.config.dropout}
        keys["attn_pdrop"] = 0.0
    return {"model_type": layout.name, "architectures": [layout.architecture], **keys}


def unsupported_settings(layout: Layout, shape: Shape) -> list[str]:
    """Return the settings of `shape` that the layout cannot express."""
    problems: list[str] = []
    returned = layout.read(layout.write(shape), problems)
    ours, theirs = (
        asdict(normalized_config(shape.config)),
        asdict(normalized_config(returned.config)),
    )
    return problems + [
        f"model.{name}: found {ours[name]}, expected {theirs[name]}"
        for name in ours
        if ours[name] != theirs[name]
    ]


def layout_for(shape: Shape) -> Layout:
    """Return a layout that can express a model.

    Raises:
        ConfigError: none can, with the reasons of each.
    """
    found = {layout.name: unsupported_settings(layout, shape) for layout in LAYOUTS.values()}
    for name, problems in found.items():
        if not problems:
            return LAYOUTS[name]
    listed = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in found.items())
    raise ConfigError(f"no layout of transformers can express this model\n{listed}")


def expressible_shape(shape: Shape) -> Shape:
    """Return the shape; where no layout can express it but for the scale of its embeddings, that
    with the scale in the embedding, which then cannot be tied to the head.
    """

    def is_known(shape: Shape) -> bool:
        return any(not unsupported_settings(layout, shape) for layout in LAYOUTS.values())

    untied = replace(shape.config, is_embedding_scaled=False, tie_embeddings=False)
    without = shape._replace(config=untied)
    needs_it = shape.config.is_embedding_scaled and not is_known(shape) and is_known(without)
    return without if needs_it else shape


def expressible(model: Transformer) -> Transformer:
    """Return the model, or an equal one of its `expressible_shape`."""
    shape = Shape(model.config, model.vocab_size, model.seq_len)
    if (found := expressible_shape(shape)) == shape:
        return model
    weights = weights_of(model)
    embedding = weights["embedding.weight"]
    weights.setdefault("head.weight", embedding)
    weights["embedding.weight"] = embedding * model.embedding_scale
    made = Transformer(*found)
    set_weights(made, weights, Path("the exported model"))
    return made


def _rope_settings(config: Mapping[str, object], problems: list[str]) -> dict[str, object]:
    """Gather the settings of RoPE from wherever a version of transformers wrote them."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        problems.append(f"rope_parameters: found {found!r}, expected an object")
        return {}
    given = cast(Mapping[str, object], found).items()
    rope = {key: value for key, value in given if value is not None}
    if "type" in rope:  # its name before transformers 4.43
        rope.setdefault("rope_type", rope.pop("type"))
    for key in ("rope_theta", "partial_rotary_factor"):
        if config.get(key) is not None:
            rope.setdefault(key, config[key])
    if rope.get("rope_type") == "llama3":
        problems += [f"rope_parameters.{key}: missing" for key in LLAMA3_KEYS if key not in rope]
        context = config.get("max_position_embeddings")
        rope.setdefault("original_max_position_embeddings", context)
    return rope


_GPT2_MODULES = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "blocks.N.attention_norm": "transformer.h.N.ln_1",
    "blocks.N.attention.query": "transformer.h.N.attn.c_attn",
    "blocks.N.attention.key": "transformer.h.N.attn.c_attn",
    "blocks.N.attention.value": "transformer.h.N.attn.c_attn",
    "blocks.N.attention.output": "transformer.h.N.attn.c_proj",
    "blocks.N.feed_forward_norm": "transformer.h.N.ln_2",
    "blocks.N.feed_forward.up": "transformer.h.N.mlp.c_fc",
    "blocks.N.feed_forward.down": "transformer.h.N.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
_ROTARY_MODULES = {
    "embedding": "model.embed_tokens",
    "blocks.N.attention_norm": "model.layers.N.input_layernorm",
    "blocks.N.attention.query": "model.layers.N.self_attn.q_proj",
    "blocks.N.attention.query_norm": "model.layers.N.self_attn.q_norm",
    "blocks.N.attention.key": "model.layers.N.self_attn.k_proj",
    "blocks.N.attention.key_norm": "model.layers.N.self_attn.k_norm",
    "blocks.N.attention.value": "model.layers.N.self_attn.v_proj",
    "blocks.N.attention.output": "model.layers.N.self_attn.o_proj",
    "blocks.N.feed_forward_norm": "model.layers.N.post_attention_layernorm",
    "blocks.N.feed_forward.gate": "model.layers.N.mlp.gate_proj",
    "blocks.N.feed_forward.up": "model.layers.N.mlp.up_proj",
    "blocks.N.feed_forward.down": "model.layers.N.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}

_LAYOUTS: Sequence[Layout] = (
    Layout(
        name="gpt2",
        architecture="GPT2LMHeadModel",
        keys=GPT2Json,
        read=read_gpt2,
        write=write_gpt2,
        modules=_GPT2_MODULES,
        prefix="transformer.",
        ignored=re.compile(r".*\.attn\.(masked_)?bias"),  # the causal mask
        is_transposed=True,
    ),
    Layout(
        name="llama",
        architecture="LlamaForCausalLM",
        keys=LlamaJson,
        read=read_llama,
        write=write_llama,
        modules=_ROTARY_MODULES,
        prefix="model.",
    ),
    Layout(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        keys=Qwen3Json,
        read=read_qwen3,
        write=write_qwen3,
        modules=_ROTARY_MODULES,
        prefix="model.",
    ),
    Layout(
        name="gemma",
        architecture="GemmaForCausalLM",
        keys=GemmaJson,
        read=read_gemma,
        write=write_gemma,
        modules=_ROTARY_MODULES,
        prefix="model.",
        norm_offset=1.0,
    ),
)
LAYOUTS = {layout.name: layout for layout in _LAYOUTS}
