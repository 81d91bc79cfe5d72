"""The command `steer`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chainrule.cli.arguments import AllowCode, check_code, check_counts, is_config, place_of, prompts_of
from chainrule.cli.opened import check_adapters, check_guidance, source_of
from chainrule.cli.options import NOTHING, Given, with_options
from chainrule.config import SteerConfig
from chainrule.errors import UserError
from chainrule.settings import Sampling, Steering

if TYPE_CHECKING:
    from chainrule.rewards import Reward
    from chainrule.steer import Steered


@with_options
def steer(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Prompts, prompt sets or prompt files; or a .yaml file with any of the options below."),
    ] = None,
    given: Annotated[Given, SteerConfig] = NOTHING,
    style: Annotated[Path | None, typer.Option(help="A picture whose style the images should come close to.")] = None,
    adversarial: Annotated[str | None, typer.Option(help="A class that an image classifier should take the images for.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Images per prompt, with seeds 0, 1, ... [default: 1]")] = None,
    first_seed: Annotated[int | None, typer.Option(help="The first seed. [default: 0]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Move single images towards a reward, without training.

    With a bundled model, rewards that name no source are the scorers bundled with it.
    """
    check_counts(seeds=seeds)
    file = prompts[0] if prompts and len(prompts) == 1 and is_config(prompts[0]) else None
    config = SteerConfig.read(Path(file), given) if file else SteerConfig.of({"prompts": tuple(prompts or ()), **given})
    check_code(config, given, file, allow_code)
    wanted, numbers = _images(config, seeds, first_seed)
    if not (config.reward or style or adversarial):
        raise UserError("no reward given; pass --reward, --style or --adversarial")
    source = source_of(config.model, config.opening, allow_code=allow_code)
    reward = _reward(config.reward, style, adversarial, source.reward_source)
    out = place_of(config, resume=resume, overwrite=overwrite)
    from chainrule.steer.images import check_image
    from chainrule.steer.steering import check

    check(config.settings)
    check_guidance(config.settings.guidance)
    for picture in config.image:
        check_image(picture)
    places = (*([source.run] if source.run else []), *config.adapter)
    check_adapters(places, source.model, config.opening.solver, source.adapters)
    model = replace(source, adapters=(*source.adapters, *places)).load(config.settings.timeout)
    from chainrule.processes import Processes
    from chainrule.steer import steer as steered

    found = steered(
        model, wanted, reward, _settings(config.settings, source.sampling), seeds=numbers, images=config.image or None, out=out,
        resume=resume, overwrite=overwrite,
    )  # fmt: skip
    if Processes.here(model.device).main:
        _tell(found, Path(out), bool(config.image))


def _images(config: SteerConfig, seeds: int | None, first_seed: int | None) -> tuple[list[str], list[int]]:
    """The prompt and the seed of every image. Raises UserError where their numbers do not fit."""
    if config.seeds is not None and seeds is None and first_seed is None:  # a run's own: one prompt and one seed per image
        return list(config.prompts), list(config.seeds)
    first, pictures = first_seed or 0, len(config.image)
    wanted = prompts_of(config.prompts) if config.prompts else [""] * bool(pictures)
    if not wanted:
        raise UserError("nothing to steer: give a prompt, or a picture by --image")
    if not pictures:
        pairs = [(prompt, first + k) for prompt in wanted for k in range(seeds or 1)]
        return [prompt for prompt, _ in pairs], [number for _, number in pairs]
    if len(wanted) not in (1, pictures):
        raise UserError(f"{len(wanted)} prompts but {pictures} images; give one for all, or one each")
    if (seeds or 1) > 1:
        raise UserError(f"seeds is {seeds}, but a picture is steered once; leave seeds out")
    return wanted * (pictures if len(wanted) == 1 else 1), [first + k for k in range(pictures)]


def _reward(text: str | None, style: Path | None, adversarial: str | None, source: str | None) -> Reward:
    """The sum of what the three options ask for. Raises UserError for an unknown reward or a missing picture."""
    from chainrule import rewards

    own: dict[str, Any] = {"source": source} if source else {}
    terms = [*([rewards.parse(text, source)] if text else []), *([rewards.Style(str(style), **own)] if style else []),
             *([rewards.Classifier(adversarial, **own)] if adversarial else [])]  # fmt: skip
    return sum(terms[1:], terms[0])


def _settings(settings: Steering, trained: Sampling) -> Steering:
    """The settings; what they leave open is as the run was trained."""
    unset = {name: value for name, value in trained if getattr(settings, name) is None}
    return settings.model_copy(update=unset)


def _tell(found: Steered, out: Path, inverted: bool) -> None:
    if inverted:
        apart = ", ".join(f"{value:.3f}" for value in found.inverted)
        typer.echo(f"inverted and sampled again, the pictures differ from themselves by {apart} of the range of a pixel")
    for prompt, before, after, far in zip(found.prompts, found.rewards_before, found.rewards, found.distances, strict=True):
        typer.echo(f"{prompt or '(no prompt)'}: {before:.4g} to {after:.4g}, changed by {far:.3f} of the range of a pixel")
    typer.echo(f"pictures: {out / 'samples' / 'before_after.png'}, best: {out / 'best.png'}, report: {out / 'report.html'}")
