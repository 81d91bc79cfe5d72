"""Prompts: bundled sets, files, benchmark folders and datasets, split by seed and filled into templates. No torch."""

from chainrule.prompts.sets import DESCRIPTIONS, SETS
from chainrule.prompts.source import TEMPLATES, fill, groups, is_source, other_half, prompts, split

__all__ = ["DESCRIPTIONS", "SETS", "TEMPLATES", "fill", "groups", "is_source", "other_half", "prompts", "split"]
