"""The engine in Triton: fused kernels, installed as `cyclip_loss.kernels`.

One file per function, with its formula at the top. `tiles.py` has what they share, `launch.py` what
their launches share, `configs.py` the tile sizes. Arguments and results are those of the functions
with the same names in `cyclip_loss.eager`, for float32, bfloat16 and float16 features.
"""

from cyclip_loss.kernels.configs import INTERPRETED
from cyclip_loss.kernels.grams import cyclic_statistics
from cyclip_loss.kernels.logit_grads import contrastive_grads
from cyclip_loss.kernels.lse import contrastive_lse
from cyclip_loss.kernels.pairs import pair_terms
from cyclip_loss.kernels.penalties import cyclic_terms
from cyclip_loss.kernels.penalty_grads import cyclic_grads

__all__ = [
    "INTERPRETED",
    "contrastive_grads",
    "contrastive_lse",
    "cyclic_grads",
    "cyclic_statistics",
    "cyclic_terms",
    "pair_terms",
]
