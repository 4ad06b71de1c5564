"""The similarities that a measurement keeps, and their picture."""

from base64 import b64decode, b64encode
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from matplotlib import colormaps, image

from cyclip_loss import consistency_metrics
from reference_train.evaluate import measure, report
from reference_train.evaluate.datasets import Classes, DataSet, Images


def test_an_image_of_each_name_in_one_style_sorted_by_group() -> None:
    pictures, texts = torch.nn.functional.normalize(torch.randn(2, 7, 5), dim=-1)
    names, kinds = torch.tensor([[3, 0, 1, 0, 2, 3, 4], [0, 1, 0, 1, 0, 0, 0]])
    classes = {"": Classes(names, [*"vwxyz"], ["{}"]), "group": Classes(kinds, [*"gh"], ["{}"])}
    data = DataSet(Images(pictures), classes, groups=[*"aaaaabb"], across_groups=True)
    clip = Mock(device=torch.device("cpu"), encode_classes=lambda names, _: texts[: len(names)])
    clip.encode_images.return_value = pictures, torch.arange(7), []
    found = measure.measure(clip, data, pictured=True)
    assert "inmodal_correlation" not in found["numbers"]  # style b has two pairs, and so none
    x, y = pictures[[2, 4, 0, 1]], texts[[1, 2, 3, 0]]
    kept = np.frombuffer(b64decode(found["similarities"]["matrices"]), np.int8).reshape(3, 4, 4)
    np.testing.assert_allclose(kept / 127, [x @ x.T, y @ y.T, x @ y.T], atol=0.51 / 127)
    numbers = {k: float(v) for k, v in consistency_metrics(x, y).items()}
    assert found["similarities"]["numbers"] == pytest.approx(numbers, rel=1e-4)


def test_the_picture_of_the_first_seed_by_the_colours_of_its_extremes(tmp_path) -> None:
    one, runs = np.kron(np.eye(3), np.full((2, 2), 127)), {}
    shown = {"clip-0": [one, one, np.triu(one)], "cyclip-0": [one / 2] * 3, "cyclip-1": [one] * 3}
    for run, of in shown.items():
        kept = {"numbers": {}, "matrices": b64encode(np.int8(of)).decode()}
        runs[run] = {"x": {"numbers": {}, "similarities": kept}}
    sets = {"x": {"images": 6, "classes": {}}}
    for name, results in ("older", {"clip-0": {"x": {"numbers": {}}}}), ("new", runs):
        result = {"date": "", "command": "", "data_sets": sets, "results": results}
        report.save(result, tmp_path / name)
        report.main([str(tmp_path / name)])
    assert [path.name for path in (tmp_path / "older").glob("*.png")] == ["picture.png"]
    pixels = image.imread(tmp_path / "new" / "similarities.png")[..., :3]
    ends = [colormaps[name](end)[:3] for name in ("viridis", "RdBu") for end in (0.0, 1.0)]
    counts = [np.isclose(pixels, end, atol=3e-3).all(axis=-1).sum() for end in ends]
    assert np.divide(counts, counts[2] / 3) == pytest.approx([96, 24, 3, 3], rel=0.1)  # cells
