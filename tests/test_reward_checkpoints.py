"""Published checkpoints of other libraries, read into ours: the same numbers as a second implementation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from official import ImageRewardOfficial, OpenClip
from reward_models import ALL, PROMPTS, SIZE, random_images
from safetensors.torch import load_file, save_file
from torch import Tensor

import chainrule as cr
from chainrule import rewards
from chainrule.rewards import imagereward, openclip, parse
from chainrule.rewards.clip import load_clip, normalize
from chainrule.rewards.imagereward import load_imagereward
from chainrule.rewards.weights import heads


def _loaded(model: torch.nn.Module, path: Path) -> Any:
    """The second implementation with the tensors of a file."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state.get("state_dict", state))
    return model.eval()


def test_an_open_clip_checkpoint_gives_what_open_clip_gives(models: Path) -> None:
    file = models / "hps21" / "HPS_v2.1_compressed.pt"
    judge = load_clip(str(file), "hps")
    assert judge.size == SIZE
    images, ids = torch.rand(3, 3, SIZE, SIZE), judge.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    official = _loaded(OpenClip(int(ids.max()) + 1, ids.shape[1]), file)
    with torch.no_grad():
        image, text = official.encode_image(normalize(images)), official.encode_text(ids)
    ours = judge.embed(normalize(images), PROMPTS)
    torch.testing.assert_close(ours, (image, text), rtol=0, atol=1e-5)
    torch.testing.assert_close(judge.scale, official.logit_scale.detach().exp())
    values = rewards.HPSv21(str(file))(images, PROMPTS)
    torch.testing.assert_close(values, (image * text).sum(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(rewards.HPSv2(str(file))(images, PROMPTS), values)
    assert (image @ text.T).std() > 0.05  # prompts and images are told apart


def test_an_open_clip_checkpoint_may_be_safetensors(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "hps21", tmp_path / "hps"))
    state = torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    images = random_images(SIZE, 48, 3)
    ours = parse(f"hpsv2.1:{folder}/model.safetensors")(images, PROMPTS)
    torch.testing.assert_close(ours, ALL["hpsv2.1"](models)(images, PROMPTS))


def test_the_published_sizes_are_read_off_the_tensors() -> None:
    """ViT-H/14, HPSv2's, and ImageReward's BLIP-L, at full size without numbers: every name and every shape fits."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, CLIPConfig, CLIPModel

    def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {key: tuple(value.shape) for key, value in state.items() if not key.endswith("position_ids")}

    with torch.device("meta"):
        state = OpenClip(49408, 77, 224, 14, 1024, (1280, 16, 5120, 32), (1024, 16, 4096, 24)).state_dict()
        found = openclip.sizes(state, {})
        clip = CLIPModel(CLIPConfig(**found)).state_dict()
        blip = ImageRewardOfficial(30524, 512, 224, 16, (1024, 16, 4096, 24), (768, 12, 3072, 12)).state_dict()
        parts = [imagereward.without_stem(blip, stem) for stem in ("blip.visual_encoder.", "blip.text_encoder.")]
        vision, text = imagereward.sizes(*parts, {})
        seeing = BlipVisionModel(BlipVisionConfig(**vision)).state_dict()
        reading = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False).state_dict()
    assert shapes(openclip.to_transformers(state)) == shapes(clip)
    assert {imagereward.to_transformers(key): shape for key, shape in shapes(parts[0]).items()} == shapes(seeing)
    assert shapes(parts[1]) == shapes(reading)
    assert [found[f"{tower}_config"]["num_attention_heads"] for tower in ("vision", "text")] == [16, 16]
    assert [tower["num_attention_heads"] for tower in (vision, text)] == [16, 12]
    assert found["vision_config"]["image_size"] == vision["image_size"] == 224
    assert {found[f"{tower}_config"]["hidden_act"] for tower in ("vision", "text")} == {"gelu"}
    assert (found["text_config"]["eos_token_id"], found["text_config"]["bos_token_id"]) == (49407, 49406)
    assert (vision["layer_norm_eps"], BlipTextConfig(**text).layer_norm_eps) == (1e-6, 1e-12)  # too small to show in a score
    assert BlipVisionConfig(**vision).hidden_act == BlipTextConfig(**text).hidden_act == "gelu"
    assert [heads(width, {}) for width in (768, 1024, 1280, 1408, 1664)] == [12, 16, 16, 16, 16]


def test_imagereward_equals_its_second_implementation(models: Path) -> None:
    file = models / "imagereward" / "ImageReward.pt"
    judge = load_imagereward(str(file))
    tokens = judge.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert tokens.input_ids[:, 0].tolist() == [judge.tokenizer.cls_token_id] * 3
    assert tokens.attention_mask.sum(1).min() < 35
    images = torch.rand(3, 3, SIZE, SIZE)
    official = _loaded(ImageRewardOfficial(len(judge.tokenizer)), file)
    with torch.no_grad():
        wanted = official(normalize(images), tokens.input_ids, tokens.attention_mask)
        other = official(normalize(images), tokens.input_ids.flip(0), tokens.attention_mask.flip(0))
    ours = rewards.ImageReward(str(file))(images, PROMPTS)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
    assert (wanted - other).abs().max() > 1e-3  # the prompt counts
    folder = rewards.ImageReward(str(models / "imagereward"))
    torch.testing.assert_close(folder(images, PROMPTS), wanted, rtol=0, atol=1e-5)
    long = [f"{prompt} and many other things beside it" * 4 for prompt in PROMPTS]
    tokens = judge.tokenizer(long, truncation=True, max_length=35, return_tensors="pt")
    assert tokens.input_ids.shape == (3, 35)
    with torch.no_grad():
        wanted = official(normalize(images), tokens.input_ids, tokens.attention_mask)
    torch.testing.assert_close(folder(images, long), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_laions_aesthetic_head_as_it_is_published(models: Path, suffix: str, tmp_path: Path) -> None:
    """Its own keys, `layers.0.weight` on, in one file; a file with more than tensors is refused and runs nothing."""
    folder, clip, images = models / "aesthetic", str(models / "clip"), torch.rand(2, 3, SIZE, SIZE)
    (file,) = folder.glob("*.safetensors")
    state = {f"layers.{key.removeprefix('layers.')}": value for key, value in load_file(file).items()}
    head = tmp_path / f"sac+logos+ava1-l14-linearMSE{suffix}"
    save_file(state, head) if suffix == ".safetensors" else torch.save(state, head)
    expected = rewards.Aesthetic(str(folder), clip=clip)(images, ["", ""])
    assert torch.equal(rewards.Aesthetic(str(head), clip=clip)(images, ["", ""]), expected)
    bad = tmp_path / "bad.pth"
    torch.save({"layers.0.weight": Path("x")}, bad)
    with pytest.raises(cr.UserError, match="cannot read the weights in"):
        rewards.Aesthetic(str(bad), clip=clip).to("cpu")
