"""The model card of an adapter folder: README.md, as model hubs show it, with what the run knows and no more."""

from chainrule.card.base import Base
from chainrule.card.page import CARD, PICTURE, refresh, write
from chainrule.report.snippets import HERE

__all__ = ["CARD", "HERE", "PICTURE", "Base", "refresh", "write"]
