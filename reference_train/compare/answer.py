"""The answer: a sentence by rule, a table with paired intervals, a picture, and code to paste."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from scipy import stats

from cyclip_loss.options import as_keywords

from ..files import atomic_write, write_text
from .training import LOSSES

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

FEWEST_PAIRS, FEWEST_SEEDS = 500, 3
CLIP = "clip"
BOTH, INDEX = "R@10, both ways", "one index, top 10, both queries: as trained"
# Title -> the numbers whose mean it is. The five nearest images and the five nearest texts, merged,
# have a right answer as often as the five nearest of the other modality.
MEASURES = {
    BOTH: ("image_to_text_r10", "text_to_image_r10"),
    "image→text, R@1": ("image_to_text_r1",),
    "– R@5": ("image_to_text_r5",),
    "– R@10": ("image_to_text_r10",),
    "text→image, R@1": ("text_to_image_r1",),
    "text→image, R@5": ("text_to_image_r5",),
    "text→image, R@10": ("text_to_image_r10",),
    INDEX: ("mixed_r10", "mixed_text_query_r10"),
    "– scores standardised": ("mixed_r10_standardized", "mixed_text_query_r10_standardized"),
    "– two lists merged": ("image_to_text_r5", "text_to_image_r5"),
    "one index, image query: as trained": ("mixed_r10",),
    "image query, scores standardised": ("mixed_r10_standardized",),
    "image query, two lists merged": ("image_to_text_r5",),
    "one index, text query: as trained": ("mixed_text_query_r10",),
    "text query, scores standardised": ("mixed_text_query_r10_standardized",),
    "text query, two lists merged": ("text_to_image_r5",),
    "zero-shot top-1": ("top1",),
}
DRAWN = (BOTH, INDEX, "– scores standardised", "– two lists merged")
MARKERS = "osD"
# Loss -> its runs in the order of their seeds, each the numbers by name.
Runs = dict[str, list[dict[str, float]]]


class Interval(NamedTuple):
    """A difference to CLIP and its 95% interval, in points. Without three seeds they are NaN."""

    difference: float
    low: float
    high: float

    @property
    def range(self) -> str:
        """The interval in brackets."""
        return f"({self.low:.1f} to {self.high:.1f})".replace("-", "−")


def values(runs: Runs, loss: str, title: str) -> np.ndarray:
    """A measure of the runs of a loss, in %."""
    return np.array([100 * mean(run[name] for name in MEASURES[title]) for run in runs[loss]])


def paired(differences: Sequence[float] | np.ndarray) -> Interval:
    """The mean of the differences of each seed, with Student's interval."""
    centre, half = float(np.mean(differences)), math.nan
    if (count := len(differences)) >= FEWEST_SEEDS:
        deviation = float(np.std(differences, ddof=1))
        half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return Interval(centre, centre - half, centre + half)


def against_clip(runs: Runs, loss: str, title: str) -> Interval:
    """The difference of a loss to CLIP, paired by seed."""
    return paired(values(runs, loss, title) - values(runs, CLIP, title))


def chosen(validation: Runs) -> str:
    """The loss with the best R@10 of the validation part, CLIP's aside.

    It is chosen there, so that its interval on the test pairs is that of one comparison.
    """
    return max(
        (x for x in validation if x != CLIP), key=lambda x: values(validation, x, BOTH).mean()
    )


def sentence(runs: Runs, loss: str, pairs: int, test_pairs: int, batch_size: int) -> str:
    """What to do, by rule."""
    where = f"On these {pairs:,} pairs, in batches of {batch_size:,},"
    seeds = len(runs[CLIP])
    if test_pairs < FEWEST_PAIRS or seeds < FEWEST_SEEDS:
        return (
            f"{where} it can't be told which loss is better: there are {test_pairs:,} test pairs "
            f"and {seeds} seeds, and it takes {FEWEST_PAIRS} and {FEWEST_SEEDS}."
        )
    found, index = (against_clip(runs, loss, title) for title in (BOTH, INDEX))
    if found.low <= 0 <= found.high:
        return f"{where} no difference was shown {found.range}; keep CLIP's loss."
    size = f"{abs(found.difference):.1f} points {'more' if found.low > 0 else 'fewer'}"
    begin = f"{where} *{loss}* finds {size} {found.range} of the right texts and images in the "
    begin += "top 10 than CLIP; "
    if found.high < 0:
        return f"{begin}keep CLIP's loss."
    if index.high < 0:
        mixed = (
            f"loses {-index.difference:.1f}. Use it for retrieval; search twice for mixed results"
        )
    elif index.low > 0:
        mixed = f"finds {index.difference:.1f} more. Use it"
    else:
        mixed = "shows no difference. Use it for retrieval"
    return f"{begin}in one index as trained it {mixed}."


