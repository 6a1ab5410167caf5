"""Branches on data that only refuse bad data: ``if labels.max() >= n: raise``. They are followed, and checked again."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types


def outcome_that_goes_on(frame: types.FrameType) -> bool | None:
    """Return the truth value with which the statement that ``frame`` is in goes on, if with the other it only raises.

    None for any other statement, and where the source cannot be read.
    """
    statement = _statement(frame.f_code, frame.f_lineno)
    if isinstance(statement, ast.Assert):
        return _plain(statement.test, wanted=True)
    if isinstance(statement, ast.If) and not statement.orelse and all(isinstance(s, ast.Raise) for s in statement.body):
        return _plain(statement.test, wanted=False)
    return None


def _plain(test: ast.expr, wanted: bool) -> bool | None:
    """Say which truth value of a tensor in ``test`` makes the whole of it ``wanted``; None where that is not clear."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _plain(test.operand, not wanted)
    if isinstance(test, ast.BoolOp):
        return None if any(isinstance(part, ast.UnaryOp | ast.BoolOp) for part in test.values) else wanted
    return wanted


@functools.lru_cache(maxsize=256)
def _statement(code: types.CodeType, line: int) -> ast.stmt | None:
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    wanted = line - first + 1
    found = [node for node in ast.walk(tree) if isinstance(node, ast.If | ast.Assert)
             and node.test.lineno <= wanted <= (node.test.end_lineno or node.test.lineno)]  # fmt: skip
    return found[-1] if found else None
