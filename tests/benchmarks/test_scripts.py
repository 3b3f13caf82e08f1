"""The benchmark scripts run on real data, write the figures they print, and make tables of them."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest

from benchmarks.blocks import ORDERS

ROOT = Path(__file__).parents[2]


def run(script: str, data: Path, folder: Path, *more: str) -> tuple[dict, str]:
    return run_sized(script, folder, "--data", str(data), *more)


def run_sized(script: str, folder: Path, *options: str) -> tuple[dict, str]:
    """A benchmark's figures and what it printed; without --data it simulates its own.

    Its tables and its summary are made too.
    """
    words = [f"benchmarks.{script}", "--json", str(folder / "figures.json"), *options]
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, cwd=folder, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((folder / "figures.json").read_text())
    module = importlib.import_module(f"benchmarks.{script}")
    assert module.summary(figures)
    for name, table in module.tables(figures).items():
        assert name.split()[0] == script
        assert "nan" not in table
    return figures, done.stdout


@pytest.fixture(scope="module")
def census(shared_data, tmp_path_factory) -> Path:
    """Every third row of Census-Income."""
    some = tmp_path_factory.mktemp("census")
    name = "census-income.data.gz"
    with (
        gzip.open(shared_data / "census-income" / name, "rt") as whole,
        gzip.open(some / name, "wt") as file,
    ):
        file.writelines(list(whole)[::3])
    return some


@pytest.mark.slow
@pytest.mark.real
def test_model_family(census, tmp_path):
    options = ("--models", "mmoe", "--seeds", "2", "--epochs", "1", "--picture", "family.png")
    figures, printed = run("model_family", census, tmp_path, *options)
    found = figures["census"]
    assert found["reference"] == "single_task"
    assert set(found["models"]) == {"single_task", "mmoe"}
    income = found["models"]["mmoe"]["objectives"]["income_50k"]
    assert len(income["auc_by_seed"]) == 2
    assert income["interval"][0] < income["auc"] < income["interval"][1]
    assert income["gain"]["verdict"] in ("helped", "hurt", "undecided")
    assert f"{income['auc']:.4f}" in printed
    assert (tmp_path / "family.png").stat().st_size > 5_000


@pytest.mark.slow
@pytest.mark.real
def test_experts_and_balancing(census, tmp_path):
    common = ("--seeds", "1", "--epochs", "1", "--picture", "p.png")
    sizes = ("--experts", "1", "2", "--units", "8", "--total", "16")
    figures, printed = run("experts", census, tmp_path, *sizes, *common)
    assert set(figures["census"]["models"]) == {"1 x 8", "2 x 8", "1 x 16"}
    assert "effective experts" in printed
    effective = figures["census"]["models"]["2 x 8"]["effective_experts"]
    assert 1 <= effective <= 2
    assert f"{effective:.2f}" in printed
    figures, _ = run("balancing", census, tmp_path, *common)
    methods = {"fixed", "normalised", "uncertainty", "dwa", "gradnorm", "pcgrad"}
    assert set(figures["census"]["models"]) == methods


@pytest.mark.slow
def test_known_truth(tmp_path):
    sizes = ("--impressions", "4000", "--trials", "1", "--seeds", "1", "--epochs", "2")
    figures, printed = run_sized("known_truth", tmp_path, *sizes)
    click = figures["click"]
    assert click["true probabilities"]["share"] == 1.0
    for name, found in click.items():
        if name not in ("item_popularity", "true probabilities"):
            assert found["auc"] < click["true probabilities"]["auc"]
    ours, low = click["mtl_ranker"], click["item_popularity"]["auc"]
    high = click["true probabilities"]["auc"]
    assert ours["share"] == pytest.approx((ours["auc"] - low) / (high - low))
    assert ours["auc"] != click["mtl_ranker, without matches"]["auc"]
    assert f"{ours['auc']:.4f}" in printed


@pytest.mark.slow
def test_latency(tmp_path):
    sizes = ("--impressions", "4000", "--times", "5")
    figures, printed = run_sized("latency", tmp_path, "--items", "200", *sizes)
    assert figures["items"] == 200
    assert figures["trees"] > 0
    assert max(figures["differences"].values()) < 1e-5
    for found in figures["forms"].values():
        assert 0 < found["p50"] <= found["p99"]
    assert "ONNX | feature rows" in printed


@pytest.mark.slow
def test_blend_weights(feed, tmp_path):
    figures, printed = run("blend_weights", feed, tmp_path, "--preset", "simulated")
    assert figures["choices"]["the preset's"]["weights"]["click"] == 1.0
    assert f"{figures['choices']['proposed']['engagement']:.4f}" in printed


def third_of_users(kuairand: Path, target: Path) -> Path:
    """The log of one user in three, with the tables as they are."""
    for file in kuairand.glob("log/date=*/*.parquet"):
        part = target / file.relative_to(kuairand)
        part.parent.mkdir(parents=True)
        rows = pl.read_parquet(file, hive_partitioning=False)
        rows.filter(pl.col("user_id") % 3 == 0).write_parquet(part)
    for table in kuairand.glob("*.parquet"):
        (target / table.name).symlink_to(table.resolve())
    return target


@pytest.mark.slow
@pytest.mark.real
def test_quality(shared_data, tmp_path):
    sizes = ("--train-days", "2", "--test-days", "1", "--seeds", "1", "--trials", "1")
    options = ("--no-tuned", "--threads", "1", "--fourth", "none")  # comments are too rare here
    kuairand = third_of_users(shared_data / "kuairand-pure", tmp_path / "kuairand")
    figures, printed = run("quality", kuairand, tmp_path, *sizes, *options)
    objectives = {"is_click", "long_view", "is_like"}
    models = figures["models"]
    base_rate = models["base_rate"]
    assert {name: each["auc"] for name, each in base_rate.items()} == dict.fromkeys(objectives, 0.5)
    assert models["item_popularity"]["is_click"]["interval"]["gauc"][0] > 0.5
    assert {f"LightGBM {name}" for name in ("lambdarank", "rank_xendcg")} < set(models)
    assert figures["lists"]["is_click"]["both"] < figures["lists"]["is_click"]["lists"]
    ours, theirs = models["mtl_ranker (mmoe), trees, refit"], models["LightGBM"]
    assert set(ours) == set(models["logistic regression"]) == objectives
    click, other = ours["is_click"], theirs["is_click"]
    assert min(click["auc"], other["auc"]) > 0.65
    assert click["gain"]["auc"][0] == pytest.approx(click["auc"] - other["auc"])
    assert f"{click['auc']:.4f}" in printed


@pytest.mark.slow
@pytest.mark.real
def test_training_speed(census, tmp_path):
    for peer in ("torch_rechub", "deepctr_torch"):
        if importlib.util.find_spec(peer) is None:
            pytest.skip(f"{peer} is not installed: pip install -c constraints.txt -e '.[bench]'")
    options = ("--epochs", "1", "--repeats", "1", "--threads", "1")
    figures, _ = run("training_speed", census, tmp_path, *options)
    found = figures["census"]["libraries"]
    assert set(found) == {"mtl_ranker", "torch-rechub", "DeepCTR-Torch"}
    for library in found.values():
        assert library["train_rows_per_second"] > 0
        assert all(0 < value < 1 for value in library["auc"].values())
    counts = [library["parameters"] for library in found.values()]
    assert max(counts) < 1.05 * min(counts)


@pytest.mark.slow
def test_scale_and_sizing(tmp_path):
    options = ("--impressions", "40000", "--days", "11", "--candidates", "5000", "--per-user", "50")
    figures, printed = run_sized("scale", tmp_path, *options)
    found = figures["40000"]
    assert found["ingest"]["rows"] == found["aggregates"]["rows"] > 39_000
    assert found["scoring"]["rows"] == 5_000
    assert all(found[stage]["seconds"] > 0 for stage in found if stage != "limits")
    assert all(found[stage]["peak_mb"] > 50 for stage in found)
    assert "hand-written polars" in printed
    (tmp_path / "figures.json").rename(tmp_path / "scale.json")
    figures, printed = run_sized("sizing", tmp_path, "scale.json", "--impressions", "1e6")
    rate = found["ingest"]["rows"] / found["ingest"]["seconds"]
    assert abs(figures["ingest"]["hours"] * 3600 * rate - 1e6) < 1


@pytest.mark.slow
def test_increment(tmp_path):
    sizes = ("--day-rows", "2000", "--history", "7", "9", "--repeats", "1")
    figures, _ = run_sized("increment", tmp_path, *sizes)
    assert set(figures) == {"7", "9"}
    assert figures["9"]["rebuild"]["rows"] > figures["7"]["rebuild"]["rows"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads are counted by Linux only")
def test_blocks(tmp_path):
    """The script fails where the examples of the two orders differ."""
    sizes = ("--day-rows", "300000", "--days", "2", "--blocks", "2")
    figures, _ = run_sized("blocks", tmp_path, *sizes)
    read = {order: sum(b["read"] for b in figures[order]["blocks"]) for order in ORDERS}
    assert len(figures["by user"]["blocks"]) == 2
    assert read["by user"] < 0.75 * read["by time"]


@pytest.mark.slow
@pytest.mark.real
def test_suite_speed_agrees(census, tmp_path):
    options = ("--seeds", "1", "--epochs", "1")
    figures, _ = run("suite_speed", census, tmp_path, *options)
    assert figures["census"]["equal"] is True
    assert len(figures["census"]["ways"]) == 3


@pytest.mark.slow
def test_vocabulary(tmp_path):
    sizes = ("--values", "500", "--rows", "2000", "--batch", "256")
    figures, _ = run_sized("vocabulary", tmp_path, *sizes)
    assert figures["500"]["sparse"]["rows"] == figures["500"]["dense"]["rows"] == 2_000
    assert figures["500"]["ratio"] > 0


@pytest.mark.slow
def test_closed_loop(tmp_path):
    sizes = ("--seeds", "1", "--nights", "2", "--users", "120", "--items", "150")
    options = ("--impressions", "9000", "--candidates", "30", "--picture", "curves.png")
    figures, printed = run_sized("closed_loop", tmp_path, *sizes, *options)
    (world,) = figures["worlds"]
    for policy, found in world.items():
        assert len(found["nights"]) == 2, policy
        for facts in found["nights"]:
            assert 0 < facts["regret"] < 0.6
            assert facts["likes"] < facts["clicks"]
            assert (facts["exploration"] < 0) == (policy == "mmoe, exploration")
    # The first night's lists are of the same model; then half of the lists are explored.
    plain, exploring = (world[p]["nights"][0] for p in ("mmoe", "mmoe, exploration"))
    assert exploring["items"] > plain["items"]
    assert world["mmoe"]["nights"][0] == world["mmoe, promoted"]["nights"][0]
    (challenger,) = world["mmoe, promoted"]["challengers"]  # the first model has no champion
    assert challenger["promoted"] == (world["mmoe, promoted"]["models"] == 2)
    assert -0.5 < challenger["true_gain"] < 0.5
    assert ("LightGBM" in world) == (find_spec("lightgbm") is not None)
    assert ("without LightGBM" in printed) == ("LightGBM" not in world)
    assert all(facts["present"] < 0.9 for own in world.values() for facts in own["nights"])
    later = world["mmoe"]["estimates"][2:]
    assert all("no list was randomised" in each["refused"] for each in later)
    assert f"{exploring['regret']:.3f}"[:3] in printed
    assert (tmp_path / "curves.png").stat().st_size > 5_000


@pytest.mark.slow
def test_histories(tmp_path):
    sizes = ("--impressions", "20000", "--seeds", "1")
    figures, printed = run_sized("histories", tmp_path, *sizes)
    without, attended = (
        figures[name]["objectives"]["click"] for name in ("without", "clicks and likes, topic")
    )
    difference = attended["auc"] - without["auc"]
    assert attended["over_reference"]["auc"][0] == pytest.approx(difference)
    assert attended["auc"] != without["auc"]
    assert f"{attended['auc']:.4f}" in printed


@pytest.mark.slow
def test_verdicts(tmp_path):
    """A/A: the same model with other seeds; the interval of the false rate includes 5 % or less.

    Coverage: the interval of every rate includes 95 % or more.
    """
    sizes = ("--feeds", "1", "--nights", "10", "--planted", "2", "--impressions", "12000")
    sizes = ("--known", "40", "--population", "2000", *sizes)
    options = (*sizes, "--judged-rows", "20000", "--threads", "1")
    figures, printed = run_sized("verdicts", tmp_path, *options)
    one, *several = figures["false"]
    assert one["any"]["after"] == {**one["any"]["after"], "hits": 0, "of": 10}
    assert one["any"]["before"]["low"] > 0.05  # a bootstrap over users calls one seed different
    for each in several:
        assert each["any"]["after"]["low"] <= 0.05
        assert each["promoted"]["low"] <= 0.05
    largest = [p for p in figures["power"] if p["share"] == 0.05 and p["seeds"] == 3]
    assert max(p["after"]["hits"] / p["after"]["of"] for p in largest) >= 0.5
    assert "promoted by luck" in printed
    known = figures["known"]
    # Of heavy tails (watch) fewer are covered, and 2,000 users are no exact truth.
    assert all(each["rate"]["high"] > 0.9 for each in known["coverage"])
    kinds = {"quality", "gain, none planted", "promotion", "calibration", "blend weights", "slice"}
    assert kinds < {each["interval"] for each in known["coverage"]}
    assert {"click list GAUC", "click AUC"} < {each["of"] for each in known["verdicts"]}
    for each in known["verdicts"]:
        if each["planted"] == "none":
            assert each["rate"]["low"] <= 0.05
    found = [
        v["rate"]["hits"] for v in known["verdicts"] if (v["planted"], v["seeds"]) == ("1.2", 3)
    ]
    assert min(found) > 20


@pytest.mark.slow
@pytest.mark.real
def test_streams(shared_data, tmp_path):
    """Four days as streams: with ids all is equal; without, all but ambiguous rows."""
    data = tmp_path / "data"
    kuairand = shared_data / "kuairand-pure"
    for day in sorted((kuairand / "log").iterdir())[:4]:
        (data / "log").mkdir(parents=True, exist_ok=True)
        (data / "log" / day.name).symlink_to(day)
    for table in kuairand.glob("*.parquet"):
        (data / table.name).symlink_to(table)
    figures, printed = run("streams", data, tmp_path)
    assert figures["with ids"]["equal"]
    assert figures["without ids, no ambiguous row"]["equal"]
    assert figures["without ids"]["labels"] == figures["without ids"]["ambiguous"]
    assert f"{figures['with ids']['rows']:,}" in printed


@pytest.mark.slow
def test_actions(tmp_path):
    sizes = ("--impressions", "20000", "--actions", "5000", "--repeats", "1")
    figures, printed = run_sized("actions", tmp_path, *sizes)
    assert figures["pipeline"]["joined"] == figures["by_hand"]["joined"] > 3_000
    assert f"{figures['pipeline']['joined']:,}" in printed


@pytest.mark.slow
def test_incremental(tmp_path):
    """Every arm but scratch continues after its first night, on fewer rows."""
    sizes = ("--days", "13", "--rows", "1500", "--epochs", "2", "--threads", "1")
    figures, printed = run_sized("incremental", tmp_path, *sizes)
    found = figures["simulated"]
    arms = found["arms"]
    assert found["nights"] == 1
    assert [arm["continued"] for arm in arms.values()] == [0, *[1] * (len(arms) - 1)]
    scratch = arms["scratch"]
    assert all(q["gain"] == 0 for q in scratch["quality"].values())
    assert arms["replay 0"]["training_seconds"] > 0
    assert arms["replay 0"]["quality"]["click"]["gain"] != 0
    assert f"{scratch['quality']['click']['quality']:.4f}" in printed


@pytest.mark.slow
def test_combine(tmp_path):
    figures, printed = run_sized("combine", tmp_path, "--repeats", "1", "--threads", "1")
    for by_mode in figures["shapes"].values():
        assert set(by_mode) == {"inference", "training"}
        assert all(milliseconds > 0 for pair in by_mode.values() for milliseconds in pair)
    assert "times faster in training" in printed


@pytest.mark.slow
def test_delays(tmp_path):
    """Soft labels are better calibrated than positives alone, which lack the recent negatives."""
    sizes = ("--impressions", "24000", "--days", "10", "--epochs", "2", "--seeds", "1")
    figures, printed = run_sized("delays", tmp_path, *sizes, "--threads", "1")
    ways = figures["ways"]
    ratio = {way: found["ratio"][0] for way, found in ways.items()}
    assert ratio["soft, p the base rate"] < ratio["positives"]
    assert ratio["as observed"] < ratio["soft, p the base rate"]
    assert (ways["wait"]["last_day"], ways["positives"]["last_day"]) == (-4, -1)
    for found in ways.values():
        assert 0.5 < found["auc"][0] < figures["true"][0]
    assert f"{ways['wait']['auc'][0]:.4f}" in printed
