"""The numbers of `evaluate`, compared with plain loops; their tables and pictures."""

import json
import math
from base64 import b64decode, b64encode
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from cyclip_loss import consistency_metrics
from reference_train.command_line import CannotStart
from reference_train.evaluate import measure, metrics, pictures, published, report, table
from reference_train.evaluate.datasets import Classes, DataSet, Images
from reference_train.evaluate.records import read_evaluation


def recall_by_loops(
    image_features: Tensor, captions: list[list[str]], text_feature: dict[str, Tensor]
) -> dict[str, float]:
    """Ranks all candidates for each query. In a tie, wrong candidates come first."""

    def rank(candidates: Sequence[tuple[float, bool]]) -> int:
        best = max(score for score, right in candidates if right)
        return sum(score >= best for score, right in candidates if not right)

    # (score, whether it is right) for each image and text
    scores = [
        [(float(image @ feature), text in own) for text, feature in text_feature.items()]
        for image, own in zip(image_features, captions, strict=True)
    ]
    ranks = {"image_to_text": [rank(candidates) for candidates in scores], "text_to_image": []}
    for candidates in zip(*scores, strict=True):
        num_images = sum(right for _, right in candidates)  # a text counts once for each image
        ranks["text_to_image"] += [rank(candidates)] * num_images
    return {
        f"{direction}_r{k}": np.less(found, k).mean()
        for direction, found in ranks.items()
        for k in (1, 5, 10)
    }


@pytest.mark.parametrize("some", [40, 11])
def test_retrieval_with_several_and_shared_captions_agrees_with_loops(
    some: int, monkeypatch: pytest.MonkeyPatch
):
    """With all images, and with some images and only their captions."""
    monkeypatch.setattr(metrics, "STRIP", 7)
    captions = [[f"own {i} {j}" for j in range(i % 3 + 1)] for i in range(40)]
    for i in range(0, 40, 4):
        captions[i].append("of several")
    texts, pairs = measure.distinct_texts(captions)
    # Features with few different values have many equal products, so that there are ties.
    images, features = (torch.randint(-1, 2, (n, 3)).float() for n in (40, len(texts)))
    chosen = torch.randperm(40)[:some].sort().values
    kept, text_indices = measure.select_pairs(chosen, pairs)
    chosen_captions = [captions[i] for i in chosen.tolist()]
    feature_of_text = {
        text: feature
        for text, feature in zip(texts, features, strict=True)
        if any(text in own for own in chosen_captions)
    }
    expected = recall_by_loops(images[chosen], chosen_captions, feature_of_text)
    found = metrics.retrieval(images[chosen], features[text_indices], kept)
    assert found == pytest.approx(expected)


def test_a_tie_of_neighbours_drops_the_farthest() -> None:
    neighbours = torch.tensor([[5, 6, 6], [1, 2, 3], [4, 4, 7]])
    # The majorities of three are 6, 1 (1 2 3 is a tie, and so is 1 2) and 4.
    numbers = metrics.consistency(torch.tensor([6, 1, 7]), neighbours)
    assert numbers == pytest.approx({"consistency_1": 1 / 3, "consistency_3": 2 / 3})
    # The farthest is dropped until there is no tie.
    assert metrics.majority([2, 1, 1, 3, 2, 3]) == 1


