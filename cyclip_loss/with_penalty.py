"""`WithCyclicPenalty`: any loss of image and text features, plus the two cyclic penalties."""

import inspect
from typing import Any

from torch import nn

from cyclip_loss.loss import CyclicPenalty


class WithCyclicPenalty(CyclicPenalty):
    """Another loss plus the cyclic penalties: `open_clip`'s SigLipLoss, CoCaLoss, or one's own.

    Call it as the loss that it wraps, by position or by keyword. It returns what that loss returns,
    with the penalties: a dict gets `inmodal_cyclic_loss` and `crossmodal_cyclic_loss`, weighted, so
    that the values still sum to the loss; a tuple of terms gets the two at its end; of a tensor,
    the sum. Attributes that it does not have itself are those of the wrapped loss.

    Args:
        loss: a module whose `forward` takes `image_features` and `text_features`, (N, D), rows of
            unit length. It stays reachable as `.loss`.
        lambda_inmodal, lambda_crossmodal, reference_batch_size, process_group, distributed, impl:
            as in `CyclicPenalty`, and so are the semantics over ranks, whatever the wrapped loss
            does there.

    Raises:
        TypeError: `loss` is no module, or its `forward` takes no `image_features` or no
            `text_features`; else as `CyclicPenalty`.
    """

    def __init__(
        self,
        loss: nn.Module,
        lambda_inmodal: float = 0.25,
        lambda_crossmodal: float = 0.25,
        **options: Any,
    ) -> None:
        super().__init__(lambda_inmodal, lambda_crossmodal, **options)
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a module, got {loss!r}")
        parameters = list(inspect.signature(loss.forward).parameters)
        for name in ("image_features", "text_features"):
            if name not in parameters:
                raise TypeError(f"{type(loss).__name__}.forward takes no {name}: {parameters}")
        self.loss = loss
        self._image_at = parameters.index("image_features")
        self._text_at = parameters.index("text_features")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped loss returns for these arguments, with the penalties."""
        terms = self.loss(*args, **kwargs)
        image = args[self._image_at] if self._image_at < len(args) else kwargs["image_features"]
        text = args[self._text_at] if self._text_at < len(args) else kwargs["text_features"]
        if not isinstance(terms, (dict, tuple)):
            return terms + super().forward(image, text)
        penalties = super().forward(image, text, output_dict=True)
        assert isinstance(penalties, dict)
        return terms | penalties if isinstance(terms, dict) else (*terms, *penalties.values())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("loss"), name)
