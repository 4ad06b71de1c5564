"""The measured numbers in README.md and benchmarks/README.md are the recorded ones."""

import json
import re
from collections import defaultdict
from statistics import mean

from processes import ROOT

README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "benchmarks/README.md").read_text()
RESULTS = ROOT / "benchmarks/results"
RECORDS = ROOT / "reference_train/results"
WARMUP = ("icons/evaluation-warmup", "icons/evaluation-warmup-2")
LONG_ICON_RUNS = (
    "icons/evaluation-seed-0",
    "icons/evaluation-seeds-1-2",
    "icons/evaluation-c-cyclip-20",
)


def readme_cells(heading: str) -> list[list[str]]:
    """The rows of the table under a heading of the README, without its first row and column."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    _, _, *rows = table_rows(section)
    return [row[1:] for row in rows]


def table_rows(text: str) -> list[list[str]]:
    """The cells of each row of the tables in a text."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


def recorded_costs() -> list[dict]:
    """Time and memory in the record that the README links."""
    (path,) = set(re.findall(r"\[record]\((.*?)\.md\)", README))
    rows: list[dict] = json.loads((ROOT / f"{path}.json").read_text())["sections"]["cost"]["rows"]
    return rows


def recorded_results(*names: str) -> dict[str, dict]:
    """LOSS-SEED -> what was measured, from these records of evaluations."""
    results: dict[str, dict] = {}
    for name in names:
        results |= json.loads((RECORDS / f"{name}.json").read_text())["results"]
    return results


def values_by_seed(results: dict[str, dict], run: str, data_set: str, metric: str) -> list[float]:
    """A metric of the runs RUN-0, RUN-1 and RUN-2."""
    return [results[f"{run}-{seed}"][data_set]["numbers"][metric] for seed in range(3)]


def test_accuracy_in_the_readme_is_that_of_the_recorded_seeds() -> None:
    """The mean and the range of three seeds."""
    results = recorded_results(*WARMUP, *LONG_ICON_RUNS)

    def cell(run: str) -> str:
        return mean_and_range(values_by_seed(results, run, "icons", "top1"))

    short = [cell(run) for run in ("clip-1024", "cyclip-1024", "warmup-1.0-1024")]
    assert readme_cells("Accuracy") == [short, [cell("clip"), cell("cyclip"), "–"]]


def accuracies_with_and_without_views() -> dict[tuple[str, str, str], list[float]]:
    """(STEPS-steps-LOSS, data set, metric) -> the accuracy of each seed, from the records."""
    accuracies: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for name, steps in (
        ("views/evaluation.json", "620"),
        ("views/evaluation-long.json", "1500"),
        ("long/evaluation.json", "1500"),
    ):
        record = json.loads((RECORDS / name).read_text())
        for run, data_sets in record["results"].items():
            loss = run.rpartition("-")[0]
            loss = loss if "steps" in loss else f"{steps}-steps-{loss}"
            for data_set, measured in data_sets.items():
                for metric, accuracy in measured["numbers"].items():
                    accuracies[loss, data_set, metric].append(accuracy)
    return accuracies


def mean_and_range(accuracies: list[float]) -> str:
    """A cell of a table, in %, from the accuracies of all seeds."""
    percent = [100 * accuracy for accuracy in accuracies]
    return f"{mean(percent):.1f} ({min(percent):.1f}–{max(percent):.1f})"


def tables_under(heading: str) -> list[str]:
    """The tables under a heading of reference_train/README.md."""
    page = (ROOT / "reference_train/README.md").read_text()
    section = page.partition(f"\n{heading}\n")[2].partition("\n##")[0]
    return [part for part in section.split("\n\n") if part.startswith("|")]


