"""Optimizers: AdamW for all weights, or Muon for the matrices inside the blocks with AdamW for the
rest.

Either way the loop sees one object, and a checkpoint sees plain tensors named after the weights.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llm.config import OptimizationConfig
from llm.errors import ArtifactError
from llm.training.muon import Muon


class Optimizer:
    """One or two torch optimizers that step together, each at its own share of its peak rate."""

    def __init__(
        self, parts: Mapping[str, torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._parts = dict(parts)
        self._parameters = dict(parameters)
        self._peaks = [
            (group, float(group["lr"])) for part in parts.values() for group in part.param_groups
        ]

    def set_learning_rates(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times its peak."""
        for group, peak in self._peaks:
            group["lr"] = peak * factor

    def step(self, is_void: Tensor | None = None) -> None:
        """Update the weights from their gradients; where `is_void` is 1, leave everything as it is.

        It is a number on the device, and a GPU decides by it without the host waiting to know.
        """
        if is_void is not None and is_void.device.type == "cpu":
            if is_void:
                return
            is_void = None
        for part in self._parts.values():
            part.__dict__["found_inf"] = is_void  # where torch's fused AdamW looks for it, and Muon
            part.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts.values():
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole state as `{"muon/blocks.0.attention.query.weight/momentum_buffer":
        tensor}`.
        """
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._parameters.items()}
        return {
            f"{kind}/{names[parameter]}/{key}": tensor
            for kind, part in self._parts.items()
            for parameter, state in part.state.items()
            for key, tensor in state.items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor], source: Path) -> None:
        """Take the state that `state_dict` gave, onto the device of each weight.

        Raises:
            ArtifactError: the state is of other weights or of another optimizer.
        """
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
            if tensor.ndim and tensor.shape != parameter.shape:
                raise ArtifactError(
                    f"{source}: {full_name}: found shape {list(tensor.shape)}, expected"
                    f" {list(parameter.shape)}"
                )
            self._parts[kind].state[parameter][key] = tensor.to(parameter.device)
            found[kind].add(name)
        self._refuse_missing(found, source)

    def _refuse_missing(self, found: Mapping[str, set[str]], source: Path) -> None:
        """Raise if some weights have a state and others do not; before the first step none has."""
        for kind, part in self._parts.items():
            expected = sum(len(group["params"]) for group in part.param_groups)
            if any(found.values()) and len(found[kind]) != expected:
                raise ArtifactError(
                    f"{source}: found the {kind} state of {len(found[kind])} weights,"
                    f" expected {expected}"
                )


def make_optimizer(model: nn.Module, config: OptimizationConfig) -> Optimizer:
    """Make the optimizer that `config` asks for. Matrices decay; vectors, which only scale, do not.

    Source: "Decoupled Weight Decay Regularization" (arXiv 1711.05101) for AdamW; for which weights
    Muon takes, "Muon is Scalable for LLM Training" (arXiv 2502.16982).
    """
    parameters = dict(model.named_parameters())
    for_muon = (
        [p for name, p in parameters.items() if name.startswith("blocks.") and p.ndim == 2]
        if config.optimizer == "muon"
        else []
    )
    taken = {id(parameter) for parameter in for_muon}
    rest = [parameter for parameter in parameters.values() if id(parameter) not in taken]
    parts: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
                {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
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
