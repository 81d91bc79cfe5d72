"""Steering single images: gradients of a reward with respect to latents, embeddings and controls, no weight changed."""

from chainrule.steer.found import Steered
from chainrule.steer.steering import steer

__all__ = ["Steered", "steer"]