def test_accuracy_with_views_on_its_page_is_that_of_the_recorded_seeds() -> None:
    """The mean and the range of three seeds, in tables of equal time and of equal steps."""
    accuracies = accuracies_with_and_without_views()
    metrics = {"image → name": "top1", "subgroup": "subgroup_top1"}
    tables = tables_under("## Two views of each pair")
    # The number of losses, and of steps without and with views.
    expected = [(6, 1178, 620), (9, 620, 620), (6, 1500, 1500)]
    for table, (num_losses, without, with_views) in zip(tables, expected, strict=True):
        headings, _, *rows = table_rows(table)
        losses = [heading.lower().replace(" + ", "-") for heading in headings]
        assert (len(losses), len(rows)) == (num_losses, 8)
        for label, *cells in rows:
            data_set, metric = label.split(": ")
            for loss, cell in zip(losses, cells, strict=True):
                steps = with_views if loss.endswith("views") else without
                seeds = accuracies[f"{steps}-steps-{loss}", data_set, metrics[metric]]
                assert len(seeds) == 3
                assert cell == mean_and_range(seeds)


def test_accuracy_of_icons_with_views_is_that_of_the_recorded_seeds() -> None:
    """The mean and the range of the seeds, in a table of equal time and one of equal steps."""
    results = recorded_results("views/evaluation-icons")
    with_views = {
        "CLIP + views": "8-epochs-clip-views",
        "C-CyCLIP + views": "8-epochs-c-cyclip-views",
    }
    equal_time = {
        "CLIP": "15-epochs-clip",
        "CyCLIP": "15-epochs-rising-cyclip",
        "C-CyCLIP": "15-epochs-c-cyclip",
        **with_views,
    }
    equal_steps = {
        "CLIP": "8-epochs-clip",
        "CyCLIP": "8-epochs-rising-cyclip",
        "C-CyCLIP": "8-epochs-c-cyclip",
        "C-CyCLIP, λ warm-up": "8-epochs-rising-c-cyclip",
        **with_views,
    }
    metrics = {
        "name": "top1",
        "image → caption, R@1": "image_to_text_r1",
        "subgroup": "subgroup_top1",
    }
    tables = tables_under("### On icons")
    quoted = README.partition("In about equal time on icons")[2].partition("([which to take]")[0]
    quoted_means = re.findall(r"\d+\.\d", quoted)
    names_row = table_rows(tables[0])[2]
    assert quoted_means == [cell.partition(" ")[0] for cell in names_row[1:5]]
    for table, runs in zip(tables, (equal_time, equal_steps), strict=True):
        header, _, *rows = table_rows(table)
        assert header == list(runs)
        assert len(rows) == 4
        for label, *cells in rows:
            data_set, metric = label.removeprefix("held-out ").split(": ")
            for run, cell in zip(runs.values(), cells, strict=True):
                seeds = values_by_seed(results, run, data_set, metrics[metric])
                assert cell == mean_and_range(seeds)


def test_the_first_table_of_the_icons_page_is_that_of_the_recorded_seeds() -> None:
    """The mean and the range of three seeds."""
    results = recorded_results(*WARMUP, *LONG_ICON_RUNS)
    runs = ("clip-1024", "cyclip-1024", "warmup-1.0-1024", "clip", "cyclip", "c-cyclip")
    metrics = {
        "name": "top1",
        "image → caption, R@1": "image_to_text_r1",
        "subgroup": "subgroup_top1",
        "consistency score of names, k = 1": "consistency_1",
    }
    page = (RECORDS / "icons/README.md").read_text()
    _, _, *rows = table_rows(page.partition("\n## Results\n")[2].partition("\n![")[0])
    assert len(rows) == 7
    for label, *cells in rows:
        data_set, _, metric = label.removeprefix("held-out ").partition(": ")
        for run, cell in zip(runs, cells, strict=True):
            if label.startswith("in-modal gap"):
                seeds = values_by_seed(results, run, "icons", "inmodal_gap")
            elif data_set == "emoji in black and white":
                style = "fluent-emoji-high-contrast"
                groups = [results[f"{run}-{seed}"]["emoji"]["groups"] for seed in range(3)]
                seeds = [group[style][metrics[metric]] for group in groups]
            else:
                seeds = values_by_seed(results, run, data_set, metrics[metric])
            assert cell == mean_and_range(seeds)


