"""Trains tiny-emoji and its reward models from scratch: `python -m chainrule.tiny STAGE [--out build] [--steps N]`.

Every stage keeps its state in the output folder, goes on where it was stopped, and does nothing when it is finished.
`unpack` puts the shipped models there instead, to train them further with a larger `--steps`.
`vae`, `latents` and `unet` also run in several processes: `torchrun --nproc_per_node 2 -m chainrule.tiny vae`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from chainrule.errors import UserError
from chainrule.tiny import autoencoder
from chainrule.tiny.loop import RANK, WORLD, restore, start
from chainrule.tiny.trained import load_autoencoder, load_clip, load_faces, load_pipeline

WEIGHTS = Path(__file__).parent / "weights"
BEST = {"steps": 20, "guidance": 2.0}  # the sampling settings `check` finds best
FACES = {"steps": 50, "guidance": 1.0}  # the pixel model's
SHARED = ("vae", "latents", "unet")  # the stages that can run in several processes


def vae(out: Path, steps: int) -> None:
    """Train the autoencoder for `steps` steps."""
    autoencoder.fit(out, steps)


def latents(out: Path, count: int) -> None:
    """Encode `count` scenes with the autoencoder, once, for the stage `unet`."""
    from chainrule.tiny import generator

    # A file of a rank that this run does not have would hold other scenes than its number says.
    for file in _latents(out):
        if int(file.stem.removeprefix("latents-")) >= WORLD:
            file.unlink(missing_ok=True)
    generator.cache_latents(load_autoencoder(out), out, count)


def unet(out: Path, steps: int) -> None:
    """Train the denoiser and its text encoder for `steps` steps on the encoded scenes."""
    from chainrule.tiny import generator

    generator.fit(out, load_autoencoder(out), steps)


def clip(out: Path, steps: int) -> None:
    """Train the CLIP for `steps` steps."""
    from chainrule.tiny import critics

    critics.fit_clip(out, steps)


def pick(out: Path, steps: int) -> None:
    """Train the PickScore-like reward model for `steps` steps, from the CLIP."""
    from chainrule.tiny import critics, preferences

    critics.fit_preference("pick", preferences.PICK, load_clip(out), out, steps)


def hps(out: Path, steps: int) -> None:
    """Train the HPSv2-like reward model for `steps` steps, from the CLIP."""
    from chainrule.tiny import critics, preferences

    critics.fit_preference("hps", preferences.HPS, load_clip(out), out, steps)


def aesthetic(out: Path, steps: int) -> None:
    """Train the aesthetic head for `steps` steps, on the CLIP's features."""
    from chainrule.tiny import critics

    critics.fit_aesthetic(load_clip(out), out, steps)


def judges(out: Path, steps: int) -> None:
    """Train the two classifiers that measure the generator, for `steps` steps each."""
    from chainrule.tiny import judges

    judges.fit(out, steps)


def faces(out: Path, steps: int) -> None:
    """Train the pixel model of faces and animals for `steps` steps."""
    from chainrule.tiny import faces

    faces.fit(out, steps)


def classifier(out: Path, steps: int) -> None:
    """Train the classifier of faces and animals for `steps` steps."""
    from chainrule.tiny import faces

    faces.fit_classifier(out, steps)


def check(out: Path, steps: int) -> None:
    """Measure the finished models with `steps` sampling steps, and print the result."""
    from chainrule.tiny import faces, judges, quality

    quality.measure(load_pipeline(out), judges.load(out), out, steps=steps)
    print("tiny-faces, right class:", faces.measure(*load_faces(out)))


