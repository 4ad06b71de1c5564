"""The engine in Triton: the functions of `kernels/`, installed as `cyclip_loss.kernels`.

One file per function of an engine, with its formula at the top. `tiles.py` has what they share, and
`configs.py` the tile sizes. Arguments and results are those of the functions with the same names in
`eager.py`, for float32, bfloat16 and float16 features.

`kernels/` has no `__init__.py`. With one, Python would import it in a clone in place of Hugging
Face's package `kernels`, which transformers imports. A folder without it gives way to a package.
"""

from cyclip_loss.kernels.configs import INTERPRETED, platform_of
from cyclip_loss.kernels.contrastive_grads import contrastive_grads
from cyclip_loss.kernels.contrastive_lse import contrastive_lse
from cyclip_loss.kernels.cyclic_grads import cyclic_grads
from cyclip_loss.kernels.elementwise_terms import elementwise_terms
from cyclip_loss.kernels.gram_matrices import MAX_D, gram_matrices

__all__ = [
    "INTERPRETED",
    "MAX_D",
    "contrastive_grads",
    "contrastive_lse",
    "cyclic_grads",
    "elementwise_terms",
    "gram_matrices",
    "platform_of",
]
