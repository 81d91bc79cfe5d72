"""Sends a run's adapter, with its card, to a model hub. Nothing is sent without a token."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from chainrule import card
from chainrule.adapters import adapter_files
from chainrule.errors import UserError
from chainrule.files import make_folder, write_text
from chainrule.runs import Run

CLIENT: type[BaseException] = HfHubHTTPError.__mro__[1]  # what the hub's client raises where there is no network


@dataclass(frozen=True, slots=True)
class Parcel:
    """What is sent, and where to."""

    adapter: Path
    repository: str
    files: tuple[Path, ...]  # by their places in the adapter folder

    @classmethod
    def of(cls, run: str | Path, repository: str) -> Parcel:
        """A run's adapter folder, its card brought up to date. Raises UserError for a bad name and for a run without an adapter."""
        try:
            validate_repo_id(repository)
            if repository.count("/") != 1:
                raise HFValidationError("it has no owner")
        except HFValidationError as error:
            raise UserError(f"{repository!r} is no name of a repository, OWNER/NAME: {str(error).splitlines()[0]}") from error
        made = Run(Path(run))
        _ = made.config  # a run, and not any folder
        adapter_files(made.folder)
        card.refresh(made)
        every = sorted(path.relative_to(made.adapter) for path in made.adapter.rglob("*") if path.is_file())
        return cls(made.adapter, repository, tuple(path for path in every if not path.name.startswith(".")))

    def __str__(self) -> str:
        sizes = {file.as_posix(): (self.adapter / file).stat().st_size for file in self.files}
        wide = max(map(len, sizes))
        lines = [f"  {name.ljust(wide)}  {size:>11,} bytes" for name, size in sizes.items()]
        return "\n".join([f"{self.adapter} to {self.repository}", *lines])

    def send(self, *, private: bool = False) -> str:
        """Upload the files, the card with the repository's name in its snippets; returns the address of the commit.

        Raises UserError in one line where the hub cannot be reached or refuses.
        """
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"cannot push to {self.repository}: HF_HUB_OFFLINE is set; unset it, or pass --dry-run")
        hub = HfApi()
        try:
            with tempfile.TemporaryDirectory() as folder:
                for file in self.files:
                    make_folder((Path(folder) / file).parent)
                    shutil.copyfile(self.adapter / file, Path(folder) / file)
                told = (self.adapter / card.CARD).read_text(encoding="utf-8")
                write_text(Path(folder) / card.CARD, told.replace(card.HERE, self.repository))
                hub.create_repo(self.repository, private=private, exist_ok=True)
                done = hub.upload_folder(repo_id=self.repository, folder_path=folder, commit_message="Add the adapter and its card")
        except HfHubHTTPError as error:
            raise UserError(f"the hub refuses {self.repository}: {str(error).strip().splitlines()[0]}") from error
        except (CLIENT, OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"cannot push to {self.repository}: {reason}; check the network, or pass --dry-run") from error
        return str(done.commit_url)
