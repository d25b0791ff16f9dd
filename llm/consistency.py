"""Checks of settings against each other, before anything runs."""

import dataclasses
import re

from llm.config import (
    AlignConfig,
    FinetuneConfig,
    LoraConfig,
    MixtureConfig,
    ModelConfig,
    OptimizationConfig,
    RunConfig,
    SourceConfig,
    TuningConfig,
    mixture_of,
)
from llm.data.raw.formats import content_of
from llm.models import MODELS, Training, dataset_of, trainings
from llm.settings import did_you_mean
from llm.training.rewards import reward_problems
from llm.training.shares import replayed_per_step

DATASET_NAME = re.compile(r"(corpus|chats|preferences)-[a-z0-9-]+")
MODEL_NAME = re.compile(r"[a-z][a-z0-9-]*")


def find_problems(config: RunConfig) -> list[str]:
    """Return the problems between settings of different keys."""
    problems = model_problems(config.pretrain.model, "pretrain.model")
    later_stages = tuple(MODELS)[1:]
    found = config.stages_after_pretrain
    if found != tuple(stage for stage in later_stages if stage in found):
        problems.append(
            f"stages_after_pretrain: found {', '.join(found)}, expected each at most once, and in"
            f" this order: {', '.join(later_stages)}"
        )
        return problems
    for training in trainings(config):
        section, dotted = training.settings, training.dotted
        if section.warmup_steps >= section.num_steps:
            problems.append(
                f"{dotted}.warmup_steps: found {section.warmup_steps}, expected less than"
                f" {dotted}.num_steps = {section.num_steps}"
            )
        problems += tuning_problems(section, dotted)
        if isinstance(section, TuningConfig):
            problems += lora_problems(config.pretrain.model, section.lora, f"{dotted}.lora")
        if isinstance(section, AlignConfig) and not config.pretrain.model.is_causal:
            problems.append(
                f"{dotted}.method: found {section.method}, expected no stage align for"
                " pretrain.model.is_causal = false: a masked language model generates no answers"
            )
    problems += _training_problems(config)
    for slot in ("corpus", "chats", "preferences"):
        problems += _mixture_problems(mixture_of(config.download, slot), f"download.{slot}")
    for index, mixture in enumerate(config.download.more):
        problems += _mixture_problems(mixture, f"download.more.{index}")
    if config.evaluate.models:
        problems.append("evaluate.models: set; expected stages_after_pretrain to name the models")
    if config.pack.shares:
        problems.append("pack.shares: set; expected weights in download.<role>.sources instead")
    return problems


def model_problems(model: ModelConfig, prefix: str) -> list[str]:
    """Return the inconsistencies between the settings of a model, each with its dotted key."""
    problems: list[str] = []
    if not model.head_dim and model.d_model % model.num_heads:
        problems.append(
            f"{prefix}.d_model: found {model.d_model}, expected a multiple of {prefix}.num_heads ="
            f" {model.num_heads}, or {prefix}.head_dim to be given"
        )
    head_dim = model.head_dim or model.d_model // model.num_heads
    if model.positions == "rope" and head_dim % 2:
        source = "head_dim" if model.head_dim else "d_model"
        problems.append(
            f"{prefix}.{source}: found {getattr(model, source)}, which makes heads"
            f" {head_dim} wide, expected an even width with {prefix}.positions = rope"
        )
    if model.num_heads % model.num_kv_heads:
        problems.append(
            f"{prefix}.num_kv_heads: found {model.num_kv_heads}, expected a divisor of"
            f" {prefix}.num_heads = {model.num_heads}"
        )
    low, high = model.rope_low_frequency_factor, model.rope_high_frequency_factor
    if model.rope_scaling == "llama3" and low >= high:
        problems.append(
            f"{prefix}.rope_low_frequency_factor: found {low}, expected less than"
            f" {prefix}.rope_high_frequency_factor = {high}"
        )
    if model.rope_scaling != "none" and model.positions != "rope":
        problems.append(
            f"{prefix}.rope_scaling: found {model.rope_scaling}, expected none where"
            f" {prefix}.positions is {model.positions}"
        )
    if model.full_attention_every and not model.sliding_window:
        problems.append(
            f"{prefix}.full_attention_every: found {model.full_attention_every}, expected 0 where"
            f" {prefix}.sliding_window is 0 and every layer attends to all positions"
        )
    return problems


def tuning_problems(section: OptimizationConfig, prefix: str) -> list[str]:
    """Return the inconsistencies between the settings of a training stage."""
    problems: list[str] = []
    if isinstance(section, TuningConfig):
        best = section.best
        if best.every_steps and section.averaging == "snapshots":
            problems.append(
                f"{prefix}.averaging: found snapshots, expected none or ema with"
                f" {prefix}.best.every_steps > 0: snapshots count back from the last step, and the"
                " best weights are earlier ones"
            )
        if best.patience and not best.every_steps:
            problems.append(
                f"{prefix}.best.patience: found {best.patience}, expected 0 where"
                f" {prefix}.best.every_steps is 0 and no validation decides"
            )
    if isinstance(section, FinetuneConfig) and section.replay_fraction:
        total = section.global_batch_size
        replayed = replayed_per_step(section.replay_fraction, total)
        if not 0 < replayed < total:
            problems.append(
                f"{prefix}.replay_fraction: found {section.replay_fraction}, which is {replayed} of"
                f" {prefix}.global_batch_size = {total} sequences, expected at least one of each"
                " kind in every step"
            )
    if (
        isinstance(section, FinetuneConfig)
        and section.lora.rank
        and section.new_token_embeddings == "mean"
    ):
        problems.append(
            f"{prefix}.new_token_embeddings: found mean, expected keep with {prefix}.lora.rank ="
            f" {section.lora.rank}: embeddings are then not trained, and new tokens would stay"
            " equal"
        )
    if isinstance(section, AlignConfig):
        problems += _align_problems(section, prefix)
    return problems


