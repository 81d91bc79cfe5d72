"""Measurements the papers rest on: shortcuts, Picard iteration, gradients along the chain, and adapters by scale and step."""

from chainrule.analyze.gradients import Depths, gradients
from chainrule.analyze.picard import Picard, picard
from chainrule.analyze.scales import scale_grid, step_grid
from chainrule.analyze.shortcut import Shortcut, save, shortcut

__all__ = ["Depths", "Picard", "Shortcut", "gradients", "picard", "save", "scale_grid", "shortcut", "step_grid"]
