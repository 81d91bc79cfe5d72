"""Prompt sets, files, folders and datasets, the split, templates, and what is texts when they are wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from chainrule.cli.arguments import prompts_of
from chainrule.errors import UserError
from chainrule.prompts import DESCRIPTIONS, SETS, is_source, prompts, split
from chainrule.prompts.source import fill

# The 45 common animals of DDPO (arXiv:2305.13301).
DDPO = """
    cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant
    butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama camel
    bat gorilla hedgehog kangaroo
""".split()  # noqa: SIM905
PAGE = Path(__file__).parents[1] / "docs" / "prompts.md"
TABLE = "Prompts,Category\na fox,Colors\n"


class FakeTable(dict):
    """What is read of a `datasets.Dataset`: its columns by name."""

    column_names = property(list)


DRAWBENCH = FakeTable(Prompts=["a fox", "two bees", " ", "a fox"], Category=["Colors"] * 4, Number=[1, 2, 3, 4])
BOTH = FakeTable(text=["a fox"], caption=["two bees"])


@pytest.fixture
def fake_datasets(monkeypatch, tmp_path):
    """A `datasets` without a hub: two sets by name, folders that are what their own name says, one Parquet file."""

    def load_dataset(*name):
        known = {
            ("org/DrawBench",): {"test": DRAWBENCH},
            ("org/both", "large"): {"train": BOTH, "dev": DRAWBENCH},
            ("org/none",): {},
        }
        if name not in known:
            raise ConnectionError(f"Couldn't reach {name[0]!r}\n  on the Hub")
        return known[name]

    def from_parquet(path):
        if path.endswith("torn.parquet"):
            raise OSError("")
        return DRAWBENCH

    saved = {"one": DRAWBENCH, "single": {"train": DRAWBENCH}, "several": {"train": DRAWBENCH, "test": BOTH}}
    for name, kind in (("one", "state.json"), ("single", "dataset_dict.json"), ("several", "dataset_dict.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / kind).write_text("{}")
    (tmp_path / "parts/data").mkdir(parents=True)
    for name in ("some.parquet", "torn.parquet", "parts/data/0.parquet", "parts/data/1.parquet"):
        (tmp_path / name).write_bytes(b"PAR1")
    fake = SimpleNamespace(
        load_dataset=load_dataset,
        load_from_disk=lambda folder: saved[Path(folder).name],
        Dataset=SimpleNamespace(from_parquet=from_parquet),
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def benchmark(tmp_path):
    """HPDv2's benchmark with two prompts of each style, one of them in all four."""
    folder = tmp_path / "HPDv2" / "benchmark"
    folder.mkdir(parents=True)
    for style in ("photo", "paintings", "concept-art", "anime"):
        (folder / f"{style}.json").write_text(json.dumps([f"a fox, {style}", "a fox"]))
    return folder


def test_animals_are_the_45_of_the_paper_with_their_articles():
    found = prompts("animals")
    assert len(found) == 45
    assert found == [f"a painting of {'an' if name == 'ant' else 'a'} {name}" for name in DDPO]


def test_the_unseen_animals_are_six_others():
    found = prompts("unseen-animals as {}")
    assert found == ["a snail", "a hippopotamus", "a cheetah", "a crocodile", "a lobster", "an octopus"]
    assert not set(found) & set(prompts("animals as {}"))


