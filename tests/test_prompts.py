"""Prompt sets, prompt files of each kind, the split, and what is said when they are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chainrule.errors import UserError
from chainrule.prompts import DESCRIPTIONS, SETS, prompts, split

# The 45 common animals of DDPO (arXiv:2305.13301).
DDPO = """
    cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant
    butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama camel
    bat gorilla hedgehog kangaroo
""".split()  # noqa: SIM905


def test_animals_are_the_45_of_the_paper_with_their_articles():
    found = prompts("animals")
    assert len(found) == 45
    assert found == [f"a painting of {'an' if name == 'ant' else 'a'} {name}" for name in DDPO]


def test_every_set_is_described_fixed_and_without_blanks():
    assert SETS.keys() == DESCRIPTIONS.keys()
    for name in SETS:
        found = prompts(name)
        assert found == prompts(name)
        assert all(prompt == prompt.strip() != "" for prompt in found)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("some.txt", "a fox\n\n  two bees  \na cat"),
        ("windows.txt", "\ufeffa fox\r\ntwo bees\r\na cat\r\n"),
        ("without_suffix", "a fox\ntwo bees\na cat\n"),
        ("some.json", '["a fox", "two bees", {"prompt": "a cat", "id": 3}]'),
        ("some.jsonl", '"a fox"\n{"prompt": "two bees"}\n\n{"prompt": "a cat"}\n'),
    ],
)
def test_a_file_of_each_kind(name, text, tmp_path):
    path = tmp_path / "of: some" / name
    path.parent.mkdir()
    path.write_bytes(text.encode())
    assert prompts(path) == prompts(str(path)) == ["a fox", "two bees", "a cat"]


def test_a_line_separator_inside_a_json_string_ends_no_line(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"prompt": "a fox\u2028on a hill"}\n', encoding="utf-8")
    assert prompts(path) == ["a fox\u2028on a hill"]


def test_a_list_is_taken_as_it_is():
    assert prompts(("a fox", "a cat")) == ["a fox", "a cat"]


@pytest.mark.parametrize("count", [2, 5, 45, 101])
def test_the_split_is_a_partition_into_four_fifths_and_one(count):
    said = [f"prompt {k}" for k in range(count)]
    train, test = split(said)
    assert len(train) == round(0.8 * count)
    assert sorted(train + test) == sorted(said)
    assert train == [p for p in said if p in train]  # in the original order
    assert test == [p for p in said if p in test]
    assert split(said) == (train, test)


def test_the_split_of_another_seed_is_another_one():
    assert split(range(45), seed=1) != split(range(45))


def test_the_halves_of_animals_never_change():
    """Results are reported on the held-out animals: they must be the same ones in every version."""
    held_out = [prompt.split()[-1] for prompt in prompts("animals:test")]
    assert held_out == ["cat", "dog", "bird", "goat", "lion", "butterfly", "goose", "llama", "hedgehog"]
    assert set(prompts("animals:train")) == set(prompts("animals")) - set(prompts("animals:test"))


def test_a_file_is_split_as_a_list_is(tmp_path):
    said = [f"prompt {k}" for k in range(10)]
    path = tmp_path / "of:ten.json"
    path.write_text(json.dumps(said))
    assert (prompts(f"{path}:train"), prompts(f"{path}:test")) == split(said)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no prompts"),
        ("blank.txt", b"\n  \n", "holds no prompts"),
        ("binary.txt", b"\x89PNG\r\n\x1a\n\xff\xfe", "not text"),
        ("nul.txt", b"a fox\x00a cat", "not text"),
        ("broken.json", b'["a fox",', "not valid JSON"),
        ("broken.jsonl", b'"a fox"\n{"prompt": ', "not valid JSONL"),
        ("object.json", b'{"prompt": "a fox"}', "must hold a list"),
        ("numbers.json", b'["a fox", 3]', "neither text nor an object"),
        ("unnamed.jsonl", b'{"text": "a fox"}', "neither text nor an object"),
        ("null.json", b"[null]", "neither text nor an object"),
        ("folder.txt/inside", b"", "is a folder"),
    ],
)
def test_a_bad_file_is_named_in_one_line(name, content, message, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    path = path.parent if path.name == "inside" else path
    with pytest.raises(UserError, match=message) as caught:
        prompts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("animels", "did you mean 'animals'"),
        ("animels:test", "did you mean 'animals'"),
        ("nowhere/prompts.txt", "nowhere/prompts.txt does not exist"),
        (Path("missing.json"), "missing.json does not exist"),
        ([], "the list holds no prompts"),
    ],
)
def test_a_bad_name_says_which_and_what_is_near(source, message):
    with pytest.raises(UserError, match=message):
        prompts(source)


def test_the_empty_half_of_a_single_prompt_is_named(tmp_path):
    (tmp_path / "one.txt").write_text("a fox")
    assert prompts(f"{tmp_path / 'one.txt'}:train") == ["a fox"]
    with pytest.raises(UserError, match=r"one\.txt:test holds no prompts"):
        prompts(f"{tmp_path / 'one.txt'}:test")
