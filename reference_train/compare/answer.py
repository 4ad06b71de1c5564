"""The answer: a sentence by rule, a table with paired intervals, a picture, and code to paste."""

import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib
from scipy import stats

from cyclip_loss.options import PRESETS, as_keywords

from ..files import atomic_write, write_text
from .training import SETTINGS

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt

FEWEST_PAIRS, FEWEST_SEEDS = 500, 3
CLIP = "clip"
MEASURES = {
    "r10": "R@10, both ways",
    "image_to_text_r1": "image→text, R@1",
    "image_to_text_r5": "– R@5",
    "image_to_text_r10": "– R@10",
    "text_to_image_r1": "text→image, R@1",
    "text_to_image_r5": "– R@5",
    "text_to_image_r10": "– R@10",
    "mixed_r10": "one index, top 10, image query: as trained",
    "mixed_r10_standardized": "– scores standardised",
    # The five nearest images and the five nearest texts: R@5 of the other modality.
    "two_lists_image_query": "– two lists merged",
    "mixed_text_query_r10": "one index, top 10, text query: as trained",
    "mixed_text_query_r10_standardized": "– scores standardised",
    "two_lists_text_query": "– two lists merged",
    "top1": "zero-shot top-1",
}
SHOWN = {  # in the picture
    "r10": "R@10, both ways",
    "one_index": "one index, as trained",
    "one_index_standardized": "– scores standardised",
    "two_lists": "– two lists merged",
}
MARKERS = "osD^v"
Runs = dict[str, dict[int, dict[str, float]]]  # loss -> seed -> numbers


class Interval(NamedTuple):
    """A difference to CLIP and its 95% interval, in points. Without three seeds they are NaN."""

    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.difference:+.1f} ({self.low:.1f} to {self.high:.1f})".replace("-", "−")


def paired(differences: list[float]) -> Interval:
    """The mean of the differences of each seed, with Student's interval."""
    if len(differences) < FEWEST_SEEDS:
        return Interval(mean(differences), math.nan, math.nan)
    half = stats.t.ppf(0.975, len(differences) - 1) * stdev(differences) / len(differences) ** 0.5
    return Interval(mean(differences), mean(differences) - half, mean(differences) + half)


def compare(runs: Runs, loss: str, measure: str) -> Interval:
    """A loss against CLIP, paired by seed."""
    return paired([100 * (runs[loss][i][measure] - runs[CLIP][i][measure]) for i in runs[CLIP]])


def chosen(validation: Runs) -> str:
    """The loss that is ahead of CLIP in the validation part's R@10, by most; else the least behind.

    It is chosen there, so that its interval on the test pairs is that of one comparison.
    """
    others = [loss for loss in validation if loss != CLIP]
    return max(others, key=lambda loss: compare(validation, loss, "r10").difference)


def sentence(runs: Runs, loss: str, pairs: int, test_pairs: int, batch_size: int) -> str:
    """What to do, by rule."""
    where = f"On these {pairs:,} pairs, in batches of {batch_size:,},"
    if test_pairs < FEWEST_PAIRS or len(runs[CLIP]) < FEWEST_SEEDS:
        return (
            f"{where} it can't be told which loss is better: there are {test_pairs:,} test pairs "
            f"and {len(runs[CLIP])} seeds, and it takes {FEWEST_PAIRS} and {FEWEST_SEEDS}."
        )
    found, index = (compare(runs, loss, measure) for measure in ("r10", "one_index"))
    interval = f"({found.low:.1f} to {found.high:.1f})".replace("-", "−")
    if found.low > 0:
        mixed, advice = "no difference is shown", "Use it for retrieval"
        if index.low > 0:
            mixed = f"it finds {index.difference:.1f} points more"
        elif index.high < 0:
            mixed = f"it loses {-index.difference:.1f}"
            advice += "; search twice for mixed results"
        return (
            f"{where} *{loss}* finds {found.difference:.1f} points more {interval} of the right "
            f"texts and images in the top 10 than CLIP; in one index as trained {mixed}. {advice}."
        )
    if found.high < 0:
        return (
            f"{where} *{loss}* finds {-found.difference:.1f} points fewer of the right texts and "
            f"images in the top 10 than CLIP {interval}; keep CLIP's loss."
        )
    return f"{where} no difference was shown {interval}; keep CLIP's loss."