def lora_problems(model: ModelConfig, lora: LoraConfig, prefix: str) -> list[str]:
    """Return why an adapter does not fit a model, each with its dotted key; none if rank is 0."""
    layers = ["query", "key", "value", "output", "gate", "up", "down"]
    if not lora.rank or lora.targets == LoraConfig().targets:
        return []
    if model.mlp not in ("swiglu", "geglu"):
        layers.remove("gate")
    unknown = [target for target in lora.targets if target not in layers]
    if lora.targets and not unknown:
        return []
    return [
        f"{prefix}.targets: found {', '.join(unknown) or 'none'}, expected some of"
        f" {', '.join(layers)}, the linear layers of this model's blocks"
    ]


def _align_problems(section: AlignConfig, prefix: str) -> list[str]:
    problems: list[str] = []
    if section.lora.dropout:
        problems.append(
            f"{prefix}.lora.dropout: found {section.lora.dropout:g}, expected 0: {section.method}"
            " compares probabilities, and dropout would add noise to them"
        )
    if section.method == "grpo":
        problems += reward_problems(section.grpo.rewards, f"{prefix}.grpo.rewards")
        if section.global_batch_size % section.grpo.group_size:
            problems.append(
                f"{prefix}.global_batch_size: found {section.global_batch_size} answers, expected a"
                f" multiple of {prefix}.grpo.group_size = {section.grpo.group_size}"
            )
    return problems


def _training_problems(config: RunConfig) -> list[str]:
    """Return the problems with names and datasets of the trainings after pretraining."""
    problems: list[str] = []
    for index, mixture in enumerate(config.download.more):
        if not DATASET_NAME.fullmatch(mixture.name):
            problems.append(
                f"download.more.{index}.name: found {mixture.name!r}, expected corpus-, chats- or"
                " preferences- and lower-case letters, digits or hyphens"
            )
    datasets = ["corpus", "chats", "preferences", *(each.name for each in config.download.more)]
    if len(set(datasets)) < len(datasets):
        problems.append(f"download.more: found {', '.join(datasets[3:])}, expected distinct names")
    names = [training.model_name for training in trainings(config)]
    for training in trainings(config)[1:]:
        name, dataset = training.model_name, dataset_of(training.settings)
        if training.role and (not MODEL_NAME.fullmatch(name) or names.count(name) > 1):
            problems.append(
                f"{training.dotted}.name: found {name!r}, expected a name of its own of lower-case"
                f" letters, digits and hyphens; in use: {', '.join(names)}"
            )
        if dataset not in datasets:
            problems.append(
                f"{training.dotted}.data: found {dataset!r}, expected one of {', '.join(datasets)}"
                f"{did_you_mean(dataset, datasets)}"
            )
        elif content_of(dataset) not in (needed := _needed_content(training)):
            problems.append(
                f"{training.dotted}.data: found {dataset}, which holds {content_of(dataset)};"
                f" expected {' or '.join(needed)}"
            )
    return problems


def _needed_content(training: Training) -> tuple[str, ...]:
    """Return what the dataset of a training may hold."""
    if not isinstance(training.settings, AlignConfig):
        return ("text", "chats")
    return ("preferences",) if training.settings.method == "dpo" else ("chats",)


def _mixture_problems(mixture: MixtureConfig, dotted: str) -> list[str]:
    if not mixture.sources:
        return _source_problems(mixture, dotted)
    problems = [
        f"{dotted}.{known.name}: has no effect next to {dotted}.sources; move it into a source"
        for known in dataclasses.fields(SourceConfig)
        if getattr(mixture, known.name) != known.default
    ]
    for index, source in enumerate(mixture.sources):
        problems += _source_problems(source, f"{dotted}.sources.{index}")
    return problems


def _source_problems(source: SourceConfig, dotted: str) -> list[str]:
    def is_hexadecimal(text: str, length: int) -> bool:
        return len(text) == length and all(character in "0123456789abcdef" for character in text)

    problems: list[str] = []
    if source.kind == "files" and not source.path:
        problems.append(
            f"{dotted}.path: empty, expected a file, folder or glob since {dotted}.kind is files"
        )
    if source.kind == "url":
        if not source.url.startswith(("http://", "https://")):
            problems.append(
                f"{dotted}.url: found {source.url!r}, expected an http:// or https:// address"
            )
        if not is_hexadecimal(source.sha256, 64):
            problems.append(
                f"{dotted}.sha256: found {source.sha256!r}, expected a sha256 of 64 hex characters"
            )
    if source.kind == "hub":
        if not source.hub_name:
            problems.append(
                f"{dotted}.hub_name: empty, expected owner/name since {dotted}.kind is hub"
            )
        if not source.hub_revision:
            problems.append(
                f"{dotted}.hub_revision: found '', expected a commit of 40 hex characters, or a"
                " branch or tag to look it up"
            )
    return problems