def test_accuracy_of_icons_on_the_lambda_page_is_that_of_the_recorded_seeds() -> None:
    """The rows of icons in the table of the page's section on penalties."""
    results = recorded_results("views/evaluation-icons", *LONG_ICON_RUNS)
    runs_of_each_row = {
        "512 steps, λ constant": ("8-epochs-clip", "8-epochs-cyclip", "8-epochs-c-cyclip"),
        "512 steps, λ warm-up": (
            "8-epochs-clip",
            "8-epochs-rising-cyclip",
            "8-epochs-rising-c-cyclip",
        ),
        "960 steps, λ warm-up for CyCLIP, constant for C-CyCLIP": (
            "15-epochs-clip",
            "15-epochs-rising-cyclip",
            "15-epochs-c-cyclip",
        ),
        "1,280 steps, λ constant": ("clip", "cyclip", "c-cyclip"),
    }
    page = (ROOT / "docs/lambda.md").read_text()
    rows = re.findall(r"^\| icons, (.*): held-out names \| (.*) \| – \|$", page, re.MULTILINE)
    assert [label for label, _ in rows] == list(runs_of_each_row)
    for label, cells in rows:
        for run, cell in zip(runs_of_each_row[label], cells.split(" | "), strict=True):
            assert cell == mean_and_range(values_by_seed(results, run, "icons", "top1"))


def last_recalls() -> dict[str, str]:
    """R@10 in % of each run on icons after its last epoch, by the run's heading."""
    recalls = {}
    for record in ("icons/runs.txt", "views/runs-icons.txt"):
        for block in (RECORDS / record).read_text().split("\n\n"):
            name, *lines = block.splitlines()
            for line in lines:
                if line.startswith("    R@10: "):
                    recalls[re.sub(r": \d+ minutes.*", "", name)] = line.rpartition(" ")[2]
    return recalls


def test_the_settings_table_shows_the_recorded_differences_in_recall() -> None:
    recalls = last_recalls()
    compared = [("lambda-cyclip-128-0", "lambda-clip-128-0")]
    compared += [("lambda-cyclip-512-128", "lambda-clip-512-0")]
    compared += [(f"warmup-1.0-1024-{seed}", f"clip-1024-{seed}") for seed in range(3)]
    compared += [(f"8-epochs-rising-cyclip-{seed}", f"8-epochs-clip-{seed}") for seed in range(3)]
    compared += [(f"cyclip-{seed}, 20 epochs", f"clip-{seed}, 20 epochs") for seed in range(3)]
    compared += [("warmup-512-1024-20-0", "clip-0, 20 epochs")]
    expected = [f"{float(recalls[cyclip]) - float(recalls[clip]):.1f}" for cyclip, clip in compared]
    table = (ROOT / "docs/choosing.md").read_text().partition("## Settings")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert re.findall(r"\d+\.\d", "\n".join(rows[:5])) == expected


def test_recall_at_several_batch_sizes_on_the_lambda_page_is_that_of_the_recorded_runs() -> None:
    """R@10 after the last epoch. A cell has the runs with the same settings."""
    recalls = last_recalls()
    rows = {
        ("4,096", "128", "0"): [
            ("lambda-clip-4096-0", "clip-4096-0"),
            ("lambda-cyclip-4096-0",),
            ("lambda-cyclip-4096-128",),
            ("quarter-4096-0",),
            ("warmup-512-4096-0",),
        ],
        ("4,096", "128", "1"): [("clip-4096-1",), (), (), (), ("warmup-512-4096-1",)],
        ("2,048", "256", "0"): [
            ("lambda-clip-2048-0", "clip-2048-0"),
            ("lambda-cyclip-2048-0",),
            ("lambda-cyclip-2048-128",),
            ("quarter-2048-0",),
            ("warmup-512-2048-0",),
        ],
        ("2,048", "256", "1"): [("clip-2048-1",), (), (), (), ("warmup-512-2048-1",)],
        **{
            ("1,024", "512", str(seed)): [
                (f"clip-{seed}", f"clip-1024-{seed}", f"8-epochs-clip-{seed}"),
                (),
                (f"cyclip-{seed}", f"cyclip-1024-{seed}", f"8-epochs-cyclip-{seed}"),
                (f"quarter-1024-{seed}",),
                (f"warmup-1.0-1024-{seed}", f"8-epochs-rising-cyclip-{seed}"),
            ]
            for seed in range(3)
        },
        ("512", "1,024", "0"): [
            ("lambda-clip-512-0",),
            ("lambda-cyclip-512-0",),
            ("lambda-cyclip-512-128",),
            (),
            ("warmup-512-512-0",),
        ],
        ("1,024", "1,280", "0"): [
            ("clip-0, 20 epochs", "clip-0, 20 epochs, again"),
            (),
            ("cyclip-0, 20 epochs", "cyclip-0, 20 epochs, again", "cyclip-1024-20-0"),
            ("quarter-0, 20 epochs",),
            ("warmup-512-1024-20-0",),
        ],
        ("1,024", "1,280", "1"): [
            ("clip-1, 20 epochs", "clip-1, 20 epochs, again"),
            (),
            ("cyclip-1, 20 epochs", "cyclip-1, 20 epochs, again"),
            ("quarter-1, 20 epochs",),
            (),
        ],
        ("1,024", "1,280", "2"): [
            ("clip-2, 20 epochs",),
            (),
            ("cyclip-2, 20 epochs",),
            (),
            (),
        ],
        ("128", "4,096", "0"): [
            ("lambda-clip-128-0",),
            ("lambda-cyclip-128-0",),
            ("lambda-cyclip-128-0",),  # the same formula
            (),
            ("warmup-512-128-0",),
        ],
    }
    page = (ROOT / "docs/lambda.md").read_text()
    table = page.partition("\n| batch | steps | seed |")[2].partition("\n\n")[0]
    lines = table_rows(table)[1:]  # after the heading, which `partition` cut off
    assert [tuple(line[:3]) for line in lines] == list(rows)
    for line, runs in zip(lines, rows.values(), strict=True):
        expected = [", ".join(recalls[run] for run in cell) or "–" for cell in runs]
        assert line[3:] == expected


