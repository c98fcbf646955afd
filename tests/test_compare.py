"""Runs side by side: what the table says follows from the files, and what does not compare is said."""

from __future__ import annotations

import builtins
import io
import json
import random
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from rich.console import Console

from bonn_plugin.compare import Comparison, compare_runs, pareto_front, to_markdown, to_terminal
from bonn_plugin.compare.columns import duration
from bonn_plugin.compare.method import method_of
from bonn_plugin.errors import BonnError
from bonn_plugin.recipe import parse_recipe
from tests.small import RECIPE, Command, run_here

# --- the front ------------------------------------------------------------------------------------


def slow_front(points: list[tuple[float, float]]) -> tuple[bool, ...]:
    """Each point against each."""

    def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    return tuple(not any(dominates(other, point) for other in points) for point in points)


@pytest.mark.parametrize("seed", range(200))
def test_the_front_is_that_of_comparing_all_pairs(seed: int) -> None:
    draw = random.Random(seed)
    few = draw.choice([2, 4, 50])  # few values: ties and equal points
    points = [(float(draw.randrange(few)), float(draw.randrange(few))) for _ in range(draw.randrange(30))]
    assert pareto_front(points) == slow_front(points)


def test_equal_points_are_on_the_front_together() -> None:
    assert pareto_front([(1, 5), (1, 5), (2, 5), (1, 4), (3, 6)]) == (True, True, False, False, True)
    assert pareto_front([]) == ()


