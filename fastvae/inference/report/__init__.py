"""A run, or several, as one page that a person opens in a browser: what `fastvae report` writes.

The page is whole in itself: its style, its charts (SVG) and its pictures are in it, and no script.
"""

from .page import html, write
from .pictures import draw
from .record import Pictures, RunRecord, read_run

__all__ = ["Pictures", "RunRecord", "draw", "html", "read_run", "write"]
