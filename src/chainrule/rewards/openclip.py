"""Loads a CLIP from an open_clip checkpoint, the format of HPSv2's official weights, into transformers' CLIPModel.

The two differ in three things: one projection for queries, keys and values where transformers has three, the two output
projections transposed, and the names. Sizes are read off the tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from chainrule.errors import UserError
from chainrule.rewards.weights import depth, fill, heads, read_config, read_state

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TOWERS = {"visual.transformer.resblocks": "vision_model.encoder.layers", "transformer.resblocks": "text_model.encoder.layers"}


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under the names of transformers' CLIPModel. Raises KeyError naming a key that is missing."""
    found = {ours: state[theirs] for theirs, ours in _WHOLE.items()}
    found["visual_projection.weight"] = state["visual.proj"].T.contiguous()
    found["text_projection.weight"] = state["text_projection"].T.contiguous()
    for theirs, ours in _TOWERS.items():
        for i in range(depth(state, theirs)):
            for kind in ("weight", "bias"):
                for name, other in _BLOCK.items():
                    found[f"{ours}.{i}.{other}.{kind}"] = state[f"{theirs}.{i}.{name}.{kind}"]
                thirds = state[f"{theirs}.{i}.attn.in_proj_{kind}"].chunk(3)
                for letter, third in zip("qkv", thirds, strict=True):
                    found[f"{ours}.{i}.self_attn.{letter}_proj.{kind}"] = third.contiguous()
    return found


def sizes(state: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a CLIPConfig, read off open_clip's tensors. `facts`, a config.json's values, give what no shape tells."""
    vision, text = facts.get("vision_config") or {}, facts.get("text_config") or {}
    width, _, patch, _ = state["visual.conv1.weight"].shape
    side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5) * patch
    vocabulary, narrow = state["token_embedding.weight"].shape
    act = {"hidden_act": vision.get("hidden_act", "gelu")}
    ends = {"eos_token_id": text.get("eos_token_id", vocabulary - 1), "bos_token_id": text.get("bos_token_id", vocabulary - 2)}
    towers = {
        "vision_config": act
        | {"hidden_size": width, "patch_size": patch, "image_size": side, "num_attention_heads": heads(width, vision)},
        "text_config": act
        | ends
        | {"hidden_size": narrow, "vocab_size": vocabulary, "num_attention_heads": heads(narrow, text)}
        | {"max_position_embeddings": len(state["positional_embedding"]), "pad_token_id": text.get("pad_token_id", vocabulary - 1)},
    }
    for (stem, _), tower in zip(_TOWERS.items(), towers.values(), strict=True):
        tower["num_hidden_layers"] = depth(state, stem)
        tower["intermediate_size"] = len(state[f"{stem}.0.mlp.c_fc.bias"])
    return {"projection_dim": state["visual.proj"].shape[1], **towers}


def load(path: Path) -> Any:
    """The frozen CLIPModel of an open_clip checkpoint, in float32. Raises UserError for another model's file."""
    from transformers import CLIPConfig, CLIPModel

    state = read_state(path)
    try:
        config, converted = CLIPConfig(**sizes(state, read_config(path))), to_transformers(state)
    except KeyError as error:
        raise UserError(f"{str(path)!r} is not an open_clip checkpoint: it has no {error.args[0]!r}") from error
    return fill(CLIPModel(config), converted, path)