def test_coarse_and_fine_accuracy_agree_with_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A superclass scores as its best class; a superclass of at most k classes is always right."""
    monkeypatch.setattr(metrics, "STRIP", 7)
    image, prompts, labels = torch.randn(60, 4), torch.randn(9, 4), torch.randint(0, 9, (60,))
    superclass = [0, 7, 2, 0, 7, 2, 0, 7, 3]  # numbers with a gap; the last has one class
    expected = dict.fromkeys(
        (metrics.top(name, k) for name in ("coarse", "fine") for k in (1, 2, 3)), 0
    )
    for scores, label in zip((image @ prompts.T).tolist(), labels.tolist(), strict=True):
        own = superclass[label]
        best = {
            group: max(score for score, g in zip(scores, superclass, strict=True) if g == group)
            for group in superclass
        }
        order = sorted(best, key=best.__getitem__, reverse=True)
        siblings = [c for c in range(9) if superclass[c] == own]
        siblings.sort(key=scores.__getitem__, reverse=True)
        for k in (1, 2, 3):
            expected[metrics.top("coarse", k)] += own in order[:k]
            expected[metrics.top("fine", k)] += label in siblings[:k]
    found = metrics.coarse_and_fine(image, prompts, labels, torch.tensor(superclass))
    assert found == pytest.approx({name: count / 60 for name, count in expected.items()})
    assert len(set(found.values())) > 4


def test_neighbours_across_groups_come_from_other_groups_that_are_not_excluded() -> None:
    names = ["a", "b", "c", "line"] * 5
    groups = {name: torch.arange(i, 20, 4) for i, name in enumerate(names[:4])}
    image = torch.randn(20, 4)
    neighbours = measure.neighbours_across(image, groups, frozenset({"line"}))
    for query, found in enumerate(neighbours.tolist()):
        allowed = [i for i in range(20) if names[i] not in (names[query], "line")]
        expected = sorted(allowed, key=lambda i: -float(image[query] @ image[i]))[: len(found)]
        assert found == expected


def test_linear_probe_follows_the_recipe_of_the_papers_authors() -> None:
    """The learning rate falls from 0.005 to 0 in 32 epochs, along a cosine."""
    features, test = torch.randn(300, 6), torch.randn(4000, 6)
    labels = (features[:, :4] + torch.randn(300, 4)).argmax(dim=1)
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    decays = [{"params": [layer.bias], "weight_decay": 0}, {"params": [layer.weight]}]
    optimizer = torch.optim.AdamW(decays, weight_decay=0.01)
    orders = torch.Generator().manual_seed(0)
    batches = [b for _ in range(32) for b in torch.randperm(300, generator=orders).split(128)]
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.0025 * (1 + math.cos(math.pi * step / len(batches)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(features[batch]), labels[batch]).backward()
        optimizer.step()
    # The two layers may differ for a few test images that are nearly undecided.
    assert metrics.linear_probe(features, labels, test, layer(test).argmax(dim=1), 4) > 0.9996


SETS = {
    name: {"images": 100, "train_images": 0, "classes": classes, "templates": 1, "captions": 0}
    | {"groups": {}, "mean_over": []}
    for name, classes in {"icons": {"class": 1484, "colour": 9}, "emoji": {"class": 95}}.items()
}


def write(folder: Path, runs: dict[str, float], **fields: object) -> str:
    """An evaluation.json. runs: for each run the value of all its numbers."""
    numbers = ("top1", "colour_top1", "inmodal_gap")
    found = {
        run: {name: {"numbers": dict.fromkeys(numbers, x), "groups": {}} for name in SETS}
        for run, x in runs.items()
    }
    folder.mkdir()
    result = {"date": "today", "command": "", "data_sets": SETS, "results": found, **fields}
    (folder / "evaluation.json").write_text(json.dumps(result))
    return str(folder)


def test_runs_that_differ_in_the_seed_only_are_one_column(tmp_path: Path) -> None:
    runs = {"clip-0": 0.10, "x-c-cyclip-0": 0.15, "cyclip-0": 0.01, "other": 0.5}
    folders = [write(tmp_path / "1", runs), write(tmp_path / "2", {"clip-1": 0.14})]
    report.main([*folders, "--only", "icons", "x", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table.md").read_text()
    assert "|  | CLIP (2) | CyCLIP | x C-CyCLIP | other | chance | n |" in text
    assert "| zero-shot top-1 | 12.0 (10.0–14.0) | 1.00" in text
    assert " | 15.0 (9.3–23.3) | 50.0" in text
    assert "| colour top-1 | 12.0 (10.0–14.0) |" in text  # for the second set of classes
    assert "| in-modal gap × 100 | 12.00 (10.00 to 14.00) | 1.00 | 15.00 |" in text
    assert "emoji" not in text


def test_older_evaluations_have_the_columns_that_their_names_say(tmp_path: Path) -> None:
    """A run's seed is stored, or ends its name. Two runs with the same name are two columns."""
    older = dict.fromkeys(["rising-512-0", "rising-64-1", "rising-64-0", "i-cyclip-11"], 0.1)
    newer = dict.fromkeys(["wide-2", "wide-1", "clip-12"], 0.2)
    seeds = {"wide-2": {"seed": 0}, "wide-1": {"seed": 0}, "clip-12": {"seed": 12}}
    folders = [write(tmp_path / "a", older), write(tmp_path / "b", newer, checkpoints=seeds)]
    other = write(tmp_path / "c", {"clip-12": 0.3})
    for added, column in ([], ""), ([other], f" | {other} CLIP"):
        report.main([*folders, *added, "--out", str(tmp_path / "out")])
        heads = f"CLIP | I-CyCLIP{column} | rising-64 (2) | rising-512 | wide-1 | wide-2"
        assert f"|  | {heads} | chance | n |\n" in (tmp_path / "out" / "table.md").read_text()


