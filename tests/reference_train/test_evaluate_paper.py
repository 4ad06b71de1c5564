"""The paper's published numbers, and its superclasses."""

import csv
from collections import Counter
from pathlib import Path

import pytest
import torch
from open_clip import IMAGENET_CLASSNAMES

from reference_train.evaluate import datasets, paper, report
from reference_train.evaluate.datasets import Images

# Read from the sources: dataset, metric, source, pairs, model, percent.
CELLS = """
cifar10          top1           paper        -        CyCLIP    51.45
cifar10          linear_probe   May 2022     -        CLIP      78.27
cifar10          consistency_5  paper        -        CyCLIP    52.30
cifar100         linear_probe   April 2022   -        CLIP      54.76
cifar100         linear_probe   April 2022   -        C-CyCLIP  56.06
cifar100         fine           paper        -        C-CyCLIP  49.19
cifar100         coarse_top3    paper        -        I-CyCLIP  63.30
imagenet1k       top1           paper        -        CLIP      20.03
imagenet1k       consistency_10 paper        -        CyCLIP    23.94
imagenet1k       coarse         paper        -        CyCLIP    56.79
imagenet1k       top1           data_size    500000   CLIP      5.03
imagenet1k       top1           data_size    3000000  CyCLIP    18.68
imagenetv2       fine_top2      paper        -        I-CyCLIP  45.00
imagenetv2       top1           reproduced   -        CyCLIP    15.25
imagenet-sketch  coarse         paper        -        C-CyCLIP  43.02
imagenet-a       fine           paper        -        CLIP      40.09
imagenet-a       top1           data_size    1000000  CyCLIP    2.57
imagenet-r       coarse_top2    paper        -        CLIP      52.77
svhn             linear_probe   May 2022     -        CyCLIP    48.16
pets             linear_probe   April 2022   -        C-CyCLIP  57.89
"""

with (paper.FOLDER / "published.csv").open(encoding="utf-8", newline="") as file:
    ROWS = list(csv.DictReader(file))


def test_the_csv_has_the_numbers_that_the_sources_print() -> None:
    for line in CELLS.replace(" 2022", "_2022").strip().splitlines():
        dataset, metric, source, pairs, model, number = line.split()
        key = [dataset, metric, source.replace("_", " "), pairs.strip("-")]
        [row] = [row for row in ROWS if [*row.values()][:4] == key]
        assert float(row[model.lower()]) == float(number), line


def test_each_published_number_has_a_source_and_no_incomparable_one_is_listed() -> None:
    assert max(Counter(tuple(row.values())[:4] for row in ROWS).values()) == 1
    assert all(row["where"] and row["mark"] in paper.MARKS for row in ROWS)
    assert {row["source"] for row in ROWS} == {*paper.SOURCES, paper.DATA_SIZE}
    probes = {(row["data_set"], row["source"]) for row in ROWS if row["metric"] == "linear_probe"}
    # These were fitted on test images, or on an unknown part of the training images.
    assert ("cifar100", "May 2022") not in probes
    assert {dataset for dataset, _ in probes} == {*paper.PROBE_SETS, "cifar10", "cifar100"}


def test_published_numbers_of_a_dataset_have_the_titles_of_our_losses() -> None:
    [top1] = [x for x in paper.published("cifar10") if (x.metric, x.source) == ("top1", "paper")]
    assert top1.percent == {"CLIP": 46.54, "CyCLIP": 51.45}
    assert top1.mark == "q"
    assert not [x for x in paper.published("imagenet1k") if x.source == paper.DATA_SIZE]
    assert paper.published("own") == []


def test_published_probes_are_hidden_if_ours_was_fitted_on_other_images() -> None:
    """A note says why. They are not hidden if the authors' split is not known."""
    base = {"classes": {"class": 47}, "images": 1880, "train_images": 3760}
    shown, notes = report.comparable("dtd", base, ["linear_probe"])
    assert [row.source for row in shown] == ["May 2022", "April 2022"]
    assert not notes
    shown, [note] = report.comparable("dtd", {**base, "train_images": 1880}, ["linear_probe"])
    assert not shown
    assert "fitted on 1,880 images, the authors' on 3,760" in note
    shown, notes = report.comparable("caltech101", base, ["linear_probe"])
    assert len(shown) == len(notes) == 2


def test_imagenets_67_superclasses_hold_each_class_once() -> None:
    superclass = paper.imagenet_superclasses()
    assert superclass.unique().tolist() == [*range(67)]
    for one, other in (("brown bear", "giant panda"), ("axolotl", "smooth newt")):
        numbers = [IMAGENET_CLASSNAMES.index(name) for name in (one, other)]
        assert len(set(superclass[numbers].tolist())) == 1, one
    assert superclass[836] != superclass[837]  # both are called "sunglasses"


@pytest.mark.parametrize(
    ("name", "classes", "superclasses"),
    [("imagenet1k", 1000, 67), ("imagenet-a", 200, 59), ("imagenet-r", 200, 49)],
)
def test_superclasses_are_cut_to_the_classes_of_a_dataset(
    name: str, classes: int, superclasses: int, tmp_path: Path
) -> None:
    """The numbers of superclasses are those in the authors' histograms."""
    images = Images(torch.zeros(1, 3, 1, 1)), torch.tensor([0])
    names = [str(i) for i in range(classes)]
    found = datasets.classification(tmp_path, name, images, names, None).classes[""].superclass
    assert (len(found), len(set(found.tolist()))) == (classes, superclasses)
