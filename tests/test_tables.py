"""Markdown tables and file names."""

from __future__ import annotations

import re

import pytest

from chainrule.report.tables import markdown, slug


def test_a_table_reads_back_cell_by_cell():
    text = markdown(("method", "gain"), [("SDO", 0.5), ("a | b", "")])
    cells = [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.split("\n")]
    assert cells == [["method", "gain"], ["---", "---"], ["SDO", "0.5"], ["a | b", ""]]


def test_a_row_with_a_cell_too_few_is_refused():
    with pytest.raises(ValueError, match="2 columns got a row of 1"):
        markdown(("method", "gain"), [("SDO",)])


@pytest.mark.parametrize(
    ("words", "name"), [(("DRaFT-1, lr x 3", 0), "draft-1-lr-x-3-0"), (("  LV, one reward gradient",), "lv-one-reward-gradient")]
)
def test_a_slug_is_lower_case_with_single_dashes(words, name):
    assert slug(*words) == name