def test_a_merged_evaluation_has_the_settings_and_steps_of_all(tmp_path: Path) -> None:
    """A setting with several values is listed. Each run keeps its history."""
    folders = [
        write(tmp_path / name, {name: 0.1}, settings={"steps": steps, "lr": 1}, history={name: [1]})
        for name, steps in (("a", 1178), ("b", 620), ("c", 620))
    ]
    report.main([*folders, "--out", str(tmp_path / "out")])
    merged = read_evaluation(tmp_path / "out")
    assert merged["settings"] == {"steps": [1178, 620], "lr": 1}
    assert merged["history"] == {name: [1] for name in "abc"}


def test_runs_of_the_same_weights_are_one_column_and_others_are_two(tmp_path: Path) -> None:
    """The time that an evaluation took says nothing of the weights, nor does the file's path."""
    first, again, other = (
        {"model": "m", "path": path, "written": written}
        for path, written in (("logs/run", "1"), ("/old/run", "1"), ("logs/run", "2"))
    )
    folders = []
    for name, checkpoint, data_sets in (
        ("a", first, ["icons", "emoji"]),
        ("b", again, ["icons"]),
        ("c", other, []),
    ):
        folders.append(write(tmp_path / name, {"run": 0.1}, checkpoints={"run": checkpoint}))
        file = tmp_path / name / "evaluation.json"
        result = json.loads(file.read_text())
        results = result["results"]["run"]
        result["results"]["run"] = {key: results[key] | {"seconds": name} for key in data_sets}
        file.write_text(json.dumps(result))
    report.main([*folders, "--out", str(tmp_path / "out")])
    assert list(read_evaluation(tmp_path / "out")["results"]) == ["run", f"{folders[2]}-run"]


def test_report_refuses_evaluations_that_do_not_go_together(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {"clip-0": 0.1})
    other = {name: data | {"images": 99} for name, data in SETS.items()}
    second = write(tmp_path / "b", {"clip-1": 0.1}, data_sets=other)
    for arguments, message in (
        ([first, second], "report: --out is needed"),
        ([f"{first}/evaluation.json"], "report: --out is needed"),
        ([first, "--only", "icons"], "--only would remove the other data sets from"),
        ([first, second, "--only", "icons", "--out", second], "--only would remove the other"),
        ([first, "--only", "cifar10", "--out", str(tmp_path / "out")], "no data set cifar10"),
        ([first, second, "--out", str(tmp_path / "out")], "b: icons is another data set there"),
    ):
        with pytest.raises(CannotStart, match=message):
            report.main(arguments)


