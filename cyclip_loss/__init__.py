"""CyCLIP's loss for PyTorch: exact, in O(N D) memory, a drop-in for `open_clip.ClipLoss`."""

from pathlib import Path

from cyclip_loss import reference
from cyclip_loss.functional import caption_ids, cyclic_penalty, cyclip_loss
from cyclip_loss.logsumexp import ContrastiveLogSumExp, contrastive_logsumexp
from cyclip_loss.loss import CyclicPenalty, CyCLIPLoss
from cyclip_loss.metrics import consistency_metrics
from cyclip_loss.usage_warnings import CyCLIPWarning
from cyclip_loss.with_penalty import WithCyclicPenalty

__version__ = "0.4.0"
__all__ = [
    "ContrastiveLogSumExp",
    "CyCLIPLoss",
    "CyCLIPWarning",
    "CyclicPenalty",
    "WithCyclicPenalty",
    "caption_ids",
    "consistency_metrics",
    "contrastive_logsumexp",
    "cyclic_penalty",
    "cyclip_loss",
    "reference",
]

# An installation has the kernels in this folder. A checkout has them next to it, and Python started
# in the checkout imports the package from there.
_here = Path(__file__).parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))
