"""Each row of "Coming from your own loss" in `docs/lambda.md` gives the loss that it replaces."""

import re

import pytest
import torch
from inputs import pairs
from processes import ROOT

from cyclip_loss import CyclicPenalty
from cyclip_loss import CyCLIPLoss as CyCLIPLoss
from cyclip_loss.reference import contrastive_loss

SECTION = (ROOT / "docs/lambda.md").read_text().partition("## Coming from your own loss\n")[2]
ROWS = re.findall(r"^\| \w[^|]* \| `(.*)` \|$", SECTION, re.MULTILINE)
# What the rows take as given. N pairs are on three ranks.
N, n, w, scale, temperature = 12, 4, 0.7, 10.0, 0.07
cylambda1, cylambda2, in_modal_weight, cross_modal_weight = 0.3, 0.2, 0.4, 0.6
images, texts = pairs(N, 5, device="cpu")

IN_GAPS = (images @ images.T - texts @ texts.T).square()
CROSS_GAPS = (images @ texts.T - texts @ images.T).square()
IN_GAP, CROSS_GAP = IN_GAPS.mean(), CROSS_GAPS.mean()
CLIP = contrastive_loss(images, texts, scale)
# The losses that the rows replace, in float64.
THEIRS = [
    CLIP + cylambda1 * N * IN_GAP + cylambda2 * N * CROSS_GAP,
    CLIP + w * (IN_GAP + CROSS_GAP),
    CLIP + w * n * (IN_GAP + CROSS_GAP),
    contrastive_loss(images, texts, 1 / temperature) + 0.25 * N * (IN_GAP + CROSS_GAP),
    w * IN_GAPS.sum() / (N * (N - 1)),  # the diagonal is 0
    CLIP + in_modal_weight * CROSS_GAP + cross_modal_weight * IN_GAP,
]


@pytest.mark.parametrize(("code", "theirs"), [*zip(ROWS, THEIRS, strict=True)])
def test_the_code_in_each_row_gives_the_other_loss(code, theirs):
    found = eval(code)
    if isinstance(found, torch.nn.Module):
        found = found(images, texts, *[] if type(found) is CyclicPenalty else [scale])
    torch.testing.assert_close(found, theirs, rtol=1e-13, atol=0)
