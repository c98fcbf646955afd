"""Reading a report back from a run's folder."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from bonn_plugin.errors import BonnError
from bonn_plugin.report.model import Report


def read_report(folder: Path) -> Report:
    """Read ``folder``/report.json.

    Raises:
        BonnError: it can't be read, or is no report.
    """
    source = folder / "report.json"
    try:
        return Report.model_validate_json(source.read_bytes())
    except OSError as error:
        raise BonnError(f"{source}: can't be read: {error.strerror}; bonn compress writes it") from None
    except ValidationError as error:
        raise BonnError(f"{source}: not a report: {error.errors()[0]['msg']}") from None
