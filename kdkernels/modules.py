"""The loss as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .functional import check_options, kd_loss


class KDLoss(nn.Module):
    """`kd_loss` with its options bound, as an `nn.Module` without parameters.

    Args:
        **options: The keyword arguments of `kd_loss`, except the tensors `mask`, `token_weights` and
            `num_items`, which are given per call.

    Raises:
        TypeError: An option that `kd_loss` doesn't have, or one of the wrong type.
        ValueError: An option out of range.

    Example:
        >>> criterion = KDLoss(divergence="reverse_kl", temperature=2.0)
        >>> z, v = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
        >>> criterion(z, v).backward()
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        check_options(options)
        self.options = options

    def forward(
        self,
        student: Any,
        teacher: Any,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: Tensor | float | None = None,
    ) -> Tensor:
        """The loss of `kd_loss` under the bound options."""
        return kd_loss(
            student,
            teacher,
            labels,
            mask=mask,
            token_weights=token_weights,
            num_items=num_items,
            **self.options,
        )

    def extra_repr(self) -> str:
        """The bound options."""
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
