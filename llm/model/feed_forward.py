"""Feed-forward: what is thought about each position alone.

B  rows    T  positions in a row    C  model width    F  feed-forward width
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from llm.config import ModelConfig
from llm.model.linear import Linear

Activation = Callable[[Tensor], Tensor]


class FeedForward(nn.Module):
    """Widen, bend, narrow.

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
    """Widen twice; one half, bent, decides how much of the other passes; narrow.

    Source: "GLU Variants Improve Transformer" (arXiv 2002.05202).
    """

    def __init__(self, activation: Activation, config: ModelConfig) -> None:
        super().__init__()
        self.activation = activation
        self.gate = Linear(config.d_model, config.d_ff, bias=config.has_biases)
        self.up = Linear(config.d_model, config.d_ff, bias=config.has_biases)
        self.down = Linear(config.d_ff, config.d_model, bias=config.has_biases)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of (B, T, C)."""
        passed = self.activation(self.gate(x)) * self.up(x)  # (B, T, C) -> (B, T, F)
        return self.down(passed)  # (B, T, F) -> (B, T, C)


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0)^2. Source: "Primer" (arXiv 2109.08668), section 3."""
    return F.relu(x).square()


# Source: "Gaussian Error Linear Units" (arXiv 1606.08415), in the tanh form of GPT-2 and Gemma
tanh_gelu = partial(F.gelu, approximate="tanh")

MLPS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "gelu": partial(FeedForward, tanh_gelu),
    "relu2": partial(FeedForward, squared_relu),
    "geglu": partial(GatedFeedForward, tanh_gelu),
    "swiglu": partial(GatedFeedForward, F.silu),
}
