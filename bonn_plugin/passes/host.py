"""The host framework: imported late, kept quiet, its failures told in one line."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bonn_plugin.errors import ModelError, one_line

HOST = "neural_compressor"
INSTALL = 'pip install "bonn_plugin[inc]"'


def require_host(who: str) -> None:
    """Raise ModelError where neural-compressor is not installed; nothing is imported."""
    if importlib.util.find_spec(HOST) is None:
        raise ModelError(f"{who} runs a pass of neural-compressor, which is not installed: {INSTALL}")


def quantization() -> Any:
    """Return the module ``neural_compressor.torch.quantization``; use it within ``hosted``.

    Raises:
        ModelError: it is not installed, or does not import.
    """
    try:
        import neural_compressor.torch.quantization as api
    except ImportError as error:
        raise _missing(error) from error
    return api


def exporting() -> Any:
    """Return the module ``neural_compressor.torch.export``; otherwise as ``quantization``."""
    try:
        import neural_compressor.torch.export as api
    except ImportError as error:
        raise _missing(error) from error
    return api


def _missing(error: ImportError) -> ModelError:
    return ModelError(f"neural-compressor can't be imported ({one_line(error)}): {INSTALL}")


@contextmanager
def hosted(what: str) -> Iterator[None]:
    """Run the framework's code without its running commentary.

    What it logs as an error is the reason of a failure, and is shown as usual where there is no failure.

    Args:
        what: what is being done, for the message.

    Raises:
        ModelError: the framework failed; the message begins with ``what``.
    """
    errors: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        errors.append(record)
        return False

    logger = logging.getLogger(HOST)
    before = logging.root.manager.disable
    logger.addFilter(keep)
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ModelError:
        raise
    except Exception as error:
        told = errors[-1].getMessage() if errors else str(error)
        reason = one_line(Exception(told or type(error).__name__))
        raise ModelError(f"{what} failed in neural-compressor: {reason}") from error
    finally:
        logging.disable(before)
        logger.removeFilter(keep)
    for record in errors:
        logger.handle(record)


__all__ = ["HOST", "INSTALL", "exporting", "hosted", "quantization", "require_host"]
