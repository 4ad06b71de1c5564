"""CLIP's, CyCLIP's and SigLIP's losses for PyTorch: exact, in O(N D) memory."""

from cyclip_loss import reference
from cyclip_loss.cached_backward import cached_backward
from cyclip_loss.engines import engine_of
from cyclip_loss.inputs import caption_ids
from cyclip_loss.logsumexp import ContrastiveLogSumExp, contrastive_logsumexp
from cyclip_loss.loss import ClipLoss, CyclicPenalty, CyCLIPLoss, WithCyclicPenalty
from cyclip_loss.metrics import consistency_metrics
from cyclip_loss.siglip import CySigLIPLoss, SigLipLoss
from cyclip_loss.usage_warnings import CyCLIPWarning

__version__ = "0.5.0"
__all__ = [
    "ClipLoss",
    "ContrastiveLogSumExp",
    "CyCLIPLoss",
    "CyCLIPWarning",
    "CySigLIPLoss",
    "CyclicPenalty",
    "SigLipLoss",
    "WithCyclicPenalty",
    "cached_backward",
    "caption_ids",
    "consistency_metrics",
    "contrastive_logsumexp",
    "engine_of",
    "reference",
]
