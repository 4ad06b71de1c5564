"""The engine in Triton: fused kernels, installed as `cyclip_loss.kernels`.

One file per function, with its formula at the top. `tiles.py` and `products.py` have what they
share, `configs.py` the tile sizes. Arguments and results are those of the functions with the same
names in `cyclip_loss.eager`, for float32, bfloat16 and float16 features.
"""

from cyclip_loss.kernels.configs import INTERPRETED
from cyclip_loss.kernels.contrastive_grads import contrastive_grads
from cyclip_loss.kernels.contrastive_lse import contrastive_lse
from cyclip_loss.kernels.cyclic_grads import cyclic_grads
from cyclip_loss.kernels.cyclic_statistics import cyclic_statistics
from cyclip_loss.kernels.cyclic_terms import cyclic_terms
from cyclip_loss.kernels.pair_terms import pair_terms

__all__ = [
    "INTERPRETED",
    "contrastive_grads",
    "contrastive_lse",
    "cyclic_grads",
    "cyclic_statistics",
    "cyclic_terms",
    "pair_terms",
]
