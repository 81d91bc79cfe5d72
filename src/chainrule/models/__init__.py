"""Model families. The only room that knows diffusers."""

from chainrule.models.loading import BUNDLED, FAMILIES, load
from chainrule.models.model import Model

__all__ = ["BUNDLED", "FAMILIES", "Model", "load"]
