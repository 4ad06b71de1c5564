"""The paper's tables: published numbers, ImageNet's superclasses, runs on several data sizes."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from open_clip import IMAGENET_CLASSNAMES

from reference_train.evaluate import imagenet, paper, pictures, published, report, scaling, table
from reference_train.evaluate.classification import classification_set
from reference_train.evaluate.datasets import Images

# Read from the sources: data set, metric, source, pairs, model, percent.
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


@pytest.mark.parametrize("line", CELLS.replace(" 2022", "_2022").strip().splitlines())
def test_the_csv_has_the_number_that_its_source_prints(line: str) -> None:
    data_set, metric, source, pairs, model, number = line.split()
    key = (data_set, metric, source.replace("_", " "), None if pairs == "-" else int(pairs))
    (row,) = [row for row in published.read() if row[:4] == key]
    assert row.percent[model] == float(number)


def test_each_published_number_has_a_source_and_no_incomparable_one_is_listed() -> None:
    rows = published.read()
    assert max(Counter(row[:4] for row in rows).values()) == 1
    assert all(row.where and row.mark in published.MARKS for row in rows)
    assert {row.source for row in rows} == {*published.SOURCES, published.DATA_SIZE}
    assert {row.data_set for row in rows} == {*paper.SETS}
    probes = {(row.data_set, row.source) for row in rows if row.metric == "linear_probe"}
    # These were fitted on test images, or on an unknown part of the training images.
    assert ("cifar100", "May 2022") not in probes
    assert not any(data_set == "imagenet1k" for data_set, _ in probes)
    assert {d for d, _ in probes} == {*paper.PROBE_SETS, "cifar10", "cifar100"}


def test_published_probes_are_hidden_if_ours_was_fitted_on_other_images() -> None:
    """A note says why. They are not hidden if the authors' split is not known."""
    base = {"classes": {"class": 47}, "images": 1880, "train_images": 3760}
    shown, notes = table.comparable("dtd", base, ["linear_probe"])
    assert [row.source for row in shown] == ["May 2022", "April 2022"]
    assert not notes
    shown, notes = table.comparable("dtd", {**base, "train_images": 1880}, ["linear_probe"])
    assert not shown
    reason = "the probe is fitted on 1,880 images, the authors' on 3,760"
    assert notes == [f"dtd: published numbers are not shown: {reason}."]
    shown, notes = table.comparable("caltech101", base, ["linear_probe"])
    assert len(shown) == len(notes) == 2
    assert "May 2022: probably the mean over classes, not accuracy; the split is not" in notes[0]


def test_imagenets_67_superclasses_hold_each_class_once() -> None:
    groups = imagenet.superclasses()
    assert len(groups) == 67
    assert sorted(n for members in groups.values() for n in members) == [*range(1000)]
    for name, classes in {
        "bear": ("brown bear", "giant panda"),
        "salamander": ("axolotl",),
        "dinosaur": ("triceratops",),
        "technology": ("barometer",),
    }.items():
        for class_name in classes:
            assert IMAGENET_CLASSNAMES.index(class_name) in groups[name]
    assert 836 in groups["clothing"]  # as the authors have them: both are called "sunglasses"
    assert 837 in groups["tool"]


@pytest.mark.parametrize(
    ("name", "classes", "superclasses"),
    [
        ("imagenet1k", 1000, 67),
        ("imagenetv2", 1000, 67),
        ("imagenet-a", 200, 59),
        ("imagenet-r", 200, 49),
    ],
)
def test_superclasses_are_cut_to_the_classes_of_a_data_set(
    name: str, classes: int, superclasses: int, tmp_path: Path
) -> None:
    """The numbers of superclasses are those in the authors' histograms."""
    images = Images(torch.zeros(1, 3, 1, 1)), torch.tensor([0])
    data = classification_set(tmp_path, name, images, [str(i) for i in range(classes)], None)
    found = data.classes[""].superclass
    assert found is not None
    assert (len(found), len(set(found.tolist()))) == (classes, superclasses)
    sunglasses = {836, 837} & {*imagenet.class_numbers(name)}
    assert len(sunglasses) == (2 if classes == 1000 else 0)


def record(folder: Path, sets: dict[str, float]) -> str:
    """An evaluation of two losses on four data sizes.

    Each number is the millions of pairs, times a factor for the loss and one for the data set.
    """
    described = {"train_images": 0, "templates": 1, "captions": 0, "groups": {}, "mean_over": []}
    images = {name: paper.SETS[name].test_images if name in paper.SETS else 9 for name in sets}
    data_sets = {
        name: {"images": images[name], "classes": {"class": 1000}, **described} for name in sets
    }
    results, checkpoints = {}, {}
    for factor, loss in ((0.05, "clip"), (0.06, "cyclip")):
        for seed, size in enumerate((500_000, 1_000_000, 2_000_000, 3_000_000)):
            title = f"{size}-{loss}-{seed}"
            checkpoints[title] = {"loss": loss, "seed": seed, "train_num_samples": size}
            results[title] = {
                name: {"numbers": {"top1": size / 1e6 * factor * difficulty}, "groups": {}}
                for name, difficulty in sets.items()
            }
    content = {"date": "today", "command": "", "data_sets": data_sets}
    folder.mkdir()
    content |= {"results": results, "checkpoints": checkpoints}
    (folder / "evaluation.json").write_text(json.dumps(content))
    return str(folder)


