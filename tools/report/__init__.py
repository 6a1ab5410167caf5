"""The report: plans as one self-contained page with linked views, which opens from a file and loads nothing."""

from .page import Shown, report_html

__all__ = ["Shown", "report_html"]
