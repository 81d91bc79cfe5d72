"""Loads the models that the stages have trained from the folder of checkpoints.

Each function raises UserError for a stage that is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from chainrule.tiny.loop import restore

if TYPE_CHECKING:  # a stage imports only what it needs
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DModel
    from transformers import CLIPModel, ConvNextForImageClassification


def load_autoencoder(out: Path) -> AutoencoderKL:
    """The trained autoencoder, frozen."""
    from chainrule.tiny import autoencoder

    vae = autoencoder.build()
    restore("vae", vae, out)
    return vae.eval().requires_grad_(False)


def load_clip(out: Path, stage: str = "clip") -> CLIPModel:
    """The model of the stage `clip`, `pick` or `hps`."""
    from chainrule.tiny import critics

    model = critics.build()
    restore(stage, model, out)
    return model.eval()


def load_pipeline(out: Path) -> StableDiffusionPipeline:
    """The finished generator as a pipeline. Its autoencoder has the scale that the latents had in training."""
    from chainrule.tiny import generator

    trained, vae = generator.Generator(), load_autoencoder(out)
    restore("unet", trained, out)
    vae.register_to_config(scaling_factor=generator.load_latents(out)[1])
    return generator.pipeline(trained.eval().requires_grad_(False), vae)


def load_faces(out: Path) -> tuple[UNet2DModel, ConvNextForImageClassification]:
    """The pixel model of faces and animals, and their classifier."""
    from chainrule.tiny import faces

    denoiser, network = faces.build(), faces.build_classifier()
    restore("faces", denoiser, out)
    restore("classifier", network, out)
    return denoiser.eval(), network.eval()