def test_runs_on_several_data_sizes_are_drawn_with_the_published_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(scaling.plt, "close", figures.append)
    report.main([record(tmp_path / "a", {"imagenet1k": 1, "imagenetv2": 0.5, "imagenet-a": 0.1})])
    assert (tmp_path / "a" / "data_size.png").exists()
    assert (tmp_path / "a" / "robustness.png").exists()
    sizes, robustness = [
        f
        for f in figures
        if any("training pairs" in a.get_xlabel() or "top-1" in a.get_xlabel() for a in f.axes)
    ]
    lines = {line.get_label(): line for line in sizes.axes[0].lines}
    assert [*lines] == ["CLIP, paper", "CyCLIP, paper", "CLIP", "CyCLIP", "chance"]
    assert lines["chance"].get_ydata() == pytest.approx([0.1, 0.1])
    ticks = [label.get_text() for label in sizes.axes[0].get_xticklabels()]
    assert ticks == ["500K", "1M", "2M", "3M", "6M"]
    assert lines["CyCLIP"].get_xdata().tolist() == [500_000, 1_000_000, 2_000_000, 3_000_000]
    assert lines["CyCLIP"].get_ydata() == pytest.approx([3, 6, 12, 18])
    assert lines["CLIP, paper"].get_ydata() == pytest.approx([5.03, 11.10, 15.10, 17.28, 22.16])
    v2, a = robustness.axes
    assert (v2.get_title(), a.get_title()) == (
        "imagenetv2: zero-shot top-1, %",
        "imagenet-a: zero-shot top-1, %",
    )
    lines = {line.get_label(): line for line in v2.lines}
    assert lines["CyCLIP"].get_xydata() == pytest.approx(
        torch.tensor([[3, 1.5], [6, 3], [12, 6], [18, 9]]).numpy()
    )
    # The point of 6 M pairs is missing: it is published for ImageNet alone.
    assert lines["CLIP, paper"].get_xydata()[-1] == pytest.approx([17.28, 14.39])
    x, y = lines["standard training, paper"].get_data()
    assert (y[0], y[1]) == pytest.approx((1.2 * x[0] - 9, 1.2 * x[1] - 9))
    assert "standard training, paper" not in {line.get_label() for line in a.lines}


def test_labels_of_data_sizes_do_not_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our run on 504,000 pairs is next to the published one on 500,000."""
    figures: list[Figure] = []
    monkeypatch.setattr(scaling.plt, "close", figures.append)
    sizes = {500_000: 504_000, 1_000_000: 250_000, 2_000_000: 255_000, 3_000_000: 2_905_954}
    result = report.read_evaluation(Path(record(tmp_path / "a", {"imagenet1k": 1})))
    for run in result["checkpoints"].values():
        run["train_num_samples"] = sizes[run["train_num_samples"]]
    assert scaling.draw_data_size(result, tmp_path / "data_size.png")
    [ax] = figures[0].axes
    assert [label.get_text() for label in ax.get_xticklabels()] == [
        "250K",
        "500K",
        "1M",
        "2M",
        "3M",
        "6M",
    ]
    figures[0].canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_a_dot_is_the_mean_over_runs_that_differ_in_their_seed_only(tmp_path: Path) -> None:
    """Runs with the same loss and number of pairs, but with other settings, have their own dot."""
    result = report.read_evaluation(Path(record(tmp_path / "a", {"imagenet1k": 1})))
    for title, seed, top1 in (("500000-cyclip-4", 4, 0.05), ("weak-cyclip-0", 0, 0.01)):
        result["checkpoints"][title] = {"loss": "cyclip", "seed": seed, "train_num_samples": 500000}
        result["results"][title] = {"imagenet1k": {"numbers": {"top1": top1}, "groups": {}}}
    cyclip = scaling.our_lines(result, "imagenet1k")[1]
    dots = [(size.pairs, percent) for size, percent in cyclip.percent.items()]
    assert dots == [
        (500_000, pytest.approx((3 + 5) / 2)),
        (500_000, pytest.approx(1)),
        (1_000_000, pytest.approx(6)),
        (2_000_000, pytest.approx(12)),
        (3_000_000, pytest.approx(18)),
    ]


def test_runs_on_one_data_size_are_not_drawn(tmp_path: Path) -> None:
    folder = record(tmp_path / "a", {"imagenet1k": 1, "imagenetv2": 0.5})
    path = Path(folder) / "evaluation.json"
    content = json.loads(path.read_text())
    for run in content["checkpoints"].values():
        run["train_num_samples"] = 500_000
    path.write_text(json.dumps(content))
    report.main([folder])
    assert sorted(p.name for p in Path(folder).glob("*.png")) == ["picture.png"]


def test_other_images_than_the_papers_have_no_published_points(tmp_path: Path) -> None:
    folder = record(tmp_path / "a", {"imagenet1k": 1, "icons": 1, "emoji": 0.5})
    result = report.read_evaluation(Path(folder))
    assert len(scaling.all_lines(result, "imagenet1k")) == 4
    result["data_sets"]["imagenet1k"]["images"] = 999
    assert len(scaling.all_lines(result, "imagenet1k")) == 2
    assert len(scaling.all_lines(result, "icons")) == 2
    assert [column.title for column in table.columns(result)][:2] == [
        "500000 CLIP",
        "500000 CyCLIP",
    ]
    assert pictures.PUBLISHED.keys() == {m for row in published.read() for m in row.percent}
