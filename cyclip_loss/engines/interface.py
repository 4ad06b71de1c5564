"""The interface of an engine: six functions.

`eager.py` and, as `cyclip_loss.kernels`, the Triton kernels define them. The formulas and shapes
are in `eager.py`, the records in `cyclip_loss/logits.py`.
"""

from typing import Protocol

from torch import Tensor

from cyclip_loss.logits import (
    Gradients,
    Logits,
    LogSumExps,
    SavedStatistics,
)


class Engine(Protocol):
    """Where a call is computed."""

    def contrastive_lse(self, logits: Logits) -> LogSumExps:
        """Log-sum-exps of the negatives of each row and column, and the pairs' logits."""

    def contrastive_grads(
        self,
        logits: Logits,
        saved: SavedStatistics,
        needs: list[bool],
        float32_grads: bool,
    ) -> Gradients:
        """Gradients of the contrastive term."""

    def sigmoid_terms(
        self, logits: Logits, logit_bias: Tensor, weight: float, needs: list[bool]
    ) -> tuple[Tensor, Gradients]:
        """Sums of SigLIP's loss and of the gradient of the logits, (2,), and gradients."""

    def gram_matrices(
        self, image_features: Tensor, text_features: Tensor, with_cross: bool
    ) -> Tensor:
        """A, B and, if `with_cross`, C: (2 or 3, D, D)."""

    def cyclic_terms(self, grams: Tensor, weights: list[Tensor], output_dict: bool) -> list[Tensor]:
        """Both weighted penalties if `output_dict`, else [their sum]."""

    def cyclic_grads(
        self,
        image_features: Tensor,
        text_features: Tensor,
        grams: Tensor,
        grads: list[Tensor],
        weights: list[Tensor],
        size: int,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the penalties; empty tensors where not needed."""
