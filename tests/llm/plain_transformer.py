"""The oracle of the transformer's tests: the same mathematics, written as slowly and plainly as it
can be, head by head and position by position, sharing no code with llm/model/.
"""

import cmath
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from llm.config import ModelConfig

Weights = Mapping[str, Tensor]


def plain_logits(
    weights: Weights,
    config: ModelConfig,
    tokens: Tensor,
    document_ids: Tensor | None = None,
    frequencies: list[float] | None = None,
) -> Tensor:
    """Score every row of (B, T) by itself: (B, T, V with its padding)."""
    rows = []
    for row, ids in enumerate(tokens):
        documents = [0] * len(ids) if document_ids is None else document_ids[row].tolist()
        rows.append(_row_logits(weights, config, ids, documents, frequencies))
    return torch.stack(rows)


def _row_logits(
    weights: Weights,
    config: ModelConfig,
    ids: Tensor,
    documents: list[int],
    frequencies: list[float] | None,
) -> Tensor:
    x = weights["embedding.weight"][ids]
    if config.is_embedding_scaled:
        x = x * config.d_model**0.5
    if config.positions == "learned":
        places = [place - documents.index(document) for place, document in enumerate(documents)]
        x = x + weights["positions.weight"][places]
    for layer in range(config.num_layers):
        own = {
            name.removeprefix(f"blocks.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"blocks.{layer}.")
        }
        normalized = _norm(x, own, "attention_norm", config)
        x = x + _attention(normalized, own, config, layer, documents, frequencies)
        x = x + _feed_forward(_norm(x, own, "feed_forward_norm", config), own, config)
    x = _norm(x, weights, "norm", config)
    logits = x @ weights["head.weight" if "head.weight" in weights else "embedding.weight"].T
    if config.logit_soft_cap:
        logits = config.logit_soft_cap * torch.tanh(logits / config.logit_soft_cap)
    return logits


def _attention(
    x: Tensor,
    own: Weights,
    config: ModelConfig,
    layer: int,
    documents: list[int],
    frequencies: list[float] | None,
) -> Tensor:
    T, D = len(x), config.head_dim or config.d_model // config.num_heads
    window = config.sliding_window
    if config.full_attention_every and layer % config.full_attention_every == (
        config.full_attention_every - 1
    ):
        window = 0
    forbidden = torch.zeros(T, T, dtype=torch.bool)
    for i in range(T):
        for j in range(T):
            forbidden[i, j] = (
                documents[i] != documents[j]
                or (config.is_causal and j > i)
                or (window > 0 and abs(i - j) >= window)
            )
    heads = []
    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.num_kv_heads)
        q = _linear(x, own, "attention.query")[:, head * D : (head + 1) * D]
        k = _linear(x, own, "attention.key")[:, shared * D : (shared + 1) * D]
        v = _linear(x, own, "attention.value")[:, shared * D : (shared + 1) * D]
        if config.has_qk_norm:
            q = _rms(q, config.norm_eps) * own["attention.query_norm.weight"]
            k = _rms(k, config.norm_eps) * own["attention.key_norm.weight"]
        if config.positions == "rope":
            q, k = _rotate(q, config, frequencies), _rotate(k, config, frequencies)
        scores = q @ k.T / math.sqrt(D)
        if config.attention_soft_cap:
            cap = config.attention_soft_cap
            scores = cap * torch.tanh(scores / cap)
        heads.append(torch.softmax(scores.masked_fill(forbidden, -math.inf), dim=-1) @ v)
    return _linear(torch.cat(heads, dim=-1), own, "attention.output")


def _rotate(x: Tensor, config: ModelConfig, frequencies: list[float] | None) -> Tensor:
    half = x.shape[1] // 2
    points = torch.complex(x[:, :half], x[:, half:])
    turns = [
        [
            cmath.exp(1j * position * (frequencies or _frequencies(config, half))[channel])
            for channel in range(half)
        ]
        for position in range(len(x))
    ]
    turned = points * torch.tensor(turns, dtype=points.dtype)
    return torch.cat([turned.real, turned.imag], dim=1)


def _frequencies(config: ModelConfig, half: int) -> list[float]:
    return [config.rope_theta ** (-channel / half) for channel in range(half)]


def _feed_forward(x: Tensor, own: Weights, config: ModelConfig) -> Tensor:
    up = _linear(x, own, "feed_forward.up")
    if config.mlp == "gelu":
        inside = _gelu(up)
    elif config.mlp == "relu2":
        inside = torch.where(up > 0, up * up, torch.zeros_like(up))
    else:
        gate = _linear(x, own, "feed_forward.gate")
        inside = up * (_gelu(gate) if config.mlp == "geglu" else gate / (1 + torch.exp(-gate)))
    return _linear(inside, own, "feed_forward.down")


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _linear(x: Tensor, own: Weights, name: str) -> Tensor:
    y = x @ own[f"{name}.weight"].T
    return y + own[f"{name}.bias"] if f"{name}.bias" in own else y


def _norm(x: Tensor, own: Weights, name: str, config: ModelConfig) -> Tensor:
    if config.norm == "rmsnorm":
        return _rms(x, config.norm_eps) * own[f"{name}.weight"]
    centered = x - x.mean(dim=-1, keepdim=True)
    variance = (centered**2).mean(dim=-1, keepdim=True)
    y = centered / torch.sqrt(variance + config.norm_eps) * own[f"{name}.weight"]
    return y + own[f"{name}.bias"] if f"{name}.bias" in own else y


def _rms(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + eps)
