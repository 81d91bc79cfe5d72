"""Makes docs/steering.png: SDO at t = 600 on tiny-emoji, towards two texts, a style and a rating. Three minutes on a laptop."""

from importlib.resources import files
from pathlib import Path

import chainrule as cr
from chainrule import rewards
from chainrule.report import before_after

PICTURES = Path(str(files("chainrule"))) / "experiments" / "tables" / "pictures"
model = cr.load("tiny-emoji")
smile, waves = PICTURES / "smiling-face-0.png", str(PICTURES / "waves.png")
goals = [  # caption, prompt, reward, picture to start from, weight of staying close to it
    ("a picture, clip:an angry face", "", rewards.CLIPScore("tiny", "an angry face"), smile, 0.3),
    ("a picture, clip:a crying face", "", rewards.CLIPScore("tiny", "a crying face"), smile, 0.3),
    ("a house, style:waves.png", "a house", rewards.Style(waves, source="tiny"), None, 0.0),
    ("a painting of a fox, aesthetic", "a painting of a fox", rewards.Aesthetic("tiny"), None, 0.0),
]
found = [
    cr.steer(model, [prompt], reward, images=image, keep=keep, over="latent@600", sample_steps=20, updates=50, lr=0.03)
    for _, prompt, reward, image, keep in goals
]
captions = [f"{goal[0]}: {one.rewards_before[0]:.3g} to {one.rewards[0]:.3g}" for goal, one in zip(goals, found, strict=True)]
before_after([one.before[0] for one in found], [one.best for one in found], captions).save("docs/steering.png")
