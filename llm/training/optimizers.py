"""Optimizers: AdamW for all weights, or Muon for the matrices of the blocks and AdamW for the rest.

The loop sees one object, a checkpoint sees tensors named after the weights.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm.config import OptimizationConfig
from llm.errors import ArtifactError
from llm.training.muon import Muon


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW whose step can be skipped on the device."""

    found_inf: Tensor | None = None  # where torch's fused kernel looks for it; GradScaler sets it

    def step(
        self, closure: Callable[[], Any] | None = None, *, is_skipped: Tensor | None = None
    ) -> Any:
        """Update every weight that has a gradient; none where `is_skipped` is 1."""
        self.found_inf = is_skipped
        return super().step(closure)


class Optimizer:
    """One or two torch optimizers that step together, each at the same share of its peak rate."""

    def __init__(
        self, parts: Mapping[str, FusedAdamW | Muon], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        # the keys are part of the names in a checkpoint
        self._parts = dict(parts)
        self._parameters = dict(parameters)
        # the peaks are taken now, since the groups hold the scheduled rate from the first step on
        self._peaks = [
            (group, float(group["lr"])) for part in parts.values() for group in part.param_groups
        ]

    def set_learning_rates(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times its peak."""
        for group, peak in self._peaks:
            group["lr"] = peak * factor

    def step(self, is_skipped: Tensor | None = None) -> None:
        """Update the weights from their gradients; change nothing where `is_skipped` is 1."""
        if is_skipped is not None and is_skipped.device.type == "cpu":
            # on a CPU the answer is known, and a plain step costs less than a masked one
            if is_skipped:
                return
            is_skipped = None
        for part in self._parts.values():
            part.step(is_skipped=is_skipped)

    def zero_grad(self) -> None:
        """Free the gradients."""
        for part in self._parts.values():
            part.zero_grad(set_to_none=True)  # saves memory, and a kernel that writes zeros

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors by name: `muon/blocks.0.attention.query.weight/momentum_buffer`."""
        # by name, not by torch's numbers: those would shift with the order of the parameters
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._parameters.items()}
        return {
            f"{kind}/{names[parameter]}/{key}": tensor
            for kind, part in self._parts.items()
            for parameter, state in part.state.items()
            for key, tensor in state.items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor], source: Path) -> None:
        """Load what `state_dict` returned, onto the device of each weight.

        Raises:
            ArtifactError: the state belongs to other weights or to another optimizer.
        """
        # torch's own `load_state_dict` compares counts only: it would take that of other weights
        # a weight moves between AdamW and Muon with the setting, so its owner is checked as well
        owner = {
            id(parameter): kind
            for kind, part in self._parts.items()
            for group in part.param_groups
            for parameter in group["params"]
        }
        found: dict[str, set[str]] = {kind: set() for kind in self._parts}
        for full_name, tensor in tensors.items():
            kind, _, rest = full_name.partition("/")
            name, _, key = rest.rpartition("/")
            parameter = self._parameters.get(name)
            if parameter is None or owner.get(id(parameter)) != kind:
                raise ArtifactError(
                    f"{source}: {full_name}: belongs to no weight of this optimizer"
                )
            # scalars, such as Adam's step count, have no shape of their weight
            if tensor.ndim and tensor.shape != parameter.shape:
                raise ArtifactError(
                    f"{source}: {full_name}: found shape {list(tensor.shape)}, expected"
                    f" {list(parameter.shape)}"
                )
            self._parts[kind].state[parameter][key] = tensor.to(parameter.device)
            found[kind].add(name)
        self._refuse_missing(found, source)

    def _refuse_missing(self, found: Mapping[str, set[str]], source: Path) -> None:
        # before the first step no weight has a state; later, one that lacked it would start over
        for kind, part in self._parts.items():
            expected = sum(len(group["params"]) for group in part.param_groups)
            if any(found.values()) and len(found[kind]) != expected:
                raise ArtifactError(
                    f"{source}: found the {kind} state of {len(found[kind])} weights,"
                    f" expected {expected}"
                )


def make_optimizer(model: nn.Module, config: OptimizationConfig) -> Optimizer:
    """Make the optimizer that `config` asks for.

    Source: "Decoupled Weight Decay Regularization" (arXiv 1711.05101) for AdamW.
    """
    # frozen weights have no state: with an adapter its memory falls by their share
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Muon for matrices inside the blocks only: embedding and head stay with AdamW, as in "Muon is
    # Scalable for LLM Training" (arXiv 2502.16982). A and B of an adapter are such matrices too: 30
    # steps on the quickstart's chats gave 4.34 nats at Muon's 0.02, 4.24 at AdamW's 0.01.
    for_muon = (
        [p for name, p in parameters.items() if name.startswith("blocks.") and p.ndim == 2]
        if config.optimizer == "muon"
        else []
    )
    taken = {id(parameter) for parameter in for_muon}
    rest = [parameter for parameter in parameters.values() if id(parameter) not in taken]
    parts: dict[str, FusedAdamW | Muon] = {
        "adamw": FusedAdamW(
            [
                {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
                # norms and biases only scale and shift; decay would pull them to 0 to no use
                {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            # eps stays at torch's 1e-8; beta2 is 0.95 by default, as in GPT-3 and Llama
            betas=(config.beta1, config.beta2),
            fused=True,  # one pass over memory instead of a dozen, on CPU and GPU alike
        )
    }
    if for_muon:
        parts["muon"] = Muon(
            for_muon,
            lr=config.muon_learning_rate,
            weight_decay=config.weight_decay,
            momentum=config.muon_momentum,
        )
    return Optimizer(parts, parameters)
