"""Prompts from Hugging Face datasets: on the hub, saved in a folder, or a Parquet file. Needs the extra `chainrule[data]`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chainrule.errors import UserError
from chainrule.prompts.rows import column_of, texts_of

PREFIX = "hub:"
SPLITS = "dataset_dict.json"  # what save_to_disk writes beside the folders of several splits


def read_hub(source: str) -> list[str]:
    """The prompts of a dataset on the hub, `hub:owner/name[/configuration][:split[:column]]`. No code from the dataset is run.

    The split may be left out if there is only one, and the column if its name is a usual one (see `column_of`).
    Raises UserError if the package `datasets` is missing, the hub cannot be reached, or there is no such split or column.
    """
    repository, split, column = ([*source.removeprefix(PREFIX).split(":"), "", ""])[:3]
    names = repository.split("/")
    if source.count(":") > 3 or not 1 <= len(names) <= 3 or not all(names):
        raise UserError(f"the prompt source {source!r} must look like hub:owner/name or hub:owner/name:split:column")
    package, where = _package(source), f"{PREFIX}{repository}"
    hint = "; check the name and the network (HF_HUB_OFFLINE must not be 1), or pass a file"
    splits = _loaded(lambda: package.load_dataset("/".join(names[:2]), *names[2:]), f"{where} from the hub", hint)
    split = _split(splits, split, where, f"{where}:")
    return _column(splits[split], column, f"the dataset {where}", f"{where}:{split}")


def is_saved(folder: Path) -> bool:
    """Whether the folder was written by `save_to_disk`, of one dataset or of its splits."""
    return (folder / "state.json").is_file() or (folder / SPLITS).is_file()


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder, as a dataset is downloaded, by name; those in its `data` if it has none itself."""
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


def read_saved(folder: Path, column: str = "") -> list[str]:
    """The prompts of a dataset that `save_to_disk` wrote. Raises UserError for several splits: each has a folder of its own."""
    package = _package(str(folder))
    found = _loaded(lambda: package.load_from_disk(str(folder)), f"the folder {folder}")
    if (folder / SPLITS).is_file():
        split = _split(found, "", str(folder), f"{folder}/")
        folder, found = folder / split, found[split]
    return _column(found, column, f"the dataset {folder}", str(folder))


def read_parquet(path: Path, column: str = "") -> list[str]:
    """The prompts of a Parquet file. Raises UserError for a file in another format."""
    try:
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from error
    if not is_parquet:
        raise UserError(f"the prompt file {path} is not a Parquet file")
    package = _package(str(path))
    found = _loaded(lambda: package.Dataset.from_parquet(str(path)), f"the prompt file {path}")
    return _column(found, column, f"the prompt file {path}", str(path))


def _split(splits: Any, wanted: str, dataset: str, form: str) -> str:
    """The wanted split, or the only one. `form` is the source without a split, for the error.

    Raises UserError naming the splits.
    """
    names = [str(name) for name in splits]
    listed = ", ".join(names) or "none"
    if wanted and wanted not in names:
        raise UserError(f"the dataset {dataset} has no split {wanted!r} (splits: {listed})")
    if not wanted and len(names) != 1:
        hint = f"; pass one, as in {form}{names[0]}" if names else ""
        raise UserError(f"the dataset {dataset} has not one split but {len(names)} (splits: {listed}){hint}")
    return wanted or names[0]


def _package(source: str) -> Any:
    """The package `datasets`, and not a folder of that name in the current directory. Raises UserError if it is missing."""
    try:
        package = importlib.import_module("datasets")
        if hasattr(package, "load_dataset"):
            return package
    except ImportError:
        pass
    raise UserError(f"reading prompts from {source} needs the package datasets; pip install 'chainrule[data]'")


def _loaded(load: Callable[[], Any], what: str, hint: str = "") -> Any:
    try:
        return load()
    except Exception as error:  # the errors of datasets, the hub and Arrow share no base
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot load {what}: {reason}{hint}") from error


def _column(table: Any, wanted: str, where: str, form: str) -> list[str]:
    name = column_of(table.column_names, wanted, where, form)
    return [prompt for prompt in texts_of(table[name], where, name) if prompt]
