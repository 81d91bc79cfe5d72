"""What a command is given as a model: a model, or a run, with the adapters it was trained on top of."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainrule.config import AnyConfig, DistillConfig, FinetuneConfig, SteerConfig
from chainrule.errors import Note, UserError
from chainrule.files import digest
from chainrule.named import refuse_code
from chainrule.settings import TIMEOUT, Opening, Sampling, merged

if TYPE_CHECKING:
    from chainrule.adapters import Scale
    from chainrule.models import Model


@dataclass(frozen=True, slots=True)
class Source:
    """A model by name, how it is opened, which adapters are on it, and how its images are sampled.

    `guidance` is that of the run that was named: what the model has under what the run learned. `sampling` has what was asked
    for on the command line, which goes before both.
    """

    model: str
    opening: Opening = Opening()
    adapters: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    guidance: float | Mapping[str, Any] | None = None
    run: str | None = None  # the run that was named instead of the model; its own adapter is not among `adapters`

    @property
    def reward_source(self) -> str | None:
        """Where rewards that name no source come from: the scorers bundled with a bundled model; else each one's own."""
        from chainrule.models.bundled import BUNDLED

        return "tiny" if self.model in BUNDLED else None

    def load(self, timeout: float = TIMEOUT) -> Model:
        """The model, with its guidance and with its adapters on. Processes that hold it together wait `timeout` seconds."""
        from chainrule.models.loading import load
        from chainrule.processes import Processes, default_device

        if self.opening.network == "shard":  # which needs the others to load it: the first to reach them says how long to wait
            Processes.here(self.opening.device or default_device(), timeout)
        model = load(self.model, **dict(self.opening)).guided(self.guidance)
        for place in self.adapters:
            model = model.using(place)
        return model


def source_of(
    named: str | Path, opening: Opening = Opening(), sampling: Sampling = Sampling(), *, allow_code: bool = False
) -> Source:  # fmt: skip
    """A model, or the model of a run as it was opened and sampled there.

    What `opening` and `sampling` were given on the command line goes before what the run says. Raises UserError for a name that
    means nothing, and for a run that names code which is not allowed, before anything is loaded.
    """
    from chainrule.models.loading import check
    from chainrule.models.solvers import check as check_solver
    from chainrule.runs import Run

    source = replace(source_of_run(Run(Path(named)).config), run=str(named)) if is_run(named) else Source(str(named))
    if sampling.guidance is None:
        refuse_code({"guidance": source.guidance}, named, allow_code)
    else:
        source = replace(source, guidance=None)
    source = replace(source, opening=merged(source.opening, opening), sampling=merged(source.sampling, sampling))
    for guidance in (source.sampling.guidance, source.guidance):
        check_guidance(guidance)
    check_solver(source.opening.solver)
    check(source.model, source.opening.solver)
    for place in source.adapters:
        check_adapter(place, source.model, opening.solver)
    return source


def source_of_run(config: AnyConfig) -> Source:
    """The model of a run, as it was opened and sampled there, with the adapters that the run's own was put on top of."""
    match config:
        case FinetuneConfig(settings=settings) | SteerConfig(settings=settings):
            sampling = Sampling(sample_steps=settings.sample_steps)
            return Source(config.model, config.opening, config.adapter, sampling, settings.guidance)
        case DistillConfig(settings=distilled):
            return Source(config.model, config.opening, guidance=distilled.guidance)


def is_run(named: str | Path) -> bool:
    """Whether this names a run folder rather than a model."""
    return (Path(named) / "config.yaml").is_file()


def check_guidance(given: float | Mapping[str, Any] | None) -> None:
    """Raises UserError for a guidance by a name that is not there, or with options it has not."""
    if isinstance(given, Mapping):
        from chainrule.guidance import GUIDANCES

        GUIDANCES.read(given)


def adapter_facts(place: str | Path, scale: Scale = 1.0) -> dict[str, Any]:
    """What tells an adapter, or a run, from others: its name, its scale, and a digest of its files. It has to be there."""
    from chainrule.adapters.files import adapter_files, learned_folders
    from chainrule.models.published import local

    here = local(place)
    learned = [file for folder in learned_folders(here) for file in sorted(folder.iterdir()) if file.is_file()]
    said = list(scale) if isinstance(scale, tuple) else scale  # as it comes back out of a file
    return {"adapter": str(place), "scale": said, "sha256": digest([*adapter_files(here), *learned])}


def check_adapters(places: Sequence[str], model: str, solver: str | None, on: Sequence[str] = ()) -> None:
    """`check_adapter` for several. Notes a run that was trained on top of an adapter which is neither among them nor `on`."""
    from chainrule.runs import Run

    for place in places:
        check_adapter(place, model, solver)
        beneath: Sequence[str] = ()
        with suppress(UserError):  # a config.yaml that another trainer left beside its adapter
            beneath = getattr(Run(Path(place)).config, "adapter", ()) if is_run(place) else ()
        if missing := [name for name in beneath if name not in (*places, *on)]:
            warnings.warn(Note(f"{place} was trained on top of {', '.join(missing)}, which is not on the model here"), stacklevel=2)


def check_adapter(place: str | Path, model: str = "", solver: str | None = None) -> None:
    """Raises UserError for an adapter that is not there, or was published for another family than that of this model.

    A published one is downloaded now. It is sampled by its own solver, so another `solver` is refused.
    """
    from chainrule.adapters.files import adapter_files
    from chainrule.models.families import family_of
    from chainrule.models.published import local
    from chainrule.models.students import known as few_step

    family = family_of(model)
    known = few_step(place, family) if family else None
    if known and known.solver and solver not in (None, known.solver):
        raise UserError(f"solver is {solver!r}, but {place} is sampled by {known.solver}; leave the solver out")
    adapter_files(local(place))
