"""Model families. The only room that knows diffusers."""

from chainrule.models.attached import attach
from chainrule.models.bundled import BUNDLED
from chainrule.models.loading import FAMILIES, load
from chainrule.models.model import Model

__all__ = ["BUNDLED", "FAMILIES", "Model", "attach", "load"]
