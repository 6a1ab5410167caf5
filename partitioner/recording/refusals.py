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
    if isinstance(statement, ast.If) and not statement.orelse and _ends_in_error(statement.body):
        return _plain(statement.test, wanted=False)
    return None


def _ends_in_error(body: list[ast.stmt]) -> bool:
    """Say whether statements cannot but end in an error: they raise at last, and nothing leaves before."""
    inner = [node for statement in body for node in ast.walk(statement)]
    if any(isinstance(node, ast.Return | ast.Break | ast.Continue | ast.Yield | ast.YieldFrom) for node in inner):
        return False
    last = body[-1]
    if isinstance(last, ast.Assert):
        return _is_false(last.test)
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and last.value.args:
        return ast.unparse(last.value.func) in ("torch._assert", "_assert") and _is_false(last.value.args[0])
    return isinstance(last, ast.Raise)


def _is_false(test: ast.expr) -> bool:
    return isinstance(test, ast.Constant) and test.value is False


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
