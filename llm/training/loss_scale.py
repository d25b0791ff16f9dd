"""Loss scaling for fp16, and which steps are skipped: decided on the device, without a wait.

Source: "Mixed Precision Training" (arXiv 1710.03740), section 3.2.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

INITIAL_LOSS_SCALE = 2.0**16  # GradScaler's too; one that is too large halves in a few steps
STEPS_TO_DOUBLE = 2000  # without an overflow; arXiv 1710.03740, section 3.2


class LossScale:
    """The factor that keeps small gradients above fp16's smallest number, 6e-8.

    Halved when a gradient overflows, doubled after STEPS_TO_DOUBLE steps without an overflow.
    """

    # torch's GradScaler does the same, but waits for the device in each step of an optimizer that
    # does not take `found_inf`, such as Muon

    def __init__(self, scale: float, num_steps: int, device: torch.device) -> None:
        self.scale = torch.tensor(scale, device=device)
        self.num_steps = torch.tensor(float(num_steps), device=device)
        """Steps since the scale last changed."""

    def update(self, has_overflow: Tensor) -> None:
        """Change the scale after a step; `has_overflow` is 1 if its gradient overflowed, else 0."""
        is_doubled = (self.num_steps + 1 >= STEPS_TO_DOUBLE).float() * (1 - has_overflow)
        self.scale = self.scale * (1 - 0.5 * has_overflow) * (1 + is_doubled)
        self.num_steps = (self.num_steps + 1) * (1 - has_overflow) * (1 - is_doubled)


class StepGuard:
    """Decides on the device whether a step is applied, and holds the loss scale of fp16."""

    def __init__(self, loss_scale: LossScale | None, device: torch.device) -> None:
        self._loss_scale = loss_scale
        # 1 once a loss or gradient was not finite. The host learns of it a step later, so that
        # every step from then on must change nothing.
        self._has_failed = torch.zeros((), device=device)

    @property
    def scale(self) -> float | Tensor:
        """What the loss is multiplied by."""
        return 1.0 if self._loss_scale is None else self._loss_scale.scale

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale: clipping and the optimizer work on true gradients."""
        if self._loss_scale is None:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self._loss_scale.scale)

    def judge(self, loss: Tensor, gradient_norm: Tensor) -> dict[str, Tensor]:
        """Return whether the step is skipped and whether training has failed, as 0 or 1, and the
        loss scale. Both arguments are sums over all processes, so all decide alike.
        """
        is_overflow = 1.0 - torch.isfinite(gradient_norm).float()
        is_failure = 1.0 - torch.isfinite(loss).float()
        found: dict[str, Tensor] = {}
        if self._loss_scale is None:
            is_failure = torch.maximum(is_failure, is_overflow)
        else:
            # fp16 overflows now and then, which costs a step; at a scale of 1 or less it is the
            # gradient itself that is too large, and no smaller scale will help
            scale = self._loss_scale.scale
            found["loss_scale"] = scale
            is_failure = torch.maximum(is_failure, is_overflow * (scale <= 1.0).float())
            self._loss_scale.update(is_overflow)
            found["next_loss_scale"] = self._loss_scale.scale
            found["loss_scale_steps"] = self._loss_scale.num_steps
        self._has_failed = torch.maximum(self._has_failed, is_failure)
        is_skipped = torch.maximum(self._has_failed, is_overflow)
        return found | {"has_failed": self._has_failed, "is_skipped": is_skipped}