# --- folders --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    place = tmp_path_factory.mktemp("run")
    (place / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(patch, "compress", place / "recipe.yaml", "--out", place / "run", "--device", "cpu") == 0
    return place / "run"


def like(run: Path, place: Path, *, report: dict[str, Any] | None = None, **changed: str) -> Path:
    """Copy a run; ``report`` has changes of report.json by dotted key, ``changed`` texts to replace in recipe.yaml."""
    shutil.copytree(run, place)
    found = json.loads((place / "report.json").read_text())
    for key, value in (report or {}).items():
        *path, last = key.split(".")
        part = found
        for name in path:
            part = part[name]
        part[last] = value
    (place / "report.json").write_text(json.dumps(found))
    text = (place / "recipe.yaml").read_text()
    for old, new in changed.values():
        assert old in text
        text = text.replace(old, new)
    (place / "recipe.yaml").write_text(text)
    return place


def with_seed(run: Path, place: Path, seed: int, **report: Any) -> Path:
    return like(run, place, report=report, seed=("  epochs: 1\n", f"  epochs: 1\n  seed: {seed}\n"))


def benched(place: Path, milliseconds: float, eager: float = 2.0, cpu: str = "a CPU") -> Path:
    """Give a run a bench.json."""
    speeds = [
        {"engine": engine, "threads": threads, "latency_ms": ms * (3 - threads), "latency_p95_ms": ms, "calls": 9}
        | {"batch": 8, "images_per_second": 1.0}
        for engine, ms in (("torch eager fp32", eager), ("OpenVINO 1-bit", milliseconds))
        for threads in (2, 1)
    ]
    empty: dict[str, Any] = {"versions": {}, "layers": [], "files": {}, "memory": [], "notes": []}
    bench = {"network": "bonn_wrn22_16", "input_shape": [1, 3, 8, 8], "cpu": cpu, "speeds": speeds, **empty}
    (place / "bench.json").write_text(json.dumps(bench))
    return place


@pytest.fixture
def two(run: Path, tmp_path: Path) -> list[Path]:
    """A run, and one that is better and larger."""
    larger = {"accuracy.packed_top1": 99.0, "operations.ops": 1e6, "files.rate": 2.0}
    return [like(run, tmp_path / "one"), with_seed(run, tmp_path / "two", 7, **larger)]


def said(comparison: Comparison) -> str:
    return "\n".join(comparison.warnings)


def test_the_figures_are_those_of_the_report(run: Path, two: list[Path]) -> None:
    report = json.loads((run / "report.json").read_text())
    one, other = compare_runs(two).runs
    assert (one.label, one.name, one.network, one.task) == ("one", "small", "bonn_wrn22_16", "classification")
    assert (one.top1, one.top5) == (report["accuracy"]["packed_top1"], report["accuracy"]["packed_top5"])
    assert one.bits == sum(row["needed_bits"] for row in report["roles"])
    assert one.rate == report["rates"][0]["rate"]
    assert (one.file_rate, one.ops) == (report["files"]["rate"], report["operations"]["ops"])
    assert (one.seed, other.seed) == (0, 7)
    (record,) = map(json.loads, (run / "training" / "metrics.jsonl").read_text().splitlines())
    assert one.seconds == record["seconds"]
    assert (one.latency_ms, one.exported) == (None, None)


def test_the_best_of_each_column_is_marked_and_equal_ones_are_not(two: list[Path]) -> None:
    best = compare_runs(two).best
    assert best["top1"] == ("two",)
    assert best["ops"] == ("one",)
    assert "bits" not in best
    text = to_markdown(compare_runs(two))
    assert "| **99.00** |" in text
    assert "| **1.00e+06** |" not in text


def test_the_fronts_are_marked(run: Path, two: list[Path], tmp_path: Path) -> None:
    worse = with_seed(run, tmp_path / "worse", 8, **{"accuracy.packed_top1": 1.0, "operations.ops": 1e7})
    fronts = compare_runs([*two, worse]).fronts
    assert fronts == {"bits": ("two",), "ops": ("one", "two")}


def test_differences_are_to_the_first_run(two: list[Path]) -> None:
    comparison = compare_runs(two)
    one, _ = comparison.runs
    assert one.top1 is not None
    (row,) = [line for line in to_markdown(comparison).splitlines() if line.startswith("| two | +")]
    assert f"+{99.0 - one.top1:.2f}" in row
    assert f"×{1e6 / one.ops:.2f}" in row


def test_runs_that_differ_by_seed_alone_are_summarised(run: Path, tmp_path: Path) -> None:
    scores = [90.0, 92.5, 97.0]
    places = [with_seed(run, tmp_path / f"s{i}", i, **{"accuracy.packed_top1": s}) for i, s in enumerate(scores)]
    other = like(run, tmp_path / "other", loss=("lambda: 0.001", "lambda: 0.01"))
    renamed = with_seed(run, tmp_path / "renamed", 9, **{"accuracy.packed_top1": 90.0})
    (renamed / "recipe.yaml").write_text((renamed / "recipe.yaml").read_text().replace("name: small", "name: named"))
    (group,) = compare_runs([*places, other, renamed]).groups
    assert group.labels == ("s0", "s1", "s2", "renamed")
    assert group.seeds == (0, 1, 2, 9)
    assert group.spreads["top1"].mean == pytest.approx(mean([*scores, 90.0]))
    assert group.spreads["top1"].deviation == pytest.approx(stdev([*scores, 90.0]))
    assert "92.38 ± 3.30" in to_markdown(compare_runs([*places, other, renamed]))


def test_one_seed_twice_is_no_spread_and_is_told(run: Path, tmp_path: Path) -> None:
    comparison = compare_runs([like(run, tmp_path / "a"), like(run, tmp_path / "b")])
    assert comparison.groups == ()
    assert "one recipe and one seed, so not independent: a, b" in comparison.warnings


def test_settings_that_differ_are_named(run: Path, two: list[Path], tmp_path: Path) -> None:
    other = like(run, tmp_path / "other", loss=("lambda: 0.001", "lambda: 0.01"))
    plain = like(run, tmp_path / "plain", loss=("- type: kernel_loss\n  lambda: 0.001\n  nu: 0.01\n", ""))
    found = {setting.key: setting.values for setting in compare_runs([*two, other, plain]).settings}
    assert found == {
        "training.seed": ("0", "7", "0", "0"),
        "kernel_loss": ("kernel_loss", "kernel_loss", "kernel_loss", None),
        "kernel_loss.lambda": ("0.001", "0.001", "0.01", None),
    }
    assert "| kernel_loss.lambda | 0.01 (other), - (plain), 0.001 (one, two) |" in to_markdown(
        compare_runs([*two, other, plain])
    )


def test_a_methods_own_defaults_are_not_told() -> None:
    start = RECIPE.partition("modifiers")[0] + "modifiers:\n  - {type: binarize, method: "
    assert method_of(parse_recipe(start + "bireal}\n")) == "bireal"
    assert method_of(parse_recipe(start + "bireal, ste: clip}\n")) == "bireal(ste clip)"


def test_a_method_is_told_in_short() -> None:
    short = "{type: binarize, ste: polynomial, threshold: always}"
    text = RECIPE.replace(r"{type: binarize, targets: ['re:layer[1-3]\.\d\.conv[12]'], expect: 6}", short)
    assert text != RECIPE
    assert method_of(parse_recipe(text)) == "bonn(ste polynomial, threshold always) + kernel_loss"
    assert method_of(parse_recipe(RECIPE)) == "bonn + kernel_loss"
    assert method_of(parse_recipe(RECIPE.partition("modifiers")[0])) == "full precision"


@pytest.mark.parametrize(("seconds", "text"), [(4.25, "4.2 s"), (185, "3 min 05 s"), (7640, "2 h 07 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- speed ----------------------------------------------------------------------------------------


def test_speed_is_that_of_one_thread_and_what_lacks_it_has_its_command(two: list[Path]) -> None:
    comparison = compare_runs([benched(two[0], 0.25), two[1]])
    one, other = comparison.runs
    assert (one.latency_ms, one.speedup, one.cpu) == (0.5, 8.0, "a CPU")
    assert other.latency_ms is None
    assert f"speed not measured: two; bonn bench {two[1]}" in comparison.notes
    assert f'no export: one, two; for run in {two[0]} {two[1]}; do bonn export "$run"; done' in comparison.notes
    assert "| two | - | - |" in to_markdown(comparison)


def test_speeds_of_two_cpus_are_told(two: list[Path]) -> None:
    text = said(compare_runs([benched(two[0], 0.25), benched(two[1], 0.25, cpu="another")]))
    assert "different CPUs, so latencies do not compare: a CPU (one); another (two)" in text


# --- what does not compare ------------------------------------------------------------------------


def test_runs_that_compare_have_no_warning(two: list[Path]) -> None:
    assert compare_runs(two).warnings == ()


def test_other_data_is_told(run: Path, two: list[Path], tmp_path: Path) -> None:
    digits = "data:\n  name: digits\n  size: 8\n"
    cifar = like(run, tmp_path / "cifar", data=(digits, "data: {name: cifar10, root: data}\n"))
    assert "different data sets: digits (one); cifar10 (cifar)" in said(compare_runs([two[0], cifar]))
    few = like(run, tmp_path / "few", data=(digits, "data: {name: digits, size: 8, per_class: 5}\n"))
    assert "different" not in said(compare_runs([two[0], few]))  # the test set is the same


def test_another_test_set_of_one_data_set_is_told(run: Path, tmp_path: Path) -> None:
    digits = "data:\n  name: digits\n  size: 8\n"
    folders = [
        like(run, tmp_path / name, data=(digits, f"data: {{name: imagefolder, root: {name}}}\n")) for name in "ab"
    ]
    assert "different test sets, data.root: a (a); b (b)" in said(compare_runs(folders))


def test_another_size_of_the_test_set_is_told(run: Path, two: list[Path], tmp_path: Path) -> None:
    fewer = with_seed(run, tmp_path / "fewer", 8, **{"accuracy.samples": 10})
    assert "different sizes of the test set: 450 (one); 10 (fewer)" in said(compare_runs([two[0], fewer]))


def test_another_input_size_is_told(run: Path, two: list[Path], tmp_path: Path) -> None:
    larger = like(
        run, tmp_path / "larger", report={"operations.input_shape": [3, 16, 16]}, size=("size: 8", "size: 16")
    )
    assert "different input sizes: 3 x 8 x 8 (one); 3 x 16 x 16 (larger)" in said(compare_runs([two[0], larger]))


def test_a_run_without_recipe_is_told(two: list[Path]) -> None:
    (two[1] / "recipe.yaml").unlink()
    comparison = compare_runs(two)
    assert "no recipe.yaml, so the data set is not known: two" in comparison.warnings
    assert (comparison.runs[1].method, comparison.runs[1].seed) == (None, None)


def test_a_run_without_accuracy_is_on_no_front(run: Path, two: list[Path], tmp_path: Path) -> None:
    bare = with_seed(run, tmp_path / "bare", 8, accuracy=None)
    comparison = compare_runs([*two, bare])
    assert "accuracy not measured, so on no front: bare" in comparison.notes
    assert comparison.fronts["bits"] == ("two",)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.fixture
def bonn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def precision(run: Path, place: Path) -> Path:
    """A run that looks like a detector's."""
    scores = {f"{kind}_map{at}": 0.5 for kind in ("trained", "packed") for at in ("", "50", "75")}
    return like(run, place, report={"accuracy": {"samples": 450, "identical_detections": True, **scores}})


def test_runs_of_different_tasks_are_a_mistake(bonn: Command, run: Path, two: list[Path], tmp_path: Path) -> None:
    result = bonn("compare", *two, precision(run, tmp_path / "detector"))
    assert result.status == 2
    assert result.lines == ["runs of different tasks can't be compared: classification: one, two; detection: detector"]


def test_detectors_are_compared_by_their_map(bonn: Command, run: Path, tmp_path: Path) -> None:
    one, other = (precision(run, tmp_path / name) for name in "ab")
    result = bonn("compare", benched(one, 0.25), other, "--format", "markdown")
    assert result.status == 0
    assert "- the latency is that of backbone and pyramid" in result.out
    assert "| run | mAP | mAP50 | mAP75 | bits |" in result.out


def test_mistakes_take_one_line(bonn: Command, run: Path, two: list[Path], tmp_path: Path) -> None:
    one, other = two
    (tmp_path / "empty").mkdir()
    unfinished = like(run, tmp_path / "unfinished")
    (unfinished / "report.json").unlink()
    damaged = like(run, tmp_path / "damaged")
    (damaged / "report.json").write_text((run / "report.json").read_text()[:100])
    lacking = like(run, tmp_path / "lacking", report={"files": {"weights": 1}})
    unrated = like(run, tmp_path / "unrated", report={"rates": []})
    bad_recipe = like(run, tmp_path / "bad_recipe", key=("  epochs: 1\n", "  epoch: 1\n"))
    bad_bench = like(run, tmp_path / "bad_bench")
    (bad_bench / "bench.json").write_text("{}")
    bad_metrics = like(run, tmp_path / "bad_metrics")
    (bad_metrics / "training" / "metrics.jsonl").write_text("1\n")
    bad_export = like(run, tmp_path / "bad_export")
    (bad_export / "openvino").mkdir()
    for args, words in (
        ([one], "needs two runs or more"),
        ([one, one], "is there twice"),
        ([one, tmp_path / "empty" / ".." / "one"], "are one folder"),
        ([one, tmp_path / "none"], "no such folder"),
        ([one, tmp_path / "empty"], "no report.json, not a run"),
        ([one, unfinished], "no report.json, it is not finished: bonn compress RECIPE --resume"),
        ([one, damaged], "damaged/report.json: damaged"),
        ([one, lacking], "lacking/report.json: damaged, at files."),
        ([one, unrated], "it has no rate by parameters"),
        ([one, bad_recipe], "did you mean 'epochs'?"),
        ([one, bad_bench], "bench.json: damaged, at network"),
        ([one, bad_metrics], "metrics.jsonl: not the metrics of a run"),
        ([one, bad_export], "bad_export"),
        ([one, other, "--plot", "front.pdf"], "unknown ending '.pdf': .png or .svg"),
        ([one, other, "--plot", "front"], "unknown ending ''"),
        ([one, other, "--format", "xml"], "unknown format 'xml'"),
    ):
        result = bonn("compare", *args)
        assert (result.status, len(result.lines)) == (2, 1), (args, result)
        assert words.lower() in result.err.lower(), (words, result.err)


def test_a_missing_matplotlib_is_told_before_anything_is_read(
    bonn: Command, two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        result = bonn("compare", *two, "--plot", tmp_path / "front.png")
    assert (result.status, result.out) == (2, "")
    assert result.lines == ["--plot needs matplotlib: pip install 'bonn_plugin[plots]'"]


# --- the command ----------------------------------------------------------------------------------


def test_the_terminal_shows_warnings_first(bonn: Command, run: Path, two: list[Path], tmp_path: Path) -> None:
    fewer = with_seed(run, tmp_path / "fewer", 8, **{"accuracy.samples": 10})
    result = bonn("compare", two[0], fewer)
    assert result.status == 0
    assert result.out.startswith("warning: different sizes of the test set")
    assert "Differences to one" in result.out


def test_no_figure_is_cut_on_a_narrow_terminal(two: list[Path]) -> None:
    benched(two[0], 0.25)
    benched(two[1], 0.125)
    comparison = compare_runs(two)
    screen = io.StringIO()
    Console(file=screen, width=80).print(to_terminal(comparison))
    out = screen.getvalue()
    for run in comparison.runs:
        for text in (f"{run.top1:.2f}", f"{run.top5:.2f}", f"{run.bits:,}", f"{run.ops:.2e}", f"{run.latency_ms:.3f}"):
            assert text in out
    assert max(map(len, out.splitlines())) <= 80


def test_json_is_the_whole_comparison(bonn: Command, two: list[Path]) -> None:
    result = bonn("compare", *two, "--format", "json")
    assert Comparison.model_validate_json(result.out) == compare_runs(two)


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("b.svg", b"<?xml")])
def test_the_plot_is_drawn(name: str, start: bytes, bonn: Command, two: list[Path], tmp_path: Path) -> None:
    odd = two[1].rename(tmp_path / "$a_")
    result = bonn("compare", two[0], odd, "--plot", tmp_path / "plots" / name)
    assert (result.status, result.err) == (0, f"drawn: {tmp_path / 'plots' / name}\n")
    assert (tmp_path / "plots" / name).read_bytes().startswith(start)


def test_a_plot_of_nothing_measured_is_a_mistake(run: Path, tmp_path: Path) -> None:
    from bonn_plugin.compare import write_plot

    folders = [with_seed(run, tmp_path / f"s{i}", i, accuracy=None) for i in range(2)]
    with pytest.raises(BonnError, match="no run's accuracy was measured"):
        write_plot(compare_runs(folders), tmp_path / "front.png")
