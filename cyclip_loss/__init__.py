"""CyCLIP's loss for PyTorch: exact, memory-lean, a drop-in for `open_clip.ClipLoss`."""

from pathlib import Path

from cyclip_loss import reference
from cyclip_loss.functional import caption_ids, cyclic_penalty, cyclip_loss
from cyclip_loss.loss import CyclicPenalty, CyCLIPLoss
from cyclip_loss.metrics import consistency_metrics
from cyclip_loss.options import CyCLIPWarning
from cyclip_loss.with_penalty import WithCyclicPenalty

__version__ = "0.3.0"
__all__ = [
    "CyCLIPLoss",
    "CyCLIPWarning",
    "CyclicPenalty",
    "WithCyclicPenalty",
    "caption_ids",
    "consistency_metrics",
    "cyclic_penalty",
    "cyclip_loss",
    "reference",
]

# Installed, the kernels are in this folder. In a checkout they lie beside it, and a program that
# runs there imports the checkout.
_here = Path(__file__).parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))