def test_bars_show_mean_range_published_numbers_and_chance(tmp_path: Path, monkeypatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(pictures.plt, "close", figures.append)
    sets = {"cifar10": SETS["icons"] | {"images": 10_000, "classes": {"class": 10}}}
    runs = {f"clip-{i}": {"cifar10": {"numbers": {"top1": x}}} for i, x in enumerate([0.1, 0.16])}
    report.main([write(tmp_path / "1", {}, data_sets=sets, results=runs)])
    (ax,) = figures[0].axes
    bars = ax.containers[-1]  # after the container of the error bars
    numbers = [row for row in published.for_table("cifar10") if row.metric == "top1"]
    percent = [number for row in numbers for number in row.percent.values()]
    assert len(percent) == 4
    assert [bar.get_width() for bar in bars] == pytest.approx([13, *percent])
    assert bars.errorbar.lines[2][0].get_segments()[0][:, 0] == pytest.approx([10, 16])
    assert ax.lines[0].get_xdata() == pytest.approx([10, 10])
    assert ax.axison
    assert [label.get_text() for label in ax.texts][:2] == ["13.0 ", "46.5 q"]
    assert ax.get_title("right") == "cifar10, 10,000 images: zero-shot top-1, % (chance 10)"
    assert figures[0].get_supxlabel().endswith("q: quoted, not checked")


def test_a_picture_of_many_runs_has_a_moderate_aspect_ratio(tmp_path: Path, monkeypatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(pictures.plt, "close", figures.append)
    runs = dict.fromkeys([f"run-{number}-of-many" for number in range(40)], 0.1)
    report.main([write(tmp_path / "1", runs)])
    width, height = figures[0].get_size_inches()
    assert 0.5 < width / height < 2


# There are 8 images, each with a caption of its own and a caption that all share. The intervals are
# Wilson's score intervals.
BY_HAND = """
## own: 8 images, 9 train images, 8 classes, 2 templates, 9 texts
| zero-shot top-1 | 50.0 (21.5–78.5) | 12.5 | 8 |
| zero-shot top-3 | 50.0 (21.5–78.5) | 37.5 | 8 |
| zero-shot top-5 | 50.0 (21.5–78.5) | 62.5 | 8 |
| zero-shot top-10 | 50.0 (21.5–78.5) | 100.0 | 8 |
| superclass | 50.0 (21.5–78.5) | 34.4 | 8 |
| superclass, top-2 | 50.0 (21.5–78.5) |  | 8 |
| within the superclass | 50.0 (21.5–78.5) | 50.0 | 8 |
| within the superclass, top-2 | 50.0 (21.5–78.5) | 75.0 | 8 |
| consistency score, k = 1 | 50.0 (21.5–78.5) | 12.5 | 8 |
| linear probe | 50.0 (21.5–78.5) | 12.5 | 8 |
| image → text, R@1 | 50.0 (21.5–78.5) | 22.2 | 8 |
| image → text, R@5 | 50.0 (21.5–78.5) | 83.3 | 8 |
| image → text, R@10 | 50.0 (21.5–78.5) | 100.0 | 8 |
| text → image, R@1 | 50.0 (28.0–72.0) | 22.2 | 16 |
| text → image, R@5 | 50.0 (28.0–72.0) | 85.4 | 16 |
| alignment | 0.50 |  |  |
| in-modal gap × 100 | 50.00 |  |  |
| x: zero-shot top-1 | 25.0 (5.3–66.4) | 12.5 | 5 |
| y: image → text, R@1 | 25.0 (2.7–80.2) |  | 2 |
## styles: 8 images, 8 classes, 2 templates, 7 texts
| zero-shot top-1 | 50.0 (17.0–83.0) | 12.5 | 5 |
| text → image, R@1 | 50.0 (17.0–83.0) | 28.6 | 5 |
- styles: the mean over x, y.
"""


def test_the_table_has_the_lines_of_one_written_by_hand(tmp_path: Path, capsys) -> None:
    """The terminal shows only the most important metrics, and none of groups."""
    labels, coarse = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 6], [0, 0, 0, 0, 1, 1, 2, 3]])
    classes = Classes(labels, [*"abcdefgh"], ["{}", "a {}"], superclass=coarse)
    images, styles = Images(torch.zeros(8, 3, 1, 1)), ["x"] * 5 + ["y"] * 2 + ["black"]
    captions = [[f"own {number}", "of all"] for number in range(8)]
    own = DataSet(images, {"": classes}, captions, styles, (Images(torch.zeros(9)), {}))
    in_styles = DataSet(
        images, {"": classes}, groups=styles, across_groups=True, excluded_groups={"black"}
    )
    data_sets = {"own": own, "styles": in_styles}
    sets = {name: report.describe(name, data) for name, data in data_sets.items()}
    groups = {style: {"top1": 0.25, "image_to_text_r1": 0.25} for style in "xy"}
    numbers = dict.fromkeys(table.metrics_of(sets["own"]), 0.5)
    run = {name: {"numbers": numbers, "groups": groups, "images": 8} for name in sets}
    report.main([write(tmp_path / "1", {}, data_sets=sets, results={"run": run})])
    lines = iter((tmp_path / "1" / "table.md").read_text().splitlines())
    assert [line for line in BY_HAND.strip().splitlines() if line not in lines] == []  # in order
    printed = capsys.readouterr().out
    for metric in ("zero-shot top-1", "image → text, R@1", "in-modal gap"):
        assert metric in printed
    for metric in ("R@5", "within the", "x: "):
        assert metric not in printed