def pack(out: Path, steps: int) -> None:
    """Write the finished models into the package, in half precision, as they are shipped."""
    from chainrule.rewards.scorers import aesthetic_head
    from chainrule.tiny import critics, text

    unfinished = WEIGHTS.with_name("weights.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    load_pipeline(out).to(dtype=torch.float16).save_pretrained(unfinished / "emoji", safe_serialization=True)
    text.readable_by_older(unfinished / "emoji")
    (unfinished / "emoji" / "chainrule.json").write_text(json.dumps(BEST) + "\n")
    for stage in ("clip", "pick", "hps"):
        critics.save(load_clip(out, stage), unfinished / stage)
    head = aesthetic_head(critics.build().visual_projection.out_features)
    restore("aesthetic", head, out)
    critics.save_head(head, unfinished / "aesthetic")
    _pack_faces(out, unfinished)
    files = [file for file in unfinished.rglob("*") if file.is_file()]
    for file in files:
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    size = sum(file.stat().st_size for file in files)
    shutil.rmtree(WEIGHTS, ignore_errors=True)
    unfinished.rename(WEIGHTS)
    print(f"packed {WEIGHTS} ({size / 1e6:.1f} MB)")


def _pack_faces(out: Path, folder: Path) -> None:
    """Write the pixel model with the names of its classes, and the classifier with its preprocessing."""
    from chainrule.tiny import faces

    denoiser, network = load_faces(out)
    faces.pipeline(denoiser.half()).save_pretrained(folder / "faces", safe_serialization=True)
    (folder / "faces" / "chainrule.json").write_text(json.dumps(FACES | {"labels": faces.LABELS}) + "\n")
    network.half().save_pretrained(folder / "classifier")
    facts = {"size": {"shortest_edge": faces.SIDE}, "crop_pct": 1.0, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    text = json.dumps({"image_processor_type": "ConvNextImageProcessor"} | facts)
    (folder / "classifier" / "preprocessor_config.json").write_text(text + "\n")


def unpack(out: Path, steps: int) -> None:
    """Write the shipped models as checkpoints after their stages' default steps, so that training can continue from them.

    Optimizer states are not shipped; they start anew.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel

    from chainrule.rewards.scorers import aesthetic_head
    from chainrule.tiny import faces

    encoder = CLIPTextModel.from_pretrained(WEIGHTS / "emoji" / "text_encoder")
    denoiser = UNet2DConditionModel.from_pretrained(WEIGHTS / "emoji" / "unet")
    critics = {name: CLIPModel.from_pretrained(WEIGHTS / name) for name in ("clip", "pick", "hps")}
    head = aesthetic_head(critics["clip"].config.projection_dim)
    head.load_state_dict(load_file(WEIGHTS / "aesthetic" / "head.safetensors"))
    trained = {
        "vae": AutoencoderKL.from_pretrained(WEIGHTS / "emoji" / "vae"),
        "unet": torch.nn.ModuleDict({"text_encoder": encoder, "unet": denoiser}),
        **critics,
        "aesthetic": head,
        "faces": faces.build().from_pretrained(WEIGHTS / "faces" / "unet"),
        "classifier": faces.build_classifier().from_pretrained(WEIGHTS / "classifier"),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, module in trained.items():
        start(name, module, out, STAGES[name].steps)


def _latents(out: Path) -> list[Path]:
    return sorted(out.glob("latents-*.safetensors"))


def _cached(out: Path) -> int:
    """How many scenes are encoded, over the files of all ranks."""
    count = 0
    for saved in _latents(out):
        with safe_open(saved, "pt") as file:
            count += int(file.get_slice("latents").get_shape()[0])
    return count


def _trained(*files: str) -> Callable[[Path], int]:
    """How many steps a stage has made: those of the least trained of its models."""

    def steps(out: Path) -> int:
        reached = []
        for saved in (out / f"{name}.safetensors" for name in files):
            if not saved.exists():
                return 0
            with safe_open(saved, "pt") as file:
                reached.append(int(file.get_tensor("step")))
        return min(reached)

    return steps


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: its function, its default steps, and how many steps it has made (None: it is run every time)."""

    run: Callable[[Path, int], None]
    steps: int
    reached: Callable[[Path], int] | None = None

    def finished(self, out: Path, steps: int) -> bool:
        """Whether the stage has made this many steps, or encoded this many scenes."""
        # Scenes are shared out evenly, so that up to one per process may be left over.
        missing = WORLD - 1 if self.reached is _cached else 0
        return self.reached is not None and self.reached(out) >= steps - missing


STAGES = {
    "vae": Stage(vae, 2000, _trained("vae")),
    "latents": Stage(latents, 36000, _cached),
    "unet": Stage(unet, 8400, _trained("unet")),
    "clip": Stage(clip, 700, _trained("clip")),
    "pick": Stage(pick, 450, _trained("pick")),
    "hps": Stage(hps, 450, _trained("hps")),
    "aesthetic": Stage(aesthetic, 2000, _trained("aesthetic")),
    "judges": Stage(judges, 1200, _trained("judge-color", "judge-shape")),
    "faces": Stage(faces, 4000, _trained("faces")),
    "classifier": Stage(classifier, 1500, _trained("classifier")),
    "check": Stage(check, 20),
    "pack": Stage(pack, 0),
    "unpack": Stage(unpack, 1, _trained("vae", "unet")),  # nothing when training has begun here
}
ALL = [name for name in STAGES if name != "unpack"]


def run(name: str, out: Path, steps: int | None = None) -> None:
    """Run a stage unless it is finished. Raises UserError if an earlier stage is missing, or the stage needs one process."""
    stage = STAGES[name]
    if WORLD > 1 and name not in SHARED:
        raise UserError(f"stage {name} runs in one process; torchrun is for {', '.join(SHARED)}")
    wanted = stage.steps if steps is None else steps
    if stage.finished(out, wanted):
        if RANK == 0:
            print(f"{name}: finished")
        return
    out.mkdir(parents=True, exist_ok=True)
    stage.run(out, wanted)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 1, with one line on stderr, for a UserError."""
    parser = argparse.ArgumentParser(prog="python -m chainrule.tiny", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder of checkpoints and curves (build)")
    parser.add_argument("--steps", type=int, help="training steps; scenes for latents; sampling steps for check")
    given = parser.parse_args(arguments)
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        for name in ALL if given.stage == "all" else (given.stage,):
            run(name, given.out, given.steps)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
