"""Random models of every kind the rewards read, a few kilobytes each, in the formats of the real ones; and every reward."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from official import ImageRewardOfficial, OpenClip, shaken
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from chainrule import rewards
from chainrule.rewards import reward_of

SIZE = 32
PROMPTS = ["a cat", "two small dogs on a beach", "a fox"]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SEES = {**TOWER, "image_size": SIZE, "patch_size": 8}


# --------------------------------------------------------------------------------------------------------------- images
def random_images(height: int, width: int, batch: int = 1, noise: float = 0.05, seed: int = 0) -> Tensor:
    """Smooth images with a little noise, already on 8-bit values: (b, 3, h, w) in [0, 1]."""
    torch.manual_seed(seed)
    coarse = torch.rand(batch, 3, max(2, height // 16), max(2, width // 16))
    x = F.interpolate(coarse, size=(height, width), mode="bicubic") + noise * torch.randn(batch, 3, height, width)
    return (x.clamp(0, 1) * 255).round() / 255


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(array) for array in (images * 255).round().byte().permute(0, 2, 3, 1).numpy()]


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def pil(name: str) -> Any:
    """transformers' processor that works with Pillow: transformers 5 names it so, 4 knows no other without torchvision."""
    import transformers

    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


# --------------------------------------------------------------------------------------------------------------- makers
def _save_words(folder: Path, length: int = 40) -> dict[str, int]:
    """A CLIP tokenizer that knows bytes; returns what a text configuration says of it."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=length).save_pretrained(folder)
    last = len(pieces) - 1
    ends = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    return {**ends, "vocab_size": len(pieces), "max_position_embeddings": length}


def _save_clip(folder: Path, seed: int) -> None:
    """A random CLIP of 30k weights in the format of the real ones."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    text, vision = {**TOWER, **_save_words(folder)}, {**SEES, "initializer_factor": 5.0}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).half().save_pretrained(folder)