def test_chance_is_never_more_than_certain() -> None:
    data = {**SETS["icons"], "classes": {"class": 3}}
    assert table.chance(data, "top5") == 1  # not 5 / 3


def test_pictured_pairs_have_different_texts_in_one_style_sorted_by_group() -> None:
    pictures, texts = torch.nn.functional.normalize(torch.randn(2, 7, 5), dim=-1)
    names, kinds = torch.tensor([[3, 0, 1, 0, 2, 3, 4], [0, 1, 0, 1, 0, 0, 0]])
    classes = {"": Classes(names, [*"uvwxyz"], ["{}"]), "group": Classes(kinds, [*"gh"], ["{}"])}
    data = DataSet(Images(pictures), classes, groups=[*"aaaaabb"], across_groups=True)
    clip = SimpleNamespace(
        device=torch.device("cpu"),
        encode_classes=lambda names, _: texts[: len(names)],
        encode_images=lambda *_: (pictures, torch.arange(7), []),
    )
    found = measure.measure(clip, data, keep_similarities=True)
    # Style b has two pairs, which are too few for a correlation.
    assert "inmodal_correlation" not in found["numbers"]
    assert ("top5" in found["numbers"], "group_top5" in found["numbers"]) == (True, False)
    x, y = pictures[[2, 4, 0, 1]], texts[[1, 2, 3, 0]]
    kept = np.frombuffer(b64decode(found["similarities"]["matrices"]), np.int8).reshape(3, 4, 4)
    np.testing.assert_allclose(kept / 127, [x @ x.T, y @ y.T, x @ y.T], atol=0.51 / 127)
    numbers = {k: float(v) for k, v in consistency_metrics(x, y).items()}
    assert found["similarities"]["numbers"] == pytest.approx(numbers, rel=1e-4)