def table(runs: Runs) -> str:
    """A row for each measure: CLIP's mean, and the differences of the other losses."""
    others = [loss for loss in runs if loss != CLIP]
    lines = [f"| in % | CLIP | {' | '.join(others)} |", "|---|---:" + "|---:" * len(others) + "|"]
    measures = {x for numbers in runs[CLIP].values() for x in numbers}
    for measure, title in MEASURES.items():
        if measure in measures:
            clip = 100 * mean(numbers[measure] for numbers in runs[CLIP].values())
            cells = []
            for loss in others:
                found = compare(runs, loss, measure)
                mark = " ▲" * (found.low > 0) + " ▼" * (found.high < 0)
                cells.append(f"{clip + found.difference:.1f}, {found}{mark}")
            lines.append(f"| {title} | {clip:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: Runs, file: Path) -> None:
    """Points from CLIP with 95% intervals. A filled marker is a difference that is shown."""
    others = [loss for loss in runs if loss != CLIP]
    with plt.rc_context({"font.size": 13.5}):
        figure, axes = plt.subplots(figsize=(5, 1.6 + 1.1 * len(SHOWN)), layout="constrained")
        for y, (measure, title) in enumerate(SHOWN.items()):
            axes.text(0.01, y - 0.42, title, transform=axes.get_yaxis_transform())
            for i, loss in enumerate(others):
                found, place = compare(runs, loss, measure), y - 0.12 + 0.5 * i / len(others)
                axes.plot([found.low, found.high], [place, place], color="black")
                is_shown = found.low > 0 or found.high < 0
                axes.plot(
                    found.difference,
                    place,
                    MARKERS[i % len(MARKERS)],
                    color="black",
                    markerfacecolor="black" if is_shown else "white",
                    label=None if y else loss,
                )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(
            ylim=(len(SHOWN) - 0.3, -0.7), yticks=[], xlabel="points from CLIP's, 95% intervals"
        )
        figure.legend(loc="outside upper left", ncols=3, fontsize="small")
        with atomic_write(file) as temporary:
            figure.savefig(temporary, dpi=160, format="png")
        plt.close(figure)


def code(loss: str) -> str:
    """How to train with a loss: PyTorch, and OpenCLIP's flags."""
    name, preset = SETTINGS[loss]
    options = dict(PRESETS[preset])
    warmup = options.pop("lambda_warmup", None)
    weights = {
        "clip": {"lambda_inmodal": 0, "lambda_crossmodal": 0},
        "i-cyclip": {"lambda_crossmodal": 0},
        "c-cyclip": {"lambda_inmodal": 0},
    }.get(name, {})
    lines = [f"loss_fn = CyCLIPLoss({as_keywords(weights | options)})"]
    if warmup:
        lines.append(f"# Raise both lambdas from 0 over the first {warmup:.0%} of the steps.")
    flags = " ".join(
        [*(["--penalties", preset] if name != "clip" else []), "--same-captions ignored"]
    )
    return "\n".join(
        [
            "```python",
            *lines,
            "loss = loss_fn(image_features, text_features, logit_scale, ids=ids)",
            "```",
            "",
            "```sh",
            f"python -m cyclip_loss.open_clip_train … {flags}",
            "```",
        ]
    )


def write(out: Path, runs: Runs, validation: Runs, about: dict[str, Any]) -> str:
    """Writes answer.md and answer.png, and returns the sentence.

    about: pairs, test_pairs, batch_size, facts (a line each), and best: the run to search with.
    """
    loss = chosen(validation)
    sizes = about["pairs"], about["test_pairs"], about["batch_size"]
    first = sentence(runs, loss, *sizes)
    shown = [loss] if "keep CLIP's loss" not in first and "can't be told" not in first else []
    search = f"""```python
from reference_train.compare.model import Search

search = Search("{out.as_posix()}/{about["best"]}")
gallery = search.encode_images(["a.jpg", "b.jpg"])
print((search.encode_texts(["a red shoe"]) @ gallery.T).argmax())
```"""
    parts = [
        f"# {first}",
        "![Points from CLIP's loss, with 95% intervals](answer.png)",
        table(runs),
        "Means, and differences to CLIP with their 95% intervals, paired by seed; ▲ ahead, ▼ behind, "
        "else no difference is shown. The intervals are those of other seeds on these test pairs.",
        "\n".join(f"- {fact}" for fact in about["facts"]),
        "## Train with it",
        *(code(x) for x in shown or [CLIP]),
        f"## Search with `{about['best']}`",
        search,
    ]
    draw(runs, out / "answer.png")
    write_text("\n\n".join(parts) + "\n", out / "answer.md")
    return first