def test_speed_and_memory_in_the_readme_match_the_linked_record() -> None:
    cost = {(row["N"], row["D"], row["loss"]): row for row in recorded_costs()}
    losses = (
        "authors' formula",
        "authors' formula, torch.compile",
        "open_clip.ClipLoss, no penalties",
    )
    rows = [(8192, "ms", 1000, "s"), (8192, "peak MB", 1, "MB"), (128, "ms", 1, "ms")]
    shown_rows = readme_cells("Speed and memory")
    for (n, column, per_unit, unit), shown in zip(rows, shown_rows, strict=True):
        ours = cost[n, 512, "CyCLIPLoss"][column]
        ratios = [cost[n, 512, loss][column] / ours for loss in losses]
        assert shown[0].endswith(f" {unit}")
        assert all(ratio.endswith(" ×") for ratio in shown[1:])
        for text, number in zip(shown, (ours / per_unit, *ratios), strict=True):
            digits = text.split()[0]
            assert digits == f"{number:.{len(digits.partition('.')[2])}f}"


def test_rows_in_the_benchmarks_readme_are_lines_of_the_linked_records() -> None:
    """Checks the tables under the heading "What it found"."""
    section = BENCHMARKS.partition("## What it found")[2].partition("\n## ")[0]
    pages = [RESULTS / name for name in re.findall(r"\]\(results/(.*?\.md)\)", section)]
    recorded = {line for page in pages for line in page.read_text().splitlines()}
    shown = re.findall(r"^\| \d.*", section, re.MULTILINE)
    assert len(shown) > 10
    assert [line for line in shown if line not in recorded] == []
    # The rows in which the library is slower than others must be among them.
    for start in ("| 2,048 | 1,024 |", "| 512 | 512 |"):
        assert sum(line.startswith(start) for line in shown) == 2
    assert sum(line.startswith("| 256 |") for line in shown) == 1


def test_each_record_is_listed_with_its_command_version_and_duration() -> None:
    records = [path for path in RESULTS.glob("*.json") if path.with_suffix(".md").exists()]
    assert records
    for path in records:
        record = json.loads(path.read_text())
        (line,) = [x for x in BENCHMARKS.splitlines() if f"(results/{path.stem}.md)" in x]
        _, command, version, duration, _ = (cell.strip() for cell in line.split(" |"))
        assert command == f"`{record['command']}`"
        versions = record["versions"]
        assert version.split(",")[0] == versions.get("commit", versions.get("cyclip_loss"))
        assert duration == f"{record['seconds'] / 60:.0f} minutes"
