"""Between images and the latents a chain walks over. Height and width are two numbers everywhere."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from chainrule.errors import UserError
from chainrule.size import Size, config_size


class Codec(Protocol):
    """Latents in the chain's units, (b, c, h, w), to images in [0, 1], (b, 3, height, width), and back."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one image's latent."""

    @property
    def height(self) -> int:
        """Of the images, in pixels."""

    @property
    def width(self) -> int:
        """Of the images, in pixels."""

    @property
    def network(self) -> nn.Module | None:
        """The autoencoder; None where latents are pixels."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images, differentiable; values outside [0, 1] are clipped and pass no gradient."""

    def encode(self, images: Tensor) -> Tensor:
        """Images to latents, on the network's device where there is one, without a gradient."""


@dataclass(frozen=True, slots=True)
class KLAutoencoder:
    """An `AutoencoderKL` (arXiv:2112.10752): an image has `factor` times its latent's height and width.

    The chain's latents are (z - shift) * scale of the autoencoder's own z, by numbers or, for those whose configuration says
    `latents_mean` and `latents_std`, per channel.
    """

    network: Any
    latent_shape: tuple[int, int, int]
    factor: int

    @property
    def height(self) -> int:
        """Of the images, in pixels."""
        return self.latent_shape[1] * self.factor

    @property
    def width(self) -> int:
        """Of the images, in pixels."""
        return self.latent_shape[2] * self.factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images; values outside [0, 1] are clipped and pass no gradient. Raises UserError for a VAE set to tiling."""
        if getattr(self.network, "use_tiling", False):
            raise UserError(
                "the VAE decodes in tiles, which changes the image where they meet and so what the reward is differentiated "
                "through; use vae.disable_tiling() (slicing changes nothing and may stay on)"
            )
        scale, shift = self._units(latents)
        dtype = next(self.network.parameters()).dtype
        image = self.network.decode((latents / scale + shift).to(dtype), return_dict=False)[0]
        return (image.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images to the means of their latents, in float32 or better."""
        weight = next(self.network.parameters())
        seen = self.network.encode((images * 2 - 1).to(weight.device, weight.dtype))
        found = seen.latents if hasattr(seen, "latents") else seen.latent_dist.mean  # of an AutoencoderTiny there is one
        found = found.to(torch.promote_types(weight.dtype, torch.float32))
        scale, shift = self._units(found)
        return (found - shift) * scale

    def _units(self, latents: Tensor) -> tuple[Any, Any]:
        """Scale and shift: numbers, or (c, 1, 1)."""
        config = self.network.config
        mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or deviation is None:
            return config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
        return config.scaling_factor / latents.new_tensor(deviation).view(-1, 1, 1), latents.new_tensor(mean).view(-1, 1, 1)


@dataclass(frozen=True, slots=True)
class Pixels:
    """No autoencoder: a latent is the image in [-1, 1], (b, 3, height, width)."""

    height: int
    width: int

    @property
    def network(self) -> None:
        """None: latents are pixels."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(3, height, width)."""
        return 3, self.height, self.width

    def decode(self, latents: Tensor) -> Tensor:
        """[-1, 1] to [0, 1]; values outside are clipped and pass no gradient."""
        return (latents / 2 + 0.5).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        """[0, 1] to [-1, 1]."""
        return images * 2 - 1


def kl_autoencoder(pipe: Any, channels: int, size: Size | None, default: Any, patch: int = 1) -> KLAutoencoder:
    """The codec of a pipeline, for images of `size` pixels; `default` latents (a side, or height and width) where none is given.

    `patch` latents a side are one token of its transformer. Of a VAE that overflows in float16 (`force_upcast`, SDXL's) it
    holds a float32 copy: the pipeline needs its own. Raises UserError for a size that does not fit.
    """
    vae, factor = pipe.vae, pipe.vae_scale_factor
    unit = factor * patch
    if size is not None and any(side < unit or side % unit for side in size):
        advice = "must be a multiple of" if size[0] == size[1] else "both must be multiples of"
        raise UserError(f"size is {config_size(size)}, but {advice} {unit} for {type(pipe).__name__}")
    if size is None and default is None:
        raise UserError(f"the configuration of this {type(pipe).__name__} does not say its size; pass size")
    if size is not None:
        height, width = (side // factor for side in size)
    else:
        height, width = (default, default) if isinstance(default, int) else default
    if getattr(vae.config, "force_upcast", False) and next(vae.parameters()).dtype == torch.float16:
        vae = copy.deepcopy(vae).to(torch.float32)
    return KLAutoencoder(vae, (channels, height, width), factor)
