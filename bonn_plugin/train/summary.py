"""A run's metrics as the columns that timm's users know: ``summary.csv`` of timm's ``update_summary``."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, float]
"""One epoch's numbers by column."""


def summary_row(record: Mapping[str, Any]) -> dict[str, float]:
    """Return one record of metrics.jsonl as flat columns, in timm's order.

    Args:
        record: what the runner notes of an epoch.

    Returns:
        ``epoch`` (finished epochs, from 1), ``train_loss`` (the sum of all terms), ``train_loss_NAME`` of each term
        with its weight in it, ``eval_NAME`` of each measurement (top-1 and top-5 in percent, mAP from 0 to 1),
        ``lr`` (the largest of all groups), and after these what timm does not have: ``seconds``, and
        ``valley_mean``, ``valley_max``, ``skipped_steps``, ``corrupt_samples`` where the record has them.
    """
    losses = record["loss"]
    row = {"epoch": record["epoch"], "train_loss": sum(losses.values())}
    row.update({f"train_loss_{name}": value for name, value in losses.items()})
    measured = {name: value for name, value in record.items() if name.startswith("test_")}
    row.update({f"eval_{name.removeprefix('test_')}": value for name, value in measured.items()})
    row["lr"] = record["lr"]
    row["seconds"] = record["seconds"]
    row.update({f"valley_{name}": value for name, value in record.get("valley", {}).items()})
    row.update({name: record[name] for name in ("skipped_steps", "corrupt_samples") if name in record})
    return row


def summary_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Return ``summary.csv``: a header, and one row for each record of metrics.jsonl.

    A column that only some epochs have, such as that of a loss with a window, is empty in the others. Numbers are
    written so that reading them gives the same float64.
    """
    rows = [summary_row(record) for record in records]
    columns = {name: _place(name) for row in rows for name in row}
    text = io.StringIO()
    writer = csv.DictWriter(text, sorted(columns, key=columns.__getitem__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _place(name: str) -> int:
    """Return where a kind of column stands; those of one kind keep the order in which they came."""
    kinds = ("epoch", "train_", "eval_", "lr", "seconds")
    return next((i for i, kind in enumerate(kinds) if name.startswith(kind)), len(kinds))


__all__ = ["Row", "summary_csv", "summary_row"]
