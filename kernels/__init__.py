"""The engine in Triton: fused kernels, installed as `cyclip_loss.kernels`.

One file per function, with the formula it computes at its top; `tiles.py` is what they share,
`configs.py` the tile sizes. The functions take what those of `cyclip_loss.eager` take, and return
the same, for float32, bfloat16 and float16 features.
"""

from cyclip_loss.eager import pair_terms
from cyclip_loss.kernels.configs import INTERPRETED
from cyclip_loss.kernels.contrastive_grads import contrastive_grads
from cyclip_loss.kernels.contrastive_lse import contrastive_lse
from cyclip_loss.kernels.cyclic_grads import cyclic_grads
from cyclip_loss.kernels.cyclic_statistics import cyclic_statistics

__all__ = [
    "INTERPRETED",
    "contrastive_grads",
    "contrastive_lse",
    "cyclic_grads",
    "cyclic_statistics",
    "pair_terms",
]
