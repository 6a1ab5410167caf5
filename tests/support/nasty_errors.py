"""Nasty models, kind ``control``, continued: errors that are met and handled on the way."""

from __future__ import annotations

from contextlib import suppress

from nasty_base import two
from nasty_control import control


@control.forward(two)
def try_a_wrong_shape(self, x, y):
    try:
        h = self.lin(x) @ y
    except RuntimeError:
        h = self.lin(x) * y
    return self.out(h)


@control.forward()
def try_with_any_exception(self, x):
    try:
        h = self.lin(x)
        n = int(x.sum() * 0)
    except Exception:
        h, n = x * 100, 7
    finally:
        x = x + 1
    return self.out(h + n)


@control.forward()
def try_a_missing_attribute(self, x):
    with suppress(AttributeError):
        x = self.missing(x)
    try:
        h = x.no_such_method()
    except (AttributeError, TypeError) as error:
        h = self.lin(x) * len(type(error).__name__)
    return self.out(h)


@control.forward()
def stops_by_exception(self, x):
    layers = iter([self.lin, self.lin])
    while True:
        try:
            x = next(layers)(x).tanh()
        except StopIteration:
            return self.out(x)
