"""Charts, the records that they are drawn from, and the page without a browser."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bonn_plugin import BonnError
from bonn_plugin.nn import Role
from bonn_plugin.nn.distribution import valley
from bonn_plugin.report import to_markdown
from bonn_plugin.report.bars import layer_bars
from bonn_plugin.report.charts import Axis, Line, curve, histogram, line_chart, linear_axis
from bonn_plugin.report.distributions import Moment, read_distributions
from bonn_plugin.report.history import read_history
from bonn_plugin.report.html import RunFiles, write_page
from bonn_plugin.report.tables import tables
from bonn_plugin.report.weight_figures import Weights, weights_section
from tests.pages import BINS, LAYERS, counted, drawn_weights, make_run, moment, record, tiny_report, write_lines
from tests.small import Command, Result

FINITE = st.floats(-1e6, 1e6).filter(lambda v: v == 0 or abs(v) > 1e-6)


@pytest.fixture
def bonn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(monkeypatch, capsys)


def refused(result: Result, *parts: str) -> None:
    assert result.status == 2
    assert not result.out, "the report stands above the line that refuses it"
    assert len(result.lines) == 1, result.err
    assert all(part in result.err for part in parts), result.err


def files(folder: Path) -> RunFiles:
    return RunFiles(folder, folder / "training" / "metrics.jsonl")


def page(folder: Path, against: Path | None = None) -> str:
    return write_page(files(folder), files(against) if against else None).read_text(encoding="utf-8")


# --- axes and paths -----------------------------------------------------------------------------------------


@given(st.lists(FINITE, min_size=1, max_size=5))
def test_an_axis_holds_all_values_and_its_ticks_rise_from_end_to_end(values: list[float]) -> None:
    axis = linear_axis("a", values)
    rounding = 1e-8 * (axis.high - axis.low)
    assert axis.low <= min(values) + rounding
    assert axis.high >= max(values) - rounding
    places = [place for place, _ in axis.ticks]
    assert (places[0], places[-1]) == (0, 100)
    assert places == sorted(set(places))
    assert 2 <= len(places) <= 8
    labels = [label for _, label in axis.ticks]
    assert len(set(labels)) == len(labels)


@given(st.integers(0, 500), st.integers(0, 500))
def test_epochs_are_told_as_whole_numbers_that_lie_where_they_say(first: int, last: int) -> None:
    axis = linear_axis("epoch", [first, last], whole=True)
    for place, label in axis.ticks:
        assert axis.low + place / 100 * (axis.high - axis.low) == pytest.approx(int(label), abs=0.06)
    assert axis.ticks[0][1] == str(min(first, last))
    if first != last:
        assert axis.ticks[-1][1] == str(max(first, last))


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 1e-4], ["0", "5e-5", "1.0e-4"]),
        ([1e-4, 2e-4], ["1.0e-4", "1.5e-4", "2.0e-4"]),
        ([0.00036878, 0.000368781], ["3.65e-4", "3.70e-4", "3.75e-4"]),
        ([0, 0], ["0", "0.5", "1.0"]),
        ([0.003, 0.003], ["0.00296", "0.00298", "0.00300", "0.00302", "0.00304"]),
        ([95.2, 98.9], ["94", "96", "98", "100"]),
        ([0, 1e8], ["0", "5e7", "1.0e8"]),
        ([0, 12000], ["0", "5,000", "10,000", "15,000"]),
    ],
)
def test_tick_labels_have_the_decimals_that_they_need(values: list[float], labels: list[str]) -> None:
    assert [label for _, label in linear_axis("a", values, ticks=3).ticks] == labels


def test_a_curve_is_broken_where_a_point_is_not_finite_and_one_point_is_a_dot() -> None:
    axis = Axis("", 0, 4, ())
    drawn = curve(Line("a", [(0, 4), (1, math.nan), (2, 0), (4, 4)]), axis, axis)
    assert drawn.line == "M0 0M500 1000L1000 0"
    assert curve(Line("a", [(4, 4)], pattern="dashed"), axis, axis).dots == "M1000 0h0"
    assert curve(Line("a", [(0, 0), (4, 4)], pattern="dashed"), axis, axis).dots == ""


def test_no_chart_is_made_of_nothing() -> None:
    assert line_chart("a", "b", [Line("c", [(1, math.nan)]), Line("d", [])]) is None


def test_a_histograms_steps_are_its_heights_read_back_from_the_path() -> None:
    shares = [(-1.5, 2.0), (-0.5, 0.0), (0.5, 7.5), (1.5, 10.0)]
    drawn = histogram("a", shares, Axis("", -2, 2, ()), Axis("", 0, 10, ()))
    heights, place, level = [], None, 0.0
    for command, numbers in re.findall(r"([MHV])([-\d. ]+)", drawn.line):
        values = [float(n) for n in numbers.split()]
        if command == "M":
            place, level = values
        elif command == "V":
            (level,) = values
        else:
            heights.append(((place + values[0]) / 2 / 250 - 2, (1000 - level) / 100))
            (place,) = values
    assert torch.tensor(heights).tolist() == torch.tensor(shares).tolist()
    assert drawn.area == f"{drawn.line}V1000H0Z"


# --- distributions.jsonl ------------------------------------------------------------------------------------


def test_shares_and_valley_are_those_of_the_weights() -> None:
    weights = [*drawn_weights(0.6, 3), 9.0, -9.0, 8.0]
    mean = sum(map(abs, weights)) / len(weights)
    layer = {"mean_abs": mean, "scale": 0.1, "counts": counted(weights, mean)}
    told = Moment.model_validate_json(json.dumps({"epoch": 1, "bins": list(BINS), "layers": {"a": layer}}))
    shares = told.shares("a", 4)
    for middle, share in shares:
        inside = sum(middle - 0.125 <= weight / mean < middle + 0.125 for weight in weights)
        assert share == pytest.approx(inside / len(weights), abs=1e-9)
    assert sum(share for _, share in shares) + told.layers["a"].outside == pytest.approx(1)
    assert told.layers["a"].outside == pytest.approx(3 / 1003)
    assert told.valley("a") == pytest.approx(valley(torch.tensor(weights, dtype=torch.float64)), rel=1e-6)


def change(**values: Any) -> Any:
    return lambda told: {**told, **values}


def change_layer(**values: Any) -> Any:
    def changed(told: dict[str, Any]) -> dict[str, Any]:
        layers = {**told["layers"], LAYERS[1]: {**told["layers"][LAYERS[1]], **values}}
        return {**told, "layers": layers}

    return changed


DAMAGED = {
    "no JSON": (lambda told: "{", "damaged"),
    "no object": (lambda told: [], "damaged"),
    "a key that is missing": (lambda told: {"epoch": 2}, "bins: Field required"),
    "a key too many": (change(more=1), "more: Extra inputs"),
    "a count too few": (change_layer(counts=[1] * 129), "layer1.0.conv2 has 129 counts"),
    "a count below zero": (change_layer(counts=[-1] * 130), "layer1.0.conv2: counts"),
    "no weights": (change_layer(counts=[0] * 130), "layer1.0.conv2 has no weights"),
    "a scale that is no number": (change_layer(scale=math.nan), "layer1.0.conv2: scale"),
    "bins the wrong way round": (change(bins=[4, -4, 128]), "bins from 4.0 to -4.0"),
    "no layers": (change(layers={}), "layers"),
    "the same epoch again": (change(epoch=0), "epoch 0 after epoch 0"),
    "other layers": (lambda told: moment(1, LAYERS[:2]), "other layers or bins than in the line before"),
    "other bins": (lambda told: moment(1, bins=(-4.0, 4.0, 64)), "other layers or bins"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_line_is_named_with_file_and_number(kind: str, tmp_path: Path, bonn: Command) -> None:
    damage, message = DAMAGED[kind]
    run = make_run(tmp_path / "run", distributions=False)
    damaged = damage(moment(1))
    first = json.dumps(moment(0))
    text = damaged if isinstance(damaged, str) else json.dumps(damaged)
    (run / "distributions.jsonl").write_text(f"{first}\n{text}\n")
    refused(bonn("report", "run", "--html", "--format", "json"), "run/distributions.jsonl:2: damaged", message)
    assert not (run / "report.html").exists()


def test_distributions_that_are_empty_or_missing_name_the_option(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    for name in ("empty", "missing"):
        with pytest.raises(BonnError, match=rf"{name}: .*bonn compress --log-distributions writes it"):
            read_distributions(tmp_path / name)


# --- metrics.jsonl ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"epoch": "x"}', '{"epoch": 2, "filter_merge": {"gamma": 1}}', '{"epoch": 2, "loss": [1]}']
)
def test_a_damaged_epoch_is_named_with_file_and_number(line: str, tmp_path: Path, bonn: Command) -> None:
    run = make_run(tmp_path / "run", distributions=False)
    (run / "training" / "metrics.jsonl").write_text(json.dumps(record(1, {})) + "\n" + line + "\n")
    refused(bonn("report", "run", "--html", "--format", "json"), "run/training/metrics.jsonl:2: not the metrics")


def test_scores_and_what_modifiers_tell_are_read_apart(tmp_path: Path) -> None:
    told = {**record(1, {"test_top1": 50}), "magnitude_prune": {"sparsity": 0.25}, "skipped_steps": 3, "note": "a"}
    write_lines(tmp_path / "m", [told])
    (epoch,) = read_history(tmp_path / "m")
    assert epoch.scores == {"test_top1": 50}
    assert epoch.measures == {"magnitude_prune: sparsity": 0.25}
    assert epoch.merges["filter_merge"].gamma == 0.25


# --- the page -----------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_says_where(tmp_path: Path, bonn: Command) -> None:
    make_run(tmp_path / "run")
    done = bonn("report", "run", "--html", "--format", "markdown")
    assert (done.status, done.err) == (0, "written: run/report.html\n")
    assert done.out.startswith("# tiny")
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == [
        "distributions.jsonl",
        "report.html",
        "report.json",
        "training",
    ]


def test_the_page_has_every_cell_of_every_table_of_the_report(tmp_path: Path) -> None:
    text = page(make_run(tmp_path / "run"))
    markdown = to_markdown(tiny_report())
    found = tables(tiny_report())
    assert {"Layers", "Filters"} == {table.title for table in found if table.detail}
    for table in found:
        start = text.index(f'<table aria-label="{table.title}"')
        part = text[start : text.index("</table>", start)]
        assert f"## {table.title}\n" in markdown
        for row in table.rows:
            for cell in row:
                assert f">{cell}</t" in part, (table.title, cell)
    assert all(note in text for note in tiny_report().notes)


def test_the_page_needs_nothing_from_anywhere(tmp_path: Path) -> None:
    text = page(make_run(tmp_path / "run"))
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text
    assert not re.search(r"\ssrc=|@import|url\(", text)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text


def test_what_was_not_recorded_is_said_with_the_option_that_records_it(tmp_path: Path) -> None:
    text = page(make_run(tmp_path / "run", metrics=False, distributions=False))
    assert "There are no metrics of training in tiny; bonn compress records them." in text
    assert "was not recorded: bonn compress --log-distributions does it." in text
    assert "<figure" not in text
    assert "Compression rate by what is counted" in text


def test_a_network_without_binarised_weights_is_not_told_to_record_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", distributions=False)
    real = tuple(row for row in tiny_report().roles if row.role is not Role.BINARY_WEIGHT)
    (run / "report.json").write_text(tiny_report().model_copy(update={"roles": real}).model_dump_json())
    text = page(run)
    assert "No weights are binarised in this network." in text
    assert "--log-distributions" not in text


def test_metrics_of_no_epoch_draw_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", distributions=False)
    (run / "training" / "metrics.jsonl").write_text("")
    assert "<figure" not in page(run)
    (run / "training" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert "<figure" not in page(run)


def test_one_epoch_is_drawn(tmp_path: Path) -> None:
    text = page(make_run(tmp_path / "run", epochs=1))
    assert "top-1 over epochs" not in text
    assert 'aria-label="top-1, in % over epochs: test 20 at 1"' in text


def test_measured_losses_stand_with_the_losses_and_training_scores_with_the_tests(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", distributions=False)
    scores = {"test_loss": 0.5, "test_top1": 80.0, "train_top1": 90.0}
    write_lines(run / "training" / "metrics.jsonl", [record(1, scores), record(2, {**scores, "test_loss": 0.4})])
    text = page(run)
    assert 'aria-label="test: loss over epochs: test: loss from 0.5 at 1 to 0.4 at 2' in text
    assert "top-1, in % over epochs: test from 80 at 1 to 80 at 2, lowest 80, highest 80; train from 90" in text
    assert "On the training set nothing is measured" not in text


def test_a_layer_of_zeros_is_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", distributions=False)
    zeros = {"mean_abs": 0.0, "scale": 0.0, "counts": [0] * 65 + [9] + [0] * 64}
    write_lines(run / "distributions.jsonl", [{"epoch": 0, "bins": list(BINS), "layers": {"a": zeros}}])
    assert "valley 4e+12" in page(run)


def test_a_detectors_page_shows_its_precision(tmp_path: Path) -> None:
    text = page(make_run(tmp_path / "run", detection=True))
    assert "mAP, reloaded from the files" in text
    for name, last in (("mAP", "0.4"), ("mAP50", "0.8"), ("mAP75", "0.6")):
        assert re.search(rf'aria-label="{name}, from 0 to 1 over epochs: test from [\d.]+ at 1 to {last} at 4', text)


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>&'
    run = make_run(tmp_path / "run", name=evil)
    write_lines(run / "distributions.jsonl", [moment(0, ['"><b>']), moment(1, ['"><b>'])])
    write_lines(run / "training" / "metrics.jsonl", [{"epoch": 1, "loss": {"<i>": 1.0}, "test_<u>": 1.0}])
    text = page(run)
    assert "<script" not in text
    assert not re.search("<[biu]>", text)
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;&amp;" in text


def test_bars_tell_the_reports_bits_and_add_up_to_all_operations() -> None:
    bits, operations = layer_bars(tiny_report())
    report = tiny_report()
    assert sum(int(row.cells[1].replace(",", "")) for row in bits.rows) == sum(r.needed_bits for r in report.layers)
    assert sum(float(row.cells[2].split()[0]) for row in operations.rows) == pytest.approx(100, abs=1)
    assert all(0 < bar.width <= 100 for row in bits.rows for bar in row.bars)
    longest = max(row.bars[0].width + row.bars[1].width for row in operations.rows)
    assert longest == pytest.approx(100, abs=0.02)
    low = int(re.search(r"from 1e(\d+) to", bits.caption)[1])
    high = int(re.search(r"to 1e(\d+) bits", bits.caption)[1])
    for row in bits.rows:
        now = int(row.cells[1].replace(",", ""))
        assert row.bars[1].width == pytest.approx(100 * (math.log10(now) - low) / (high - low), abs=0.01)


def test_binarised_values_are_drawn_for_every_layer_on_one_scale() -> None:
    section = weights_section(weights("a", 5, epochs=3))
    (figure,) = (figure for figure in section.figures if "Fig. 5" in figure.title)
    assert [chart.title for chart in figure.charts] == [f"conv{i + 1}" for i in range(5)]
    assert len({(chart.x, chart.y) for chart in figure.charts}) == 1
    for seed, chart in enumerate(figure.charts):
        points = re.findall(r"[ML]([\d.]+) ([\d.]+)", chart.curves[0].line)
        drawn = [chart.y.low + (1 - float(y) / 1000) * (chart.y.high - chart.y.low) for _, y in points]
        assert drawn == pytest.approx([0.1 + 0.01 * seed * epoch for epoch in range(3)], abs=1e-3)
        assert [float(x) for x, _ in points] == [0, 500, 1000]
    assert figure.data.rows[2] == ("2", "0.1", "0.12", "0.14", "0.16", "0.18")


# --- two runs -----------------------------------------------------------------------------------------------


def weights(name: str, layers: int, epochs: int = 2) -> Weights:
    names = [f"conv{i + 1}" for i in range(layers)]
    return Weights(name, tuple(Moment.model_validate(moment(e, names)) for e in range(epochs)))


@pytest.mark.parametrize(("layers", "places"), [(20, [2, 8, 14]), (10, [2, 8, 10]), (6, [2, 6]), (2, [2]), (1, [1])])
def test_two_runs_are_compared_in_the_papers_layers_or_the_nearest(layers: int, places: list[int]) -> None:
    section = weights_section(weights("a", layers), weights("b", layers))
    titles = [figure.title for figure in section.figures if figure.title.startswith("Two runs")]
    expected = [f"Two runs: conv{n}, binarised layer {n} of {layers} (as Fig. 4 of BONN)" for n in places]
    assert titles == expected


def test_the_histograms_of_two_runs_share_their_scale() -> None:
    section = weights_section(weights("a", 1), Weights("b", (Moment.model_validate(moment(7, ["conv1"], 0.05)),)))
    own, other = section.figures[0].charts
    assert own.y == other.y
    assert (own.title, other.title) == ("a, epoch 1", "b, epoch 7")
    assert own.curves[0].line != other.curves[0].line


def test_a_page_against_another_run_has_both_curves(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "bonn"), make_run(tmp_path / "xnor", spread=1.2, epochs=3)
    text = page(one, other)
    assert "Compared with <strong>xnor</strong>" in text
    assert 'aria-label="top-1, in % over epochs: bonn, test from 20 at 1 to 80 at 4' in text
    assert "xnor, test from 20 at 1 to 60 at 3" in text
    assert text.count("as Fig. 4 of BONN") >= 2


def test_a_second_run_without_metrics_is_said(tmp_path: Path) -> None:
    text = page(make_run(tmp_path / "a"), make_run(tmp_path / "b", metrics=False))
    assert "There are no metrics of training in b; bonn compress records them." in text


def test_against_needs_html(tmp_path: Path, bonn: Command) -> None:
    make_run(tmp_path / "a")
    refused(bonn("report", "a", "--against", "a"), "--against goes with --html")


MISTAKES = {
    "no such run": (lambda b: None, "b/report.json: can't be read: No such file or directory"),
    "no distributions": (
        lambda b: make_run(b, distributions=False),
        "b/distributions.jsonl: can't be read: No such file or directory; bonn compress --log-distributions writes it",
    ),
    "other layers": (
        lambda b: write_lines(make_run(b) / "distributions.jsonl", [moment(0, ["stem"])]),
        "b has other layers than a, they can't be compared: layer1.0.conv1 is binarised in one of them alone",
    ),
    "another order": (
        lambda b: write_lines(make_run(b) / "distributions.jsonl", [moment(0, LAYERS[::-1])]),
        "they stand in another order",
    ),
    "other bins": (
        lambda b: write_lines(make_run(b) / "distributions.jsonl", [moment(0, bins=(-2.0, 2.0, 128))]),
        "b has other bins than a",
    ),
    "another task": (
        lambda b: make_run(b, detection=True),
        "b measures test_map, test_map50, test_map75, a measures test_top1, test_top5",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_run_that_cannot_be_compared_is_one_line(kind: str, tmp_path: Path, bonn: Command) -> None:
    make, message = MISTAKES[kind]
    make_run(tmp_path / "a")
    make(tmp_path / "b")
    refused(bonn("report", "a", "--html", "--against", "b", "--format", "json"), message)
    assert not (tmp_path / "a" / "report.html").exists()


def test_a_run_without_distributions_is_not_compared(tmp_path: Path, bonn: Command) -> None:
    make_run(tmp_path / "a", distributions=False)
    make_run(tmp_path / "b")
    refused(bonn("report", "a", "--html", "--against", "b", "--format", "json"), "a/distributions.jsonl: can't be read")
