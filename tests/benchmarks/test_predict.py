"""The tables of `python -m benchmarks predict`."""

from argparse import Namespace

import pytest

from benchmarks import predict

# D, chip, and a row of one of its tables. The rows of the H100 are computed by hand.
ROWS = """
64 A100 | 65,536 | 3.53 | 4.97 | 9.96 | 0.00970 | 0.0194 | 18.5 | 8.11 |
64 H100 | 65,536 | 2.22 | 2.87 | 5.74 | 0.00559 | 0.0112 | 10.9 | 2.77 |
64 B200 | 65,536 | 1.95 | 1.95 | 2.87 | 0.00280 | 0.00559 | 6.79 | 1.26 |
768 A100 | 1,024 | 8 | 0.450 | 71.1 | 0.309 | 31.2 | 0.853 | 159 |
768 A100 | 1,024 | 4,096 | 201 | 19,900 | 1,080 | 31.2 | does not fit | 81,600 |
768 H100 | 1,024 | 8 | 0.225 | 71.1 | 0.186 | 31.2 | 0.435 | 159 |
768 H100 | 4,096 | 16 | 3.24 | 884 | 8.85 | 129 | 10.7 | 4,500 |
768 B200 | 1,024 | 8 | 0.112 | 71.1 | 0.0932 | 31.2 | 0.213 | 159 |
768 B200 | 1,024 | 4,096 | 71.2 | 19,900 | 561 | 31.2 | 144 | 81,600 |
"""


def test_predictions_have_the_values_computed_by_hand(capsys) -> None:
    found, chip = set(), ""
    for d in (64, 768):
        assert predict.main(Namespace(d=d)) == 0
        for line in capsys.readouterr().out.splitlines():
            chip = line[:4] if line[4:6] == ", " else chip
            found.add(f"{d} {chip} {line}")
    assert set(ROWS.strip().splitlines()) - found == set()


def test_tables_have_every_batch_size_and_every_number_of_ranks() -> None:
    chip = predict.CHIPS["H100"]
    rows = predict.one_gpu_rows(chip, 512)
    assert [row["N"] for row in rows] == [2**k for k in range(12, 18)]
    for row in rows:  # 8 N² D flops at the rate of cuBLAS
        milliseconds = 1e3 * 8 * row["N"] ** 2 * 512 / 794.5e12
        assert row["8 N² D flops"] == pytest.approx(milliseconds)
        assert row["all"] > row["8 N² D flops"]
    ranks = [(row["rows per rank"], row["ranks"]) for row in predict.rank_rows(chip, 512)]
    assert ranks == [(n, r) for n in (1024, 4096) for r in (8, 16, 64, 256, 1024, 4096)]
