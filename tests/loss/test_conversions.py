"""Each row of "Coming from your own loss" in `docs/lambda.md` gives the loss that it replaces."""

import re
from pathlib import Path

import pytest
import torch
from inputs import pairs
from torch.nn.functional import normalize

from cyclip_loss import CyclicPenalty, CyCLIPLoss
from cyclip_loss.reference import contrastive_loss

PAGE = Path(__file__).parents[2] / "docs" / "lambda.md"
SECTION = PAGE.read_text().partition("## Coming from your own loss\n")[2]
# The code in each row, by the text before it.
CODE = dict(re.findall(r"^\| (\w[^|]*) \| `(.*)` \|$", SECTION, re.MULTILINE))

N, RANKS = 12, 3
I, T = pairs(N, 5, device="cpu")  # noqa: E741
SCALE, WEIGHT = 10.0, 0.7
IN_GAPS = (I @ I.T - T @ T.T).square()
CROSS_GAPS = (I @ T.T - T @ I.T).square()
OFF_DIAGONAL = ~torch.eye(N, dtype=torch.bool, device="cpu")
CLIP = contrastive_loss(I, T, SCALE)
# The losses that the rows replace, in float64, by the rows' first words.
THEIRS = {
    "The paper's": CLIP + 0.3 * N * IN_GAPS.mean() + 0.2 * N * CROSS_GAPS.mean(),
    "The *mean*": CLIP + WEIGHT * (IN_GAPS.mean() + CROSS_GAPS.mean()),
    "The local": CLIP + WEIGHT * (N // RANKS) * (IN_GAPS + CROSS_GAPS).mean(),
    "A temperature": contrastive_loss(I, T, 1 / 0.07) + 0.25 * N * (IN_GAPS + CROSS_GAPS).mean(),
    "It normalises": CLIP + 0.25 * N * (IN_GAPS + CROSS_GAPS).mean(),
    "x-clip": WEIGHT * IN_GAPS[OFF_DIAGONAL].mean(),
    "TBPS-CLIP": 0.1 * (0.25 * IN_GAPS.mean() + 0.25 * CROSS_GAPS.mean()),
    "axlearn": CLIP + 0.4 * CROSS_GAPS.mean() + 0.6 * IN_GAPS.mean(),
}


@pytest.mark.parametrize("words", THEIRS)
def test_the_code_in_each_row_gives_the_other_loss(words: str) -> None:
    assert len(CODE) == len(THEIRS)
    [code] = [code for row, code in CODE.items() if row.startswith(words)]
    lengths = torch.ones(N, 1, dtype=torch.float64, device="cpu")
    if words == "It normalises":
        lengths = lengths.cumsum(0)
    names = dict(N=N, n=N // RANKS, w=WEIGHT, cylambda1=0.3, cylambda2=0.2, temperature=0.07)
    names |= dict(scale=SCALE, in_modal_weight=0.4, cross_modal_weight=0.6, loss_fn=CyCLIPLoss())
    names |= dict(images=lengths * I, texts=T / lengths, normalize=normalize)
    found = eval(code, {**globals(), **names})
    if isinstance(found, torch.nn.Module):
        found = found(I, T) if isinstance(found, CyclicPenalty) else found(I, T, SCALE)
    torch.testing.assert_close(found, THEIRS[words], rtol=1e-13, atol=0)
