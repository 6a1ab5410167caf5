"""The report: plans as one self-contained page with linked views, which opens from a file and loads nothing."""

from .page import report_html
from .payload import Shown

__all__ = ["Shown", "report_html"]
