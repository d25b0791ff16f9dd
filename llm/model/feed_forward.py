"""The feed-forward network (MLP), applied to each position independently.

B  sequences    T  positions    C  model width    F  feed-forward width
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from llm.config import ModelConfig
from llm.model.kernels.linear import Linear

Activation = Callable[[Tensor], Tensor]


class FeedForward(nn.Module):
    """Project up to F, apply the activation, project back: down(activation(up(x))).

    Source: "Attention Is All You Need" (arXiv 1706.03762), section 3.3.
    """

    def __init__(self, activation: Activation, config: ModelConfig) -> None:
        super().__init__()
        self.activation = activation
        self.up = Linear(config.d_model, config.d_ff, bias=config.has_biases)
        self.down = Linear(config.d_ff, config.d_model, bias=config.has_biases)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of (B, T, C)."""
        return self.down(self.activation(self.up(x)))  # (B, T, C) -> (B, T, F) -> (B, T, C)


class GatedFeedForward(nn.Module):
    """Scale each of the F channels by a gate: down(activation(gate(x)) * up(x)).

    Source: "GLU Variants Improve Transformer" (arXiv 2002.05202).
    """

    def __init__(self, activation: Activation, config: ModelConfig) -> None:
        super().__init__()
        self.activation = activation
        # three matrices instead of two: F = 8/3 C costs what F = 4 C costs without a gate
        self.gate = Linear(config.d_model, config.d_ff, bias=config.has_biases)
        self.up = Linear(config.d_model, config.d_ff, bias=config.has_biases)
        self.down = Linear(config.d_ff, config.d_model, bias=config.has_biases)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of (B, T, C)."""
        gated = self.activation(self.gate(x)) * self.up(x)  # (B, T, C) -> (B, T, F)
        return self.down(gated)  # (B, T, F) -> (B, T, C)


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0)^2. Source: "Primer" (arXiv 2109.08668), section 3."""
    return F.relu(x).square()


# "Gaussian Error Linear Units" (arXiv 1606.08415); the tanh approximation, since GPT-2 and Gemma
# were trained with it and their weights would give other logits with the exact form
tanh_gelu = partial(F.gelu, approximate="tanh")

MLPS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "gelu": partial(FeedForward, tanh_gelu),  # GPT-2
    "relu2": partial(FeedForward, squared_relu),  # nanochat, Nemotron
    "geglu": partial(GatedFeedForward, tanh_gelu),  # Gemma
    "swiglu": partial(GatedFeedForward, F.silu),  # Llama, Qwen
}
