"""docs/results.md from the trainings of benchmarks/tables.py."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median, stdev

from scipy.stats import ttest_rel
from tables_rows import LAMBDA, NU, SETTINGS, TABLES, THETA, recipe_text

TEXT = Path(__file__).parent / "tables_text.md"


def write_page(page, dataset, root, done, key_of):
    """Write the page: the tables and their paired tests, for digits_clutter among the words of tables_text.md.

    Those words say what was found there, and would be false beside the figures of another data set.
    ``done`` are results by key, ``key_of`` makes a key of a recipe and a seed.
    """
    s = SETTINGS[dataset]
    parts = {}
    used = []
    for name, table in TABLES.items():
        times = max(row.times for row in table.rows)
        if times > 1 and not s.longer:
            continue  # these rows are those of the other tables
        found = {}
        for row in table.rows:
            text = recipe_text(row, dataset, root)
            runs = {seed: done[k] for seed in range(1000) if (k := key_of(text, seed)) in done}
            if runs:
                found[row.name] = runs
                used += runs.values()
        if found:
            parts[name] = "\n".join(_table(table, found))
            for word, value in (("EPOCHS", str(times * s.epochs)), ("FEATURE_START", str(times * s.feature_start))):
                parts[name] = parts[name].replace(word, value)
    if not used:
        raise SystemExit("nothing has been measured yet")
    machines = sorted({r["machine"] for r in used})
    dates = sorted({r["date"] for r in used})
    setting = (
        f"`python benchmarks/tables.py --out runs/tables --dataset {dataset}`: {s.what}; {s.epochs} epochs, "
        f"batch {s.batch_size}, Adam {s.lr:g} (w {s.lr_bonn[0]:g}, sigma {s.lr_bonn[1]:g}), cosine with {s.warmup} "
        f"epoch(s) of warm-up; lambda {LAMBDA}, nu {NU}, theta {THETA} from epoch {s.feature_start} on. Top-1 in %, "
        "mean ± standard deviation over seeds; p: paired t-test over seeds, two-sided. "
        f"{'; '.join(machines)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )
    if dataset == "digits_clutter":
        words = TEXT.read_text(encoding="utf-8")
    else:
        headed = (f"## {TABLES[name].title}\n\n<!-- {name} -->\n" for name in parts)
        words = "\n".join((f"# Results: {dataset}\n\n<!-- setting -->\n", *headed))
    for name in TABLES:
        words = words.replace(f"<!-- {name} -->", parts.get(name, "Not measured."))
    page.write_text(words.replace("<!-- setting -->", setting), encoding="utf-8")


def _table(table, found):
    paper = bool(table.paper)
    yield f"{table.words}\n"
    yield "| | top-1, % | seeds | stored bits, rate | OPs | minutes a training |" + (" paper, % |" if paper else "")
    yield "| --- | --: | --: | --: | --: | --: |" + (" --: |" if paper else "")
    for row in table.rows:
        runs = list(found.get(row.name, {}).values())
        if not runs:
            continue
        tops = [r["top1"] for r in runs]
        spread = f" ± {stdev(tops):.2f}" if len(tops) > 1 else ""
        line = (
            f"| {row.name} | {mean(tops):.2f}{spread} | {len(tops)} | {runs[0]['rate']:.2f} | {runs[0]['ops']:.2e} | "
            f"{median(r['seconds'] for r in runs) / 60:.1f} |"
        )
        yield line + (f" {table.paper.get(row.name, '')} |" if paper else "")
    compared = [_compared(found, *pair) for pair in table.pairs if all(name in found for name in pair)]
    if any(compared):
        yield "\n| compared | difference | standard error | p | seeds |"
        yield "| --- | --: | --: | --: | --: |"
        yield from filter(None, compared)


def _compared(found, better, worse):
    """Return the line of a pair over the seeds that both have, "" where there are fewer than two."""
    common = sorted(found[better].keys() & found[worse].keys())
    if len(common) < 2:
        return ""
    a, b = ([found[name][seed]["top1"] for seed in common] for name in (better, worse))
    difference = [x - y for x, y in zip(a, b, strict=True)]
    error = stdev(difference) / len(common) ** 0.5
    p = ttest_rel(a, b).pvalue if error else float(not mean(difference))
    return f"| {better} − {worse} | {mean(difference):+.2f} | {error:.2f} | {_p(p)} | {len(common)} |"


def _p(p):
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
