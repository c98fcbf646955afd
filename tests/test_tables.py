"""benchmarks/tables.py: every row is a recipe, and the page's figures are those of the results."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scipy.stats import ttest_rel

from bonn_plugin import Session, parse_recipe
from bonn_plugin.recipe import recipe_model
from tests.cifar_files import write_cifar10

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def rows() -> ModuleType:
    return _module("tables_rows")


@pytest.fixture(scope="module")
def page(rows: ModuleType) -> ModuleType:
    return _module("tables_page")


def _module(name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def test_every_row_of_every_table_is_a_recipe_on_every_data_set(rows: ModuleType) -> None:
    _module("one_mode")
    for dataset, setting in rows.SETTINGS.items():
        for table in rows.TABLES.values():
            names = [row.name for row in table.rows]
            assert len(set(names)) == len(names)
            for row in table.rows:
                recipe = parse_recipe(rows.recipe_text(row, dataset, "data"))
                assert recipe.training.epochs == setting.epochs * (row.times if setting.longer else 1)
                assert (len(recipe.modifiers) == 0) == (row.binarize is None)
            for pair in table.pairs:
                assert set(pair) <= set(names), table.title


def test_rows_of_one_name_are_one_training(rows: ModuleType) -> None:
    seen: dict[str, str] = {}
    for table in rows.TABLES.values():
        for row in table.rows:
            text = rows.recipe_text(row, "digits_clutter", ".")
            assert seen.setdefault(row.name, text) == text


def test_the_page_gives_means_spreads_and_paired_tests(rows: ModuleType, page: ModuleType, tmp_path: Path) -> None:
    def key_of(text: str, seed: int) -> str:
        return f"{text}{seed}"

    tops = {rows.NONE.name: [60.0, 62.0, 61.0, 63.0, 59.0], rows.KERNEL.name: [63.0, 64.0, 62.5, 66.0, 60.0]}
    done = {}
    for row in (rows.NONE, rows.KERNEL):
        for seed, top in enumerate(tops[row.name]):
            done[key_of(rows.recipe_text(row, "digits_clutter", "."), seed)] = {
                "top1": top,
                "rate": 18.05,
                "ops": 661376.0,
                "seconds": 60.0,
                "machine": "a machine",
                "date": "2026-11-21",
            }
    page.write_page(tmp_path / "results.md", "digits_clutter", ".", done, key_of)
    text = (tmp_path / "results.md").read_text()
    assert "| BONN, no Bayesian loss | 61.00 ± 1.58 | 5 | 18.05 | 6.61e+05 | 1.0 |" in text
    found = re.search(r"\| BONN, kernel loss − BONN, no Bayesian loss \| \+2\.10 \| 0\.40 \| (\S+) \| 5 \|", text)
    assert found
    p = ttest_rel(tops[rows.KERNEL.name], tops[rows.NONE.name]).pvalue
    assert float(found[1]) == pytest.approx(p, abs=5e-4)
    assert "a machine" in text
    assert "Not measured." in text


def test_the_page_of_another_data_set_has_none_of_the_words_about_digits_clutter(
    rows: ModuleType, page: ModuleType, tmp_path: Path
) -> None:
    measured = {"top1": 87.34, "rate": 20.37, "ops": 1e6, "seconds": 60.0, "machine": "a machine", "date": "2026-11-21"}
    done = {rows.recipe_text(rows.BOTH, "cifar10", "."): measured}
    page.write_page(tmp_path / "results.md", "cifar10", ".", done, lambda text, seed: text if seed == 0 else "")
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# Results: cifar10\n")
    assert "## Table 3: full precision, XNOR-Net and BONN at two widths" in text
    assert "| BONN | 87.34 | 1 | 20.37 |" in text
    assert "digits" not in text
    assert ", long" not in text


def test_every_table_has_its_place_in_the_words(rows: ModuleType) -> None:
    words = (BENCHMARKS / "tables_text.md").read_text()
    assert re.findall("<!-- (.+) -->", words).count("setting") == 1
    assert sorted(re.findall("<!-- (.+) -->", words)) == sorted([*rows.TABLES, "setting"])


def test_a_page_without_results_is_refused(page: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing has been measured"):
        page.write_page(tmp_path / "results.md", "digits_clutter", ".", {}, lambda text, seed: "")


def test_a_row_trains_packs_and_reloads_on_cifar(
    rows: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tables = _module("tables")
    recipe = rows.recipe_text(rows.KERNEL, "cifar10", str(write_cifar10(tmp_path, monkeypatch)))
    assert "epochs: 200\n  batch_size: 128\n" in recipe
    short = recipe.replace("epochs: 200\n  batch_size: 128\n", "epochs: 6\n  batch_size: 20\n")
    found = tables.train(short, 0, "cpu", 1)
    assert found["top1"] in (0, 25, 50, 75, 100)  # of four images
    assert found["packed_top1"] == found["top1"]
    assert found["rate"] == pytest.approx(20.37, abs=0.01)  # WRN22 16-16-32-64
    assert found["loss"] > 0
    assert found["valley"] > 0


@pytest.mark.parametrize(
    ("times", "tables"),
    [
        (3, ("long", "long_wide", "long_modes", "long_structure")),
        (5, ("longer_wide",)),
        (10, ("longest_wide",)),
    ],
)
def test_long_rows_are_the_short_ones_but_for_their_epochs(
    rows: ModuleType, times: int, tables: tuple[str, ...]
) -> None:
    setting = rows.SETTINGS["digits_clutter"]
    assert {row.times for name in tables for row in rows.TABLES[name].rows} == {times}
    texts = [rows.recipe_text(row, "digits_clutter", ".") for row in (rows.BOTH, rows.long(rows.BOTH, times))]
    assert texts[1].count("\n  amp: bfloat16\n") == (times == 10)
    texts[1] = texts[1].replace("\n  amp: bfloat16\n", "\n")
    changed = [(a, b) for a, b in zip(*(text.splitlines() for text in texts), strict=True) if a != b]
    assert [b for _, b in changed] == [
        f"  epochs: {times * setting.epochs}",
        changed[1][0].replace(f"start: {setting.feature_start}", f"start: {times * setting.feature_start}"),
    ]
    short, long = (rows.recipe_text(row, "cifar10", ".") for row in (rows.BOTH, rows.long(rows.BOTH, times)))
    assert short == long


def test_the_page_says_how_long_the_long_rows_train(rows: ModuleType, page: ModuleType, tmp_path: Path) -> None:
    measured = {"top1": 88.5, "rate": 1.0, "ops": 1e6, "seconds": 60.0, "machine": "a machine", "date": "2026-11-21"}
    trained = [*(rows.long(rows.WIDE_FULL, t) for t in (3, 5, 10)), rows.long(rows.WIDE_BONN)]
    done = {rows.recipe_text(row, "digits_clutter", "."): measured for row in trained}
    page.write_page(tmp_path / "results.md", "digits_clutter", ".", done, lambda text, seed: text if seed == 0 else "")
    text = (tmp_path / "results.md").read_text()
    assert "over 36 epochs." in text
    assert "| compared |" not in text  # one seed each: nothing to compare
    assert "over 60 epochs, the feature loss from epoch 40 on." in text
    assert text.count("| full precision, wide, long | 88.50 | 1 |") == 1
    assert text.count("| full precision, wide, longer | 88.50 | 1 |") == 1
    assert "over 120 epochs in bfloat16 (autocast), the feature loss from epoch 80 on." in text
    assert text.count("| full precision, wide, longest | 88.50 | 1 |") == 1


def test_every_lead_is_a_recipe_whose_learning_rates_find_their_parameters() -> None:
    search = _module("tables_search")
    names = []
    for name, shortcut, norm, modifiers, overrides, _ in search.tried():
        text = search.RECIPE.replace("SHORTCUT", shortcut).replace("NORM", norm)
        recipe = parse_recipe(text, overrides=[f"modifiers=[{modifiers}]", *overrides])
        session = Session(recipe, steps_per_epoch=1)
        session.prepare(recipe_model(recipe))
        assert session.param_groups()
        names.append((name, shortcut, norm))
    assert len(set(names)) == len(names)
