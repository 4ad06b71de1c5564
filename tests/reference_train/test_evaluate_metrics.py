"""The numbers of `evaluate`, compared with plain loops; their tables and pictures."""

import json
import math
from base64 import b64decode, b64encode
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reference_train.command_line import UsageError
from reference_train.evaluate import figures, metrics, report
from reference_train.evaluate.checkpoints import describe_run
from reference_train.evaluate.datasets import Classes, Dataset, Images
from reference_train.evaluate.report import read_evaluation


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
    texts, pairs = metrics.distinct_texts(captions)
    # Features with few different values have many equal products, so that there are ties.
    images, features = (torch.randint(-1, 2, (n, 3)).float() for n in (40, len(texts)))
    chosen = torch.randperm(40)[:some].sort().values
    kept, text_indices = metrics.select_pairs(chosen, pairs)
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
    assert metrics.fit_linear_probe(features, labels, test, layer(test).argmax(dim=1), 4) > 0.9996


SETS = {
    name: {"images": 100, "train_images": 0, "classes": classes, "templates": 1, "captions": 0}
    | {"groups": {}, "mean_over": [], "texts": 0}
    for name, classes in {"icons": {"class": 1484, "colour": 9}, "emoji": {"class": 95}}.items()
}


REST = {"failed": {}, "absent": {}, "settings": {}, "versions": {}, "device": "cpu"}


def measured(numbers: dict[str, float], groups: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `measure` returns for 100 images."""
    return {"numbers": numbers, "groups": groups or {}, "images": 100, "unreadable": []}


def write(folder: Path, runs: dict[str, float], **fields: object) -> str:
    """An evaluation.json. runs: for each run the value of all its numbers."""
    numbers = ("top1", "colour_top1", "inmodal_gap")
    found = {
        run: {name: measured(dict.fromkeys(numbers, x)) for name in SETS} for run, x in runs.items()
    }
    folder.mkdir()
    result = {"date": "today", "command": "", "data_sets": SETS, "results": found, **fields}
    known = {run: {**describe_run(run.rstrip("01-"), {}), "seed": 0} for run in result["results"]}
    for run in known:
        known[run]["seed"] = int(run[-1]) if run[-2:] in ("-0", "-1") else None
    result = {**REST, **result, "checkpoints": {**known, **fields.get("checkpoints", {})}}
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


def test_a_merged_evaluation_has_the_settings_and_steps_of_all(tmp_path: Path) -> None:
    """A setting with several values is listed. Each run keeps its history."""
    folders = [
        write(tmp_path / name, {name: 0.1}, settings={"steps": steps, "lr": 1}, history={name: [1]})
        for name, steps in (("a", 1178), ("b", 620), ("c", 620))
    ]
    report.main([*folders, "--out", str(tmp_path / "out")])
    merged = read_evaluation(tmp_path / "out")
    assert merged["settings"] == [{"steps": 1178, "lr": 1}, {"steps": 620, "lr": 1}]
    assert merged["history"] == {name: [1] for name in "abc"}


def test_runs_of_the_same_weights_are_one_column_and_others_are_two(tmp_path: Path) -> None:
    """The time that an evaluation took says nothing of the weights, nor does the file's path."""
    first, again, other = (
        {"model": "m", "path": path, "written": written, "loss": None, "seed": None}
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
        ([first, "--only", "icons"], "--only would remove the other datasets from"),
        ([first, second, "--only", "icons", "--out", second], "--only would remove the other"),
        ([first, "--only", "cifar10", "--out", str(tmp_path / "out")], "no dataset cifar10"),
        ([first, second, "--out", str(tmp_path / "out")], "b: icons is another dataset there"),
    ):
        with pytest.raises(UsageError, match=message):
            report.main(arguments)


# There are 8 images, each with a caption of its own and a caption that all share. The intervals are
# Wilson's score intervals.
BY_HAND = """
## own: 8 images, 9 train images, 8 classes, 2 templates, 9 texts
| zero-shot top-1 | 50.0 (21.5–78.5) | 12.5 | 8 |
| zero-shot top-3 | 50.0 (21.5–78.5) | 37.5 | 8 |
| zero-shot top-5 | 50.0 (21.5–78.5) | 62.5 | 8 |
| zero-shot top-10 | 50.0 (21.5–78.5) | 100.0 | 8 |
| superclass | 50.0 (21.5–78.5) |  | 8 |
| superclass, top-2 | 50.0 (21.5–78.5) |  | 8 |
| within the superclass, top-2 | 50.0 (21.5–78.5) |  | 8 |
| consistency score, k = 1 | 50.0 (21.5–78.5) | 12.5 | 8 |
| linear probe | 50.0 (21.5–78.5) | 12.5 | 8 |
| image → text, R@1 | 50.0 (21.5–78.5) | 22.2 | 8 |
| image → text, R@5 | 50.0 (21.5–78.5) | 83.3 | 8 |
| image → text, R@10 | 50.0 (21.5–78.5) | 100.0 | 8 |
| text → image, R@1 | 50.0 (28.0–72.0) | 22.2 | 16 |
| text → image, R@5 | 50.0 (28.0–72.0) | 85.4 | 16 |
| alignment | 0.50 |  |  |
| in-modal gap × 100 | 50.00 |  |  |
## styles: 8 images, 8 classes, 2 templates, 7 texts
| zero-shot top-1 | 50.0 (17.0–83.0) | 12.5 | 5 |
| text → image, R@1 | 50.0 (17.0–83.0) | 28.6 | 5 |
| x: zero-shot top-1 | 25.0 (5.3–66.4) | 12.5 | 5 |
| y: image → text, R@1 | 25.0 (2.7–80.2) |  | 2 |
- styles: the mean over x, y.
"""


def test_the_table_has_the_lines_of_one_written_by_hand(tmp_path: Path, capsys) -> None:
    """The terminal shows only the most important metrics, and none of groups."""
    labels, coarse = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 6], [0, 0, 0, 0, 1, 1, 2, 3]])
    classes = Classes(labels, [*"abcdefgh"], ["{}", "a {}"], superclass=coarse)
    images, styles = Images(torch.zeros(8, 3, 1, 1)), ["x"] * 5 + ["y"] * 2 + ["black"]
    captions = [[f"own {number}", "of all"] for number in range(8)]
    own = Dataset(images, {"": classes}, captions, train=(Images(torch.zeros(9)), {}))
    in_styles = Dataset(images, {"": classes}, groups=styles, excluded_groups={"black"})
    data_sets = {"own": own, "styles": in_styles}
    sets = {name: report.describe(data) for name, data in data_sets.items()}
    groups = {style: {"top1": 0.25, "image_to_text_r1": 0.25} for style in "xy"}
    numbers = dict.fromkeys(report.metrics_of(sets["own"]), 0.5)
    run = {name: {**measured(numbers, groups), "images": 8} for name in sets}
    run["own"]["groups"] = {}
    report.main([write(tmp_path / "1", {}, data_sets=sets, results={"run": run})])
    lines = iter((tmp_path / "1" / "table.md").read_text().splitlines())
    assert [line for line in BY_HAND.strip().splitlines() if line not in lines] == []  # in order
    printed = capsys.readouterr().out
    for metric in ("zero-shot top-1", "image → text, R@1", "in-modal gap"):
        assert metric in printed
    for metric in ("R@5", "within the", "x: "):
        assert metric not in printed


