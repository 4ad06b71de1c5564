"""The engine in Triton: fused kernels, installed as `cyclip_loss.kernels`.

One file per function, with its formula at the top. `tiles.py` has what they share on the GPU,
`launch.py` what their launches share, `configs.py` the tile sizes. Arguments and results are those
of the functions with the same names in `cyclip_loss.eager`, for float32, bfloat16 and float16
features. A function whose name ends in `_loops` says which loops on the host a call would run more
than once, for `cyclip_loss.verification`.
"""

from cyclip_loss.kernels.configs import INTERPRETED
from cyclip_loss.kernels.contrastive_grads import contrastive_grads, contrastive_grads_loops
from cyclip_loss.kernels.contrastive_lse import contrastive_lse, contrastive_lse_loops
from cyclip_loss.kernels.cyclic_grads import cyclic_grads
from cyclip_loss.kernels.cyclic_terms import cyclic_terms
from cyclip_loss.kernels.gram_matrices import MAX_D, gram_matrices, gram_matrices_loops
from cyclip_loss.kernels.pair_terms import pair_terms

__all__ = [
    "INTERPRETED",
    "MAX_D",
    "contrastive_grads",
    "contrastive_grads_loops",
    "contrastive_lse",
    "contrastive_lse_loops",
    "cyclic_grads",
    "cyclic_terms",
    "gram_matrices",
    "gram_matrices_loops",
    "pair_terms",
]
