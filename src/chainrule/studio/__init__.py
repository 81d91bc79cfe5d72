"""The studio: models, adapters, steering, reports and votes on one page of a browser (`chainrule ui`).

Everything but `page.py` is plain functions and values, which know nothing of the page; `page.py` alone needs gradio.
"""

from chainrule.studio.desk import Desk, Opened
from chainrule.studio.shelf import Shelf

__all__ = ["Desk", "Opened", "Shelf"]
