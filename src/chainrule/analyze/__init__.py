"""Measurements the papers rest on: shortcuts, Picard iteration, and gradients along the chain."""

from chainrule.analyze.gradients import Depths, gradients
from chainrule.analyze.picard import Picard, picard
from chainrule.analyze.shortcut import Shortcut, save, shortcut

__all__ = ["Depths", "Picard", "Shortcut", "gradients", "picard", "save", "shortcut"]
