"""The pictures of the pages, which are drawn from records."""

import csv
from itertools import combinations

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
from matplotlib.image import imread
from matplotlib.text import Text
from processes import ROOT

from benchmarks.compare import report

RECORD = "benchmarks/results/two-cpu-cores"


def pictures():
    """The figures by the names of their files."""
    rows = csv.DictReader((ROOT / "benchmarks/results/results.csv").open(encoding="utf-8"))
    costs = [row for row in rows if row["section"] == "cost" and row["ms"] and not row["ranks"]]
    figures = report.figures(costs, "Intel(R) Xeon(R) Processor, threads: 2")
    return {f"{RECORD}-{name}.png": figure for name, figure in figures.items()}


def drawn_texts(figure, monkeypatch):
    """Each text that is drawn, which some of its artists are not, with its box."""
    texts, draw = [], Text.draw

    def record(text, renderer, *arguments):
        texts.append(text)
        draw(text, renderer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", record)
        figure.canvas.draw()
    shown = [text for text in texts if text.get_visible() and text.get_text().strip()]
    return [(text, text.get_window_extent()) for text in shown]


def test_pictures_are_readable_on_a_phone(monkeypatch):
    """At a width of 400 pixels letters have at least 12. No text is cut or covers another one."""
    for file, figure in pictures().items():
        texts = drawn_texts(figure, monkeypatch)
        pixels_per_point = 400 / figure.get_figwidth() / 72
        assert min(text.get_fontsize() for text, _ in texts) * pixels_per_point >= 12, file
        for text, box in texts:
            corners = (box.x0, box.y0), (box.x1, box.y1)
            assert all(figure.bbox.contains(*corner) for corner in corners), (file, text)
        for (text, box), (other, second) in combinations(texts, 2):
            assert not box.overlaps(second), (file, text, other)
        # The file is of this figure.
        height, width, _ = imread(ROOT / file).shape
        assert (width, height) == tuple(160 * figure.get_size_inches()), file