@pytest.fixture
def similarity_records(tmp_path: Path) -> dict[str, str]:
    """Folders of two evaluations: "older", without similarities, and "new", of six models.

    Of CyCLIP's two runs the first has half of the second one's similarities.
    """
    one = np.kron(np.eye(3), np.full((2, 2), 127))
    stored = {"clip-0": [one, one, np.triu(one)], "cyclip-0": [one / 2] * 3, "cyclip-1": [one] * 3}
    stored |= dict.fromkeys("xyz", [one / 2] * 3)
    runs = {}
    for i, (run, matrices) in enumerate(stored.items()):
        shown = {"inmodal_gap": 0.1, "crossmodal_correlation": 0.3}
        kept = {"numbers": shown, "matrices": b64encode(np.int8(matrices)).decode()}
        numbers = {"inmodal_gap": 0.2 * i, "inmodal_correlation": 0.5}
        runs[run] = {"x": {"numbers": numbers, "groups": {"b": {}, "a": {}}, "similarities": kept}}
    data_set = {"images": 60_000, "train_images": 0, "classes": {"class": 9, "kind": 3}}
    data_set |= {"templates": 1, "captions": 9, "groups": {"b": 400, "a": 20_000, "line": 7}}
    options = {"data_sets": {"x": data_set | {"mean_over": ["b", "a"]}}}
    older = {"clip-0": {"x": {"numbers": {}, "groups": {}}}}
    return {
        name: write(tmp_path / name, {}, results=results, **options)
        for name, results in (("older", older), ("new", runs))
    }


@pytest.fixture
def similarity_axes(similarity_records, monkeypatch) -> list[Any]:
    figures: list[Figure] = []
    monkeypatch.setattr(pictures.plt, "close", figures.append)
    report.main([similarity_records["new"]])
    return figures[-1].axes


def test_a_picture_of_similarities_is_drawn_if_they_are_stored(similarity_records, capsys) -> None:
    for name, folder in similarity_records.items():
        report.main([folder])
        assert ("similarities.png" in capsys.readouterr().out) == (name == "new")
        drawn = {path.name for path in Path(folder).glob("*.png")}
        assert drawn == {"picture.png"} | ({"similarities.png"} if name == "new" else set())


def test_gap_and_correlation_of_the_shown_pairs_and_of_the_table_are_below_each_matrix(
    similarity_axes,
) -> None:
    below = [ax.get_xlabel().split("\n\n")[1].split("\n") for ax in similarity_axes[3:6]]
    inmodal = ["gap × 100: 10.00 (table: 30.00)", "correlation: none (table: 0.50)"]
    crossmodal = ["gap × 100: none (table: none)", "correlation: 0.30 (table: none)"]
    assert below == [["in-modal", *inmodal]] * 2 + [["cross-modal", *crossmodal]]


def test_the_axes_of_similarities_say_how_they_are_sorted(similarity_axes) -> None:
    """By the last, coarsest classes."""
    for ax, items in zip(similarity_axes, 4 * ["images", "texts", "pairs"], strict=False):
        assert ax.get_ylabel() == ax.get_xlabel().split("\n")[0] == f"{items}, sorted by kind"


def test_a_picture_of_similarities_says_which_pairs_it_shows(similarity_axes) -> None:
    headings = [ax.figure.get_suptitle().split("\n", 1) for ax in similarity_axes[:6:3]]
    pairs = "Shown: 6 pairs in style b; table: 10,400 pairs, the mean over"
    assert headings == [
        ["CLIP: x", f"{pairs} b, a."],
        ["CyCLIP: x, one of 2 runs", f"{pairs} 2 runs, b, a."],
    ]


def test_similarities_show_four_models_and_their_first_seeds_on_one_scale(
    similarity_records,
) -> None:
    """The colours of the extremes tell the scale."""
    report.main([similarity_records["new"]])
    path = Path(similarity_records["new"]) / "similarities.png"
    pixels = matplotlib.image.imread(path)[..., :3]
    maps = (matplotlib.colormaps[name] for name in ("viridis", "RdBu"))
    ends = [colours(end)[:3] for colours in maps for end in (0.0, 1.0)]
    counts = [np.isclose(pixels, end, atol=3e-3).all(axis=-1).sum() for end in ends]
    assert np.divide(counts, counts[2] / 3) == pytest.approx([192, 24, 3, 3], rel=0.1)  # cells
