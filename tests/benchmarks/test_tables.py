"""Results are kept with their circumstances, and the documentation is rendered from them."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import closed_loop, markdown, results, scoring_speed, tables, training_speed

FIGURES = {
    "replicas": 2,
    "threads": 1,
    "models": {"mmoe": {"alone": 1_000.0, "together": 8_250.0, "ratio": 8.25}},
}


@pytest.fixture
def saved(tmp_path):
    """A folder with a result of `replicas`."""
    content = results.record("replicas", ["--replicas", "2"], FIGURES)
    (tmp_path / "replicas.json").write_text(json.dumps(content))
    return tmp_path


def test_every_script_has_an_entry_in_the_index():
    index = tables.INDEX.read_text()
    for script in tables.scripts():
        assert f"[`{script}`]({script}.py)" in index
        assert f"<!-- figures: {script} -->" in index
        module = importlib.import_module(f"benchmarks.{script}")
        assert callable(module.main)
        assert callable(module.summary)
    named = set(re.findall(r"<!-- figures: (\w+) -->", index))
    assert named == set(tables.scripts())


def test_links_of_the_index_lead_to_pages():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", tables.INDEX.read_text()):
        assert (tables.INDEX.parent / target).is_file(), target


def test_pages_agree_with_the_results():
    found = tables.rendered()
    assert tables.update(tables.pages(), found, write=False) == []


def test_marked_tables_are_made_by_a_script():
    scripts = tables.scripts()
    for page in tables.pages():
        for _, kind, name, _, _ in tables.MARKED.findall(page.read_text()):
            assert kind == "figures" or name.split()[0] in scripts, f"{page}: {name}"


def test_a_result_is_kept_with_its_circumstances(saved):
    content = json.loads((saved / "replicas.json").read_text())
    assert content["command"] == "python -m benchmarks.replicas --replicas 2"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", content["date"])
    assert {"cpu", "cores", "threads", "torch"} <= set(content["machine"])
    assert content["seconds"] >= 0
    assert results.read(saved / "replicas.json") == FIGURES


def test_commands_name_no_path_of_this_machine():
    options = [
        "--data",
        "/somewhere/kuairand-pure",
        "--json",
        "/tmp/x.json",
        "--save",
        "--seeds",
        "3",
    ]
    found = results.command("quality", options)
    assert found == "python -m benchmarks.quality --data .../kuairand-pure --seeds 3"


def test_places_with_a_result_are_replaced_and_others_stay(saved):
    found = tables.rendered(saved)
    page = (
        "a\n\n<!-- table: replicas -->\n\nold\n\n<!-- end -->\n\nb\n\n"
        "<!-- table: devices -->\n\nkept\n\n<!-- end -->\n"
        "| <!-- figures: replicas -->old<!-- end --> | <!-- figures: scale --><!-- end --> |\n"
    )
    new = tables.updated(page, found)
    row = "| mmoe | 1,000 | 8,250 | 8.2 |"
    assert row in new
    assert "kept" in new
    assert "old" not in new
    assert "8.2 times (" in new
    assert f"<!-- figures: scale -->{tables.NOT_RUN}<!-- end -->" in new
    assert tables.updated(new, found) == new


def test_check_fails_on_a_difference(saved):
    words = [sys.executable, "-m", "benchmarks.tables", "--check", "--results", str(saved)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tables.ROOT)
    assert done.returncode == 1, done.stderr
    assert "README.md: differs from the results" in done.stdout


def test_markdown():
    assert markdown.table(["a", "b"], [["1", ""]]) == "| a | b |\n| --- | --- |\n| 1 |  |"
    with pytest.raises(ValueError, match="2 headings"):
        markdown.table(["a", "b"], [["1"]])
    assert markdown.gain(0.01, 0.005, 0.02, 1) == "**+0.0100 [+0.0050, +0.0200]**"
    assert markdown.gain(0.01, -0.005, 0.02, 0) == "+0.0100 [-0.0050, +0.0200]"
    assert markdown.span([33.2, 54.0]) == "33 to 54"
    assert markdown.span([1.0, 1.2]) == "1"


def test_tables_of_scripts_whose_peers_may_be_missing():
    """The figures of the documentation, in the form in which the scripts write them."""
    rates = {"train_rows_per_second": 495_661.2, "predict_rows_per_second": 3_994_907.0}
    ours = rates | {"predict_rows_per_second_large": 3_994_907.0}
    peer = {"train_rows_per_second": 102_862.0, "train_ratio": 4.82}
    peer |= {"predict_rows_per_second": 389_842.0, "predict_ratio": 10.24}
    peer |= {"predict_rows_per_second_large": 444_115.0, "predict_ratio_large": 9.0}
    figures = {"census": {"libraries": {"mtl_ranker": ours, "DeepCTR-Torch": peer}}}
    found = training_speed.tables(figures)["training_speed census"].splitlines()
    assert found[2] == "| mtl_ranker | 495,661 |  | 3,994,907 |  | 3,994,907 |  |"
    assert found[3] == "| DeepCTR-Torch | 102,862 | 4.8x | 389,842 | 10.2x | 444,115 | 9.0x |"
    assert "4.8 and 10.2 times DeepCTR-Torch" in training_speed.summary(figures)
    figures = {
        "scoring": {"per_second": 1_198_095.0, "peak_mb": 873.0, "ratio": 1.0},
        "pandas_and_deepctr": {"per_second": 112_324.0, "peak_mb": 2_985.0, "ratio": 10.67},
    }
    found = scoring_speed.tables(figures)["scoring_speed"].splitlines()
    assert found[3] == "| DeepCTR-Torch, pandas | 112,324 | 2,985 | 10.7 times slower |"


def test_challengers_and_nights_of_the_closed_loop_by_hand():
    """Gains of 1 and 3 % let through, -2 % held back with an estimate of the wrong sign."""

    def challenger(promoted: bool, gain: float, estimate: float | None) -> dict[str, Any]:
        own = None if estimate is None else [estimate, estimate - 1, estimate + 1]
        return {"promoted": promoted, "true_gain": gain, "estimate": own}

    found = [challenger(True, 0.01, 0.2), challenger(True, 0.03, None)]
    same = {"homogeneity": 0.2, "clicks_per_row": 0.2, "likes_per_row": 0.05}
    nights = [{"regret": 0.1 * n} | same for n in range(12)]
    worlds = [
        {closed_loop.PROMOTED: {"challengers": found[:1], "nights": nights}},
        {
            closed_loop.PROMOTED: {
                "challengers": [found[1], challenger(False, -0.02, 0.1)],
                "nights": nights,
            }
        },
    ]
    through, back = closed_loop.challenger_rows({"worlds": worlds})
    # The standard error is 1 %, and the quantile of Student's t with one degree of freedom 12.7.
    assert through == ["let through", "2", "+2.00% [-10.71%, +14.71%]", "2", "1 of 1"]
    assert back == ["held back", "1", "–", "0", "0 of 1"]
    lines = closed_loop.by_night({"worlds": worlds}, "regret").splitlines()
    assert lines[0].split(" | ")[1] == "night 1"
    assert lines[0].count("night") == closed_loop.SHOWN
    assert lines[0].endswith("| night 12 |")
    assert lines[2].endswith("| 1.100 ± 0.000 |")
    (row,) = closed_loop.homogeneity_rows({"worlds": worlds})
    assert row[1:4] == ["0.200", "0.200", "+0.000 [+0.000, +0.000]"]
    assert row[4] == "0.300"  # 0.2 clicks and twice 0.05 likes


@pytest.mark.slow
@pytest.mark.parametrize("how", [["-m", "benchmarks.sizing"], ["benchmarks/sizing.py"]])
def test_scripts_run_as_module_and_by_path(how):
    done = subprocess.run(
        [sys.executable, *how, "--help"], capture_output=True, text=True, cwd=tables.ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "--save" in done.stdout
