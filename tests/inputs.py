"""Features to test with: every dtype, layout and geometry that the loss has to take.

Numbers are drawn on the CPU, so that every device is given the same, and then moved.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Device = torch.device | str
LAYOUTS = ["contiguous", "transposed", "every other column", "every other row", "expanded"]
# Whose rows are contiguous, but not where a kernel would have them.
UNALIGNED = ["rows 8 elements wider", "8 bytes off"]
# Distance of the pairs from alignment; None: images and texts are independent.
DISTANCES = [None, 0.3, 0.03, 0.003, 0.0]


@dataclass
class Case:
    """One input of the loss. Written so that hypothesis prints all that makes it."""

    n: int
    d: int
    dtype: torch.dtype = torch.float32
    distance: float | None = None
    anti_aligned: bool = False
    norm: float = 1.0
    logit_scale: float = 10.0
    image_layout: str = "contiguous"
    text_layout: str = "contiguous"
    lambdas: tuple[float, float] = (0.25, 0.25)
    strip_rows: int | None = None
    seed: int = 0

    def inputs(self, device: Device) -> tuple[Tensor, Tensor, Tensor]:
        """Image and text features, and the logit scale: 0-dim, of the loss's dtype, exact in it."""
        image, text = pairs(
            self.n, self.d, self.distance, self.anti_aligned, self.norm, self.seed, device=device
        )
        return (
            lay_out(image.to(self.dtype), self.image_layout),
            lay_out(text.to(self.dtype), self.text_layout),
            torch.tensor(self.logit_scale, dtype=loss_dtype(self.dtype), device=device),
        )


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def pairs(
    n: int,
    d: int,
    distance: float | None = None,
    anti_aligned: bool = False,
    norm: float = 1.0,
    seed: int = 0,
    *,
    device: Device,
) -> tuple[Tensor, Tensor]:
    """Random rows of the given norm, (n, d) twice, in float64."""
    image, text = (F.normalize(rows, dim=1) for rows in normal(2, n, d, seed=seed, device="cpu"))
    if distance is not None:
        text = F.normalize(image + distance * text, dim=1)
    return (norm * image).to(device), (norm * (-text if anti_aligned else text)).to(device)


def normal(*shape: int, seed: int = 0, device: Device) -> Tensor:
    """Normally distributed numbers in float64."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values in other strides; "expanded" repeats the first row with stride 0."""
    n, d = values.shape
    if layout == "transposed":
        return values.T.contiguous().T
    if layout == "every other column":
        return values.new_full((n, 2 * d), torch.nan)[:, ::2].copy_(values)
    if layout == "every other row":
        return values.new_full((2 * n + 1, d), torch.nan)[1::2].copy_(values)
    if layout == "expanded":
        return values[:1].expand(n, d)
    if layout == "rows 8 elements wider":
        return values.new_full((n, d + 8), torch.nan)[:, :d].copy_(values)
    if layout == "8 bytes off":
        offset = 8 // values.element_size()
        return values.new_full((n * d + offset,), torch.nan)[offset:].view(n, d).copy_(values)
    return values


# Scales that float32 holds exactly, so that the float64 oracle sees the same number.
LOGIT_SCALES = st.one_of(
    st.floats(0.01, 100.0).map(lambda scale: torch.tensor(scale, device="cpu").item()),
    st.sampled_from([1.0, 14.25, 100.0]),
)
LAMBDAS = st.sampled_from([(0.25, 0.25), (0.25, 0.0), (0.0, 0.25), (1.0, 0.125), (0.5, 8.0)])


@st.composite
def cases(draw: st.DrawFn, max_n: int = 90, max_d: int = 90) -> Case:
    return Case(
        n=draw(st.one_of(st.integers(1, 5), st.integers(1, max_n))),
        d=draw(st.one_of(st.integers(1, 5), st.integers(1, max_d))),
        dtype=draw(st.sampled_from(DTYPES)),
        distance=draw(st.sampled_from(DISTANCES)),
        anti_aligned=draw(st.booleans()),
        norm=draw(st.sampled_from([1.0, 1.0, 2.5])),
        logit_scale=draw(LOGIT_SCALES),
        image_layout=draw(st.sampled_from(LAYOUTS)),
        text_layout=draw(st.sampled_from(LAYOUTS)),
        lambdas=draw(LAMBDAS),
        strip_rows=draw(st.sampled_from([None, 1, 7, 32])),
        seed=draw(st.integers(0, 2**31)),
    )