def test_pictured_pairs_have_different_texts_in_one_style_sorted_by_group() -> None:
    pictures, texts = torch.nn.functional.normalize(torch.randn(2, 7, 5), dim=-1)
    names, kinds = torch.tensor([[3, 0, 1, 0, 2, 3, 4], [0, 1, 0, 1, 0, 0, 0]])
    classes = {"": Classes(names, [*"uvwxyz"], ["{}"]), "group": Classes(kinds, [*"gh"], ["{}"])}
    data = Dataset(Images(pictures), classes, groups=[*"aaaaabb"])
    clip = SimpleNamespace(
        device=torch.device("cpu"),
        encode_classes=lambda names, _: texts[: len(names)],
        encode_images=lambda *_: (pictures, torch.arange(7), []),
    )
    found = metrics.measure(clip, data, keep_similarities=True)
    # Style b has two pairs, which are too few for a correlation.
    assert "inmodal_correlation" not in found["numbers"]
    assert ("top5" in found["numbers"], "group_top5" in found["numbers"]) == (True, False)
    x, y = pictures[[2, 4, 0, 1]], texts[[1, 2, 3, 0]]
    kept = np.frombuffer(b64decode(found["similarities"]["matrices"]), np.int8).reshape(3, 4, 4)
    np.testing.assert_allclose(kept / 127, [x @ x.T, y @ y.T, x @ y.T], atol=0.51 / 127)


def test_figures_have_the_numbers_of_the_table(tmp_path: Path, monkeypatch) -> None:
    panels, matrices = [], []
    monkeypatch.setattr(figures, "draw_bars", lambda found, _: panels.extend(found))
    monkeypatch.setattr(figures, "draw_similarities", lambda found, _: matrices.extend(found))
    sets = {"cifar10": SETS["icons"] | {"images": 10_000, "classes": {"class": 10}}}
    stored = b64encode(np.full(3 * 4, 127, np.int8).tobytes()).decode()
    runs = {f"clip-{i}": {"cifar10": measured({"top1": x})} for i, x in enumerate([0.1, 0.16])}
    runs["clip-1"]["cifar10"]["similarities"] = {"matrices": stored}
    report.main([write(tmp_path / "1", {}, data_sets=sets, results=runs)])
    [panel], [shown] = panels, matrices
    assert panel.chance == pytest.approx(10)
    ours, *published = panel.bars
    assert ours.percent == pytest.approx((13, 10, 16))
    assert (ours.title, ours.is_one_run) == ("CLIP", False)
    assert [bar.percent[0] for bar in published] == [46.54, 51.45, 44.95, 43.22]
    assert shown.title == "CLIP: cifar10"
    np.testing.assert_array_equal(shown.matrices[1:], [np.ones((2, 2)), np.zeros((2, 2))])


def test_neighbours_come_from_other_styles_that_are_not_excluded() -> None:
    names = ["a", "b", "c", "line"] * 5
    image, labels = torch.randn(20, 4), torch.arange(20)
    groups = {name: torch.arange(i, 20, 4) for i, name in enumerate(names[:4])}
    classes = {"": Classes(labels, [*"abcdefghijklmnopqrst"], ["{}"])}
    data = Dataset(Images(image), classes, groups=names, excluded_groups=frozenset({"line"}))
    encoded = SimpleNamespace(
        data=data, image_features=image, group_indices=groups, pairs=labels, labels={"": labels},
        neighbour_labels={},
    )  # fmt: skip
    metrics.use_other_groups(encoded)
    for query, found in enumerate(encoded.neighbour_labels[""].tolist()):
        allowed = [i for i in range(20) if names[i] not in (names[query], "line")]
        expected = sorted(allowed, key=lambda i: -float(image[query] @ image[i]))[: len(found)]
        assert found == expected