def _save_open_clip(folder: Path) -> None:
    """HPSv2.1's official format, a .pt with a state_dict of open_clip's names; heads this small are said beside it."""
    torch.manual_seed(11)
    words = _save_words(folder)
    model = OpenClip(words["vocab_size"], words["max_position_embeddings"])
    torch.save({"epoch": 4, "state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    few = {"num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps({"vision_config": few, "text_config": few}))


def _save_imagereward(folder: Path) -> None:
    """ImageReward's official file, and the same tensors in a folder."""
    from transformers import BertTokenizer

    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(12)
    state = ImageRewardOfficial(len(pieces)).state_dict()
    torch.save(state, folder / "ImageReward.pt")
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    few = {"vision_config": {"num_attention_heads": 4}, "text_config": {"num_attention_heads": 2}}
    (folder / "config.json").write_text(json.dumps(few))


def _save_siglip(folder: Path) -> None:
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(13)
    words = _save_words(folder, 16)
    model = SiglipModel(SiglipConfig(text_config={**TOWER, **words, "projection_size": 32}, vision_config=SEES))
    shaken(model)
    model.save_pretrained(folder)


CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% for part in turn.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _save_hpsv3(folder: Path) -> None:
    """A random Qwen2-VL and head in the published file's format and names, with a tokenizer that knows bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from chainrule.rewards.hpsv3 import reward_head

    folder.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=marks[0])
    tokenizer.add_tokens(marks[1:], special_tokens=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    places = {"type": "mrope", "mrope_section": [1, 1, 2]}
    text = {**TOWER, "vocab_size": len(letters) + 8, "num_key_value_heads": 2, "rope_scaling": places, "num_hidden_layers": 2}
    sees = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    config = Qwen2VLConfig(text_config={**text, "bos_token_id": 0, "eos_token_id": 1}, vision_config=sees, **ids)
    config.save_pretrained(folder)
    torch.manual_seed(17)
    model = Qwen2VLForConditionalGeneration(config)
    shaken(model, 3.0)
    old = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): v
        for key, v in model.state_dict().items()
    }
    head = {f"rm_head.{key}": 3 * value for key, value in reward_head(TOWER["hidden_size"]).state_dict().items()}
    body = {key: value.bfloat16().clone() for key, value in old.items()}
    save_file({**body, **head}, folder / "HPSv3.safetensors")
    (folder / "instruction.txt").write_text("\nIs it well made?\nAsked for - {text_prompt}\n\nMarks: <|Reward|>\n\nEND\n")


def _save_detector(folder: Path, kind: str, side: int) -> None:
    import transformers

    torch.manual_seed(14)
    config = getattr(transformers, f"{kind}Config")
    text, vision = {**TOWER, **_save_words(folder, 16)}, {**SEES, "image_size": side}
    model = getattr(transformers, f"{kind}ForObjectDetection")(config(text_config=text, vision_config=vision, projection_dim=32))
    shaken(model)
    model.save_pretrained(folder)


def _save_dino(folder: Path) -> None:
    """A random DINOv2 with its processor's settings at a smaller size."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(15)
    model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE, patch_size=8))
    shaken(model, 4.0)
    model.save_pretrained(folder)
    facts = {"size": {"shortest_edge": 36}, "crop_size": {"height": SIZE, "width": SIZE}, "do_center_crop": True, "resample": 3}
    kind = {"image_processor_type": "BitImageProcessor", "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts | kind))


def _save_head(folder: Path, prefix: str) -> None:
    torch.manual_seed(7)
    folder.mkdir(parents=True)
    state = rewards.aesthetic_head(16).state_dict()
    save_file({prefix + key: 3 * value for key, value in state.items()}, folder / "head.safetensors")


def _save_classifier(folder: Path) -> None:
    """A random ResNet with ResNet-50's own processor settings at a smaller size."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(3)
    names = {0: "cat", 1: "dog, domestic dog", 2: "fox"}
    numbers = {name: i for i, name in names.items()}
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, id2label=names, label2id=numbers
    )  # fmt: skip
    ResNetForImageClassification(config).save_pretrained(folder)
    facts = {"size": {"shortest_edge": SIZE}, "crop_pct": 0.875, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ConvNextImageProcessor", **facts}))


def _save_nsfw(folder: Path) -> None:
    """A random ViT of two classes with the settings of Falconsai/nsfw_image_detection's processor at a smaller size."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(15)
    labels = {"id2label": {0: "normal", 1: "nsfw"}, "label2id": {"normal": 0, "nsfw": 1}}
    model = ViTForImageClassification(ViTConfig(**SEES, **labels))
    shaken(model, 8.0)
    model.save_pretrained(folder)
    facts = {"size": {"height": SIZE, "width": SIZE}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor", **facts}))


def _save_checker(folder: Path) -> None:
    """diffusers' own safety checker with random concepts, whose thresholds about half of the images are over."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(16)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config={**SEES, "initializer_factor": 5.0}, projection_dim=16))
    for name, threshold in (("concept", 0.5), ("special_care", 0.3)):
        getattr(checker, f"{name}_embeds").data.normal_()
        getattr(checker, f"{name}_embeds_weights").data.uniform_(threshold - 0.05, threshold + 0.05)
    checker.save_pretrained(folder)


def save_all(root: Path) -> None:
    """One folder for each kind of model, named as the bundled ones are, and a picture to copy the style of."""
    for seed, name in enumerate(("clip", "pick", "hps")):
        _save_clip(root / name, seed)
    _save_head(root / "aesthetic", "layers.")
    _save_classifier(root / "classifier")
    _save_open_clip(root / "hps21")
    _save_imagereward(root / "imagereward")
    _save_siglip(root / "siglip")
    _save_hpsv3(root / "hpsv3")
    _save_detector(root / "detector", "OwlViT", SIZE)
    _save_detector(root / "owlv2", "Owlv2", SIZE)
    _save_nsfw(root / "nsfw")
    _save_checker(root / "safety-checker")
    _save_dino(root / "dino")
    pictures(random_images(40, 56, seed=5))[0].save(root / "style.png")


# -------------------------------------------------------------------------------------------------------------- rewards
Make = Callable[[Path], rewards.Reward]
ALL: dict[str, Make] = {
    "clip": lambda root: rewards.CLIPScore(str(root / "clip")),
    "pickscore": lambda root: rewards.PickScore(str(root / "pick")),
    "hpsv2": lambda root: rewards.HPSv2(str(root / "hps")),
    "aesthetic": lambda root: rewards.Aesthetic(str(root / "aesthetic"), clip=str(root / "clip")),
    "hpsv2.1": lambda root: rewards.HPSv21(str(root / "hps21" / "HPS_v2.1_compressed.pt")),
    "imagereward": lambda root: rewards.ImageReward(str(root / "imagereward" / "ImageReward.pt")),
    "hpsv3": lambda root: rewards.HPSv3(str(root / "hpsv3")),
    "siglip": lambda root: rewards.SigLIP(str(root / "siglip")),
    "detect": lambda root: rewards.Detection("a cat, small dogs", str(root / "detector")),
    "area": lambda root: rewards.DetectedArea("a cat", str(root / "owlv2")),
    "safe": lambda root: rewards.Safe(str(root / "nsfw")),
    "concepts": lambda root: rewards.Concepts(str(root / "safety-checker")),
    "dropout": lambda root: rewards.Dropout(0.5, 3, str(root / "aesthetic"), clip=str(root / "clip")),
    "symmetry": lambda root: rewards.Symmetry(),
    "rotation": lambda root: rewards.RotationalAnticorrelation(),
    "compressible": lambda root: rewards.JPEGCompressibility(),
    "incompressible": lambda root: rewards.JPEGIncompressibility(quality=30),
    "classifier": lambda root: rewards.Classifier("dog", str(root / "classifier")),
    "style": lambda root: 1e-3 * rewards.Style(str(root / "style.png"), source=str(root / "clip")),
    "perceptual": lambda root: rewards.Perceptual(str(root / "clip")),
    "identity": lambda root: rewards.Identity(str(root / "dino")),
    "directional": lambda root: rewards.Directional(str(root / "clip"), text="a face to an angry face"),
    "target": lambda root: rewards.Target(rewards.PickScore(str(root / "pick")), 50.0),
    "on": lambda root: rewards.On(rewards.PickScore(str(root / "pick")), "cpu"),
    "function": lambda root: reward_of(brightness),
    "sum": lambda root: 10 * rewards.PickScore(str(root / "pick")) - 0.5 * rewards.Symmetry() + brightness,
}
# What these return for an image depends on its batch by design, so the contract of a value per image is not theirs.
OF_A_BATCH: dict[str, Make] = {
    "diversity": lambda root: rewards.Diversity(),
    "diversity of features": lambda root: rewards.Diversity(str(root / "clip")),
}
# The learned ones, and the folder or file of the model each looks with.
LEARNED = {
    "clip": "clip",
    "pickscore": "pick",
    "hpsv2": "hps",
    "aesthetic": "clip",
    "hpsv2.1": "hps21/HPS_v2.1_compressed.pt",
    "imagereward": "imagereward/ImageReward.pt",
    "hpsv3": "hpsv3",
    "siglip": "siglip",
    "detect": "detector",
    "area": "owlv2",
    "safe": "nsfw",
    "concepts": "safety-checker",
    "classifier": "classifier",
    "dropout": "clip",
    "identity": "dino",
}