def test_every_set_is_described_fixed_and_without_blanks():
    assert SETS.keys() == DESCRIPTIONS.keys()
    page = PAGE.read_text(encoding="utf-8")
    for name in SETS:
        assert f"| `{name}` | {len(prompts(name))} |" in page
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
        ("windows.jsonl", '\ufeff"a fox"\r\n"two bees"\r\n"a cat"\r\n'),
        (
            "names.json",
            '[{"Prompts": "a fox"}, {"caption": "two bees", "id": 3}, {"text": "a cat", "prompt": " "}, {"text": "a cat"}]',
        ),
        ("first.json", '[{"text": "a text", "prompt": "a fox"}, {"prompt": "two bees", "caption": "bees"}, "a cat"]'),
        ("drawbench.csv", "Prompts,Category\na fox,Colors\n\n,Blank\n two bees ,Counting\na cat,Colors\n"),
        ("windows.csv", '\ufeffCategory,Prompts\r\nColors,"a fox"\r\nCounting,two bees\r\nColors,"a cat"\r\n'),
        ("some.TSV", "id\tPrompt\tnote\n1\ta fox\tx, y\n2\ttwo bees\t\n3\ta cat\tz\n"),
        ("both.csv", "text,prompt\nx,a fox\ny,two bees\nz,a cat\n"),
    ],
)
def test_a_file_of_each_kind(name, text, tmp_path):
    path = tmp_path / "of: some" / name
    path.parent.mkdir()
    path.write_bytes(text.encode())
    assert prompts(path) == prompts(str(path)) == ["a fox", "two bees", "a cat"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("both.csv", "text,caption\nx,a fox\ny,a cat\n"),
        ("both.tsv", "text\tcaption\nx\ta fox\ny\ta cat\n"),
        ("both.json", '[{"text": "x", "caption": "a fox"}, {"caption": "a cat"}]'),
        ("both.jsonl", '{"text": "x", "caption": "a fox"}\n"a cat"\n'),
    ],
)
def test_a_column_can_be_named(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert prompts(f"{tmp_path / name}:caption") == ["a fox", "a cat"]
    assert prompts(f"{tmp_path / name}:caption:train") == ["a fox", "a cat"]
    with pytest.raises(UserError, match=f"several columns .*'text', 'caption'; pass .*{name}:text"):
        prompts(tmp_path / name)


def test_a_quoted_field_keeps_its_commas_quotes_and_lines(tmp_path):
    (tmp_path / "some.csv").write_text('Prompts,Category\n"a sign, saying ""hello\nworld""",Text\na cat,Colors\n')
    assert prompts(tmp_path / "some.csv") == ['a sign, saying "hello\nworld"', "a cat"]


def test_the_benchmark_is_four_files_with_every_prompt_kept(benchmark):
    styles = ("anime", "concept-art", "paintings", "photo")
    assert prompts(benchmark) == prompts(f"{benchmark}/") == [p for style in styles for p in (f"a fox, {style}", "a fox")]
    assert prompts(benchmark / "anime.json") == ["a fox, anime", "a fox"]
    assert (prompts(f"{benchmark}:train"), prompts(f"{benchmark}:test")) == split(prompts(benchmark))
    (benchmark / "paintings.json").unlink()
    with pytest.raises(UserError, match=r"benchmark lacks paintings\.json; pass one style by itself"):
        prompts(benchmark)


def test_a_line_separator_inside_a_json_string_ends_no_line(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"prompt": "a fox\u2028on a hill"}\n', encoding="utf-8")
    assert prompts(path) == ["a fox\u2028on a hill"]


def test_a_list_is_taken_as_it_is():
    assert prompts(("a fox", "a cat")) == ["a fox", "a cat"]


@pytest.mark.parametrize("count", [2, 5, 45, 101])
def test_the_split_is_a_partition_into_four_fifths_and_one(count):
    texts = [f"prompt {k}" for k in range(count)]
    train, test = split(texts)
    assert len(train) == round(0.8 * count)
    assert sorted(train + test) == sorted(texts)
    assert train == [p for p in texts if p in train]  # in the original order
    assert test == [p for p in texts if p in test]
    assert split(texts) == (train, test)


def test_the_split_of_another_seed_is_another_one():
    assert split(range(45), seed=1) != split(range(45))


def test_a_source_may_name_the_seed_of_its_split():
    assert (prompts("animals:train@3"), prompts("animals:test@3")) == split(prompts("animals"), seed=3)
    assert prompts("animals:test@0") == prompts("animals:test") != prompts("animals:test@3")


def test_the_halves_of_animals_never_change():
    """Results are reported on the held-out animals: they must be the same ones in every version."""
    held_out = [prompt.split()[-1] for prompt in prompts("animals:test")]
    assert held_out == ["cat", "dog", "bird", "goat", "lion", "butterfly", "goose", "llama", "hedgehog"]
    assert set(prompts("animals:train")) == set(prompts("animals")) - set(prompts("animals:test"))


def test_a_file_is_split_as_a_list_is(tmp_path):
    texts = [f"prompt {k}" for k in range(10)]
    path = tmp_path / "of:ten.json"
    path.write_text(json.dumps(texts))
    assert (prompts(f"{path}:train"), prompts(f"{path}:test")) == split(texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no prompts"),
        ("blank.txt", b"\n  \n", "holds no prompts"),
        ("binary.txt", b"\x89PNG\r\n\x1a\n\xff\xfe", "not text"),
        ("nul.txt", b"a fox\x00a cat", "not text"),
        ("broken.json", b'["a fox",', "not valid JSON"),
        ("deep.json", b"[" * 200000, "not valid JSON: nested too deeply"),
        ("broken.jsonl", b'"a fox"\n\n{"prompt": ', "line 3 of the prompt file .* is not valid JSON"),
        ("object.json", b'{"prompt": "a fox"}', "must hold a list"),
        ("numbers.json", b'["a fox", 3]', "neither text nor an object"),
        (
            "unnamed.jsonl",
            b'"a cat"\n{"name": "a fox"}',
            "line 2 of .* no column prompt, prompts, caption, text .*unnamed.jsonl:name",
        ),
        ("empty.jsonl", b"{}", r"no column prompt, prompts, caption, text \(columns: none\)$"),
        ("null.json", b'["a fox", {"prompt": null}]', "row 2 of .* neither text nor an object"),
        ("empty.json", b"", "holds no prompts"),
        ("empty.csv", b"", "holds no prompts"),
        ("header.csv", b"Prompts,Category\n", "holds no prompts"),
        ("unnamed.csv", b"one,two\na fox,3\n", r"no column .*\(columns: 'one', 'two'\); pass .*unnamed.csv:one for the first"),
        ("several.csv", b"text,Caption\na fox,3\n", "several columns .* 'text', 'Caption'; pass .*several.csv:text"),
        (
            "comma.csv",
            b"Prompts,Category\na fox,x\na fox, a cat,x\n",
            "in line 3 of .* is 3, but the header's is 2; put .* in quotes",
        ),
        ("short.tsv", b"Prompts\tCategory\na fox\n", "in line 2 of .* is 1, but the header's is 2"),
        ("open.csv", b'Prompts\n"a fox\n', "line 2 of .* is not valid CSV"),
        ("binary.csv", b"\xff\xfeP\x00", "not text"),
        ("some.parquet", b"", "not a Parquet file"),
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
        ("missing.csv:Prompts", "the prompt file missing.csv does not exist"),
        ("missing.parquet", "missing.parquet does not exist"),
        ("animels as a photo of {}", "did you mean 'animals'"),
        ("animals as a photo", r"'a photo' .* must say where the subject goes, as in a photo of \{\}"),
        ("animals:test@", "the seed '' of 'animals:test@' must be a whole number, as in animals:test@3"),
        ("animals:test@x as {}", "the seed 'x' of .* must be a whole number"),
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


@pytest.mark.parametrize(
    ("name", "column", "listed"),
    [("some.csv", "Prompt", "'Prompts', 'Category'"), ("some.json", "text", "'prompt'"), ("some.jsonl", "text", "'prompt'")],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(name, column, listed, tmp_path):
    (tmp_path / name).write_text({".csv": TABLE, ".json": '[{"prompt": "x"}]', ".jsonl": '{"prompt": "x"}'}[Path(name).suffix])
    with pytest.raises(UserError, match=rf"{name} has no column '{column}' \(columns: {listed}\)$"):
        prompts(f"{tmp_path / name}:{column}")


@pytest.mark.parametrize(
    ("source", "first", "count"),
    [
        ("animals as a photo of {}", "a photo of a cat", 45),
        ("animals:test as a photo of a {}, {} only", "a photo of a cat, a cat only", 9),
        ("animals:train@3 as {}", "a cat", 36),
        ("faces as A {} as a sketch", "A smiling face as a sketch", 12),
        ("emoji as a photo of {}", "a photo of a cat", 231),
    ],
)
def test_a_set_fills_a_template_with_its_subjects(source, first, count):
    assert (prompts(source)[0], len(prompts(source))) == (first, count)


@pytest.mark.parametrize(
    ("template", "subject", "filled"),
    [
        ("a {} here", "an ant", "an ant here"),
        ("An {}", "a fox", "A fox"),
        ("a(n) {}", "Owl", "an Owl"),
        ("pizza {}", "fox", "pizza fox"),
        ("a {}", "fox", "a fox"),
        (r"{} \1 {name}", r"\g<0> {}", r"\g<0> {} \1 {name}"),
    ],
)
def test_the_article_before_a_slot_fits_the_subject(template, subject, filled):
    assert fill(template, subject) == filled


def test_a_file_fills_a_template_with_its_lines(tmp_path):
    (tmp_path / "seen as such.txt").write_text("fox\nant\n")
    (tmp_path / "some.txt").write_text("fox\nant\n")
    assert prompts(tmp_path / "seen as such.txt") == ["fox", "ant"]
    assert prompts(f"{tmp_path / 'some.txt'} as a stunning oil painting of a {{}}, cinematic lighting") == [
        "a stunning oil painting of a fox, cinematic lighting",
        "a stunning oil painting of an ant, cinematic lighting",
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hub:org/DrawBench", ["a fox", "two bees", "a fox"]),
        ("hub:org/DrawBench:test", ["a fox", "two bees", "a fox"]),
        ("hub:org/DrawBench:test:Category", ["Colors"] * 4),
        ("hub:org/DrawBench::Prompts:train", split(["a fox", "two bees", "a fox"])[0]),
        ("hub:org/DrawBench:test as a photo of {}", ["a photo of a fox", "a photo of two bees", "a photo of a fox"]),
        ("hub:org/both/large:train:caption", ["two bees"]),
        ("some.parquet", ["a fox", "two bees", "a fox"]),
        ("some.parquet:Category", ["Colors"] * 4),
        ("parts", ["a fox", "two bees", "a fox"] * 2),
        ("parts:Category", ["Colors"] * 8),
        ("one", ["a fox", "two bees", "a fox"]),
        ("one:Category", ["Colors"] * 4),
        ("one:train", split(["a fox", "two bees", "a fox"])[0]),
        ("single", ["a fox", "two bees", "a fox"]),
        ("single:Category", ["Colors"] * 4),
    ],
)
def test_a_dataset(source, expected, fake_datasets):
    assert prompts(source) == prompts_of([source]) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:org/away", r"cannot load hub:org/away from the hub: Couldn't reach 'org/away' on the Hub; check .* or pass a file"),
        ("hub:org/both/large", r"not one split but 2 \(splits: train, dev\); pass one, as in hub:org/both/large:train$"),
        ("hub:org/both/large:test", r"no split 'test' \(splits: train, dev\)"),
        ("hub:org/both/large:train", "several columns .*'text', 'caption'; pass hub:org/both/large:train:text"),
        ("hub:org/none", r"the dataset hub:org/none has not one split but 0 \(splits: none\)$"),
        ("hub:org/DrawBench:test:Prompt", r"no column 'Prompt' \(columns: 'Prompts', 'Category', 'Number'\)"),
        ("hub:org/DrawBench:test:Number", "row 1 of the dataset hub:org/DrawBench is not text in its column 'Number'"),
        ("hub:org/DrawBench:test:Prompts:tset", "must look like hub:owner/name"),
        ("hub:", "must look like hub:owner/name"),
        ("hub:org//x", "must look like hub:owner/name"),
        ("several", r"the dataset several .* \(splits: train, test\); pass one, as in several/train$"),
        ("torn.parquet", "cannot load the prompt file torn.parquet: OSError"),
    ],
)
def test_a_bad_dataset_is_named_in_one_line(source, message, fake_datasets):
    with pytest.raises(UserError, match=message) as caught:
        prompts(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", [None, SimpleNamespace()], ids=["missing", "a folder of that name"])
@pytest.mark.parametrize("source", ["hub:org/DrawBench", "one", "some.parquet"])
def test_a_dataset_without_the_package_names_the_extra(source, package, fake_datasets, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", package)
    with pytest.raises(UserError, match=rf"reading prompts from {source} needs .*; pip install 'chainrule\[data\]'"):
        prompts(source)


def test_what_is_a_source_and_what_is_a_prompt(benchmark, monkeypatch):
    monkeypatch.chdir(benchmark.parent)
    (benchmark.parent / "fox").mkdir()
    sources = (
        "animals",
        "animals:test@3",
        "animals as a sketch of {}",
        "x.csv",
        "x.csv:Prompts",
        "benchmark",
        "benchmark:test",
        "hub:a/b",
    )
    literal = (
        "fox",
        "a fox",
        "animals as heroes",
        "a robot as {}",
        "fox: a study",
        "a fox:test",
        "a cat and/or a dog",
        "so e.g. this",
    )
    assert [text for text in sources + literal if is_source(text)] == list(sources)
    assert prompts_of(["fox", "benchmark/photo.json", "animals:test as {}"]) == [
        "fox",
        "a fox, photo",
        "a fox",
        *prompts("animals:test as {}"),
    ]
