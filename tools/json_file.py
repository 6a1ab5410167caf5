"""JSON files that users name on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import StagecutError


def read_json(path: Path) -> Any:
    """Read a file.

    Raises:
        StagecutError: it is no JSON, or no text; with the place.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise StagecutError(f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise StagecutError(f"{path}: byte {error.start}: not UTF-8 text: {error.reason}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or deep nesting
        raise StagecutError(f"{path}: not JSON that can be read: {error}") from error