def table(runs: Runs) -> str:
    """A row for each measure: CLIP's mean, and the differences of the other losses."""
    others = [loss for loss in runs if loss != CLIP]
    lines = [f"| in % | CLIP | {' | '.join(others)} |", f"|---|---:|{'---:|' * len(others)}"]
    for title, names in MEASURES.items():
        if {*names} <= {*runs[CLIP][0]}:
            cells = [f"{values(runs, CLIP, title).mean():.1f}"]
            for loss in others:
                found = against_clip(runs, loss, title)
                mark = " ▲" if found.low > 0 else " ▼" if found.high < 0 else ""
                difference = f"{found.difference:+.1f}".replace("-", "−")
                mean_ = values(runs, loss, title).mean()
                cells.append(f"{mean_:.1f}, {difference} {found.range}{mark}")
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: Runs) -> Figure:
    """Points from CLIP with 95% intervals. A filled marker is a difference that is shown."""
    with plt.rc_context({"font.size": 13.5}):
        figure, axes = plt.subplots(figsize=(5, 1.5 + 1.2 * len(DRAWN)), layout="constrained")
        for y, title in enumerate(DRAWN):
            axes.text(0.01, y - 0.35, title, transform=axes.get_yaxis_transform())
            for i, loss in enumerate(runs):
                if loss == CLIP:
                    continue
                found = against_clip(runs, loss, title)
                place, is_shown = y - 0.3 + 0.2 * i, not found.low <= 0 <= found.high
                axes.plot(found[1:], [place, place], color="black")
                axes.plot(
                    found.difference,
                    place,
                    MARKERS[i % len(MARKERS)],
                    color="black",
                    markerfacecolor="black" if is_shown else "white",
                    label=None if y else loss,
                )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(ylim=(len(DRAWN) - 0.3, -0.8), yticks=[], xlabel="points from CLIP's loss")
        figure.legend(loc="outside upper left", ncols=3, fontsize="small")
    plt.close(figure)
    return figure


def write(out: Path, runs: Runs, validation: Runs, about: dict[str, Any], facts: list[str]) -> str:
    """Writes answer.md and answer.png, and returns the sentence.

    about: pairs, test_pairs and batch_size. facts: what the report says of the data, a line each.
    """
    loss = chosen(validation)
    first = sentence(runs, loss, **about)
    best = max(range(len(validation[loss])), key=lambda i: values(validation, loss, BOTH)[i])
    options = dict(LOSSES[loss])
    warmup = options.pop("lambda_warmup", None)
    raised = "" if warmup is None else f"  # λ rises from 0 over {warmup:.0%} of the steps"
    reading = (
        f"Means of {len(runs[CLIP])} seeds, and differences to CLIP with 95% intervals, paired by "
        "seed: ▲ ahead, ▼ behind, else no difference is shown. The sentence is about the loss that "
        "was best in the validation part. The intervals cover other seeds, for these test pairs."
    )
    text = f"""\
# {first}

![Points from CLIP's loss, with 95% intervals](answer.png)

{table(runs)}

{reading}

- {f"{chr(10)}- ".join(facts)}

## To train with *{loss}*

```python
loss_fn = CyCLIPLoss({as_keywords(options)}){raised}
loss = loss_fn(image_features, text_features, logit_scale, ids=ids)
```

```sh
python -m cyclip_loss.open_clip_train --penalties {loss} --same-captions ignored …
```

## To search with the best run of it

```python
from reference_train.compare.model import load
clip = load("{out.as_posix()}/{loss}-{best + 1}")
images = [Image.open(file).convert("RGB") for file in files]
gallery = normalize(clip.encode_images(images, torch.arange(len(images))), dim=-1)
print(files[(clip.encode_texts(["a red shoe"]) @ gallery.T).argmax()])
```
"""
    with atomic_write(out / "answer.png") as temporary:
        draw(runs).savefig(temporary, dpi=160, format="png")
    write_text(text, out / "answer.md")
    return first
