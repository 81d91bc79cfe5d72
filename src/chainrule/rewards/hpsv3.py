"""HPSv3 (arXiv:2508.03789): Qwen2-VL reads picture and prompt, and a small network rates what it makes of one token."""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chainrule.errors import UserError
from chainrule.rewards.base import Reward
from chainrule.rewards.clip import check_source, full_name, lowered, normalize, resize
from chainrule.rewards.loaded import load_once
from chainrule.rewards.weights import fetch, fill, first_line, read_state, tokenizer_of

FILE = "HPSv3.safetensors"
SOURCE = f"MizzenAI/HPSv3/{FILE}"
QWEN = "Qwen/Qwen2-VL-7B-Instruct"  # whose configuration and tokenizer it keeps
CELLS = 256  # of a picture; each becomes one token of the language model
THINNEST = 200  # the largest ratio of a picture's sides that Qwen2-VL takes
READ, PROMPT = "<|Reward|>", "{text_prompt}"  # the token whose state is rated, and where the prompt goes


@dataclass(frozen=True)
class HPSv3(Reward):
    """Human Preference Score v3: mu of (mu, sigma) = head(h), h the last hidden state at the token <|Reward|>.

    Paper: arXiv:2508.03789. Source: MizzenAI/HPSv3/HPSv3.safetensors (Qwen2-VL-7B-Instruct fine-tuned on HPDv3, and three linear
    layers with ReLUs; the authors' code says MIT, the base model Apache-2.0), a path to that file, or a folder holding it; with
    Qwen2-VL-7B-Instruct's configuration and tokenizer, or those beside the file. The instruction around the prompt is the
    authors' text: it is read from `instruction.txt` beside the file, or from the source of their package, see `instruction`.
    Unbounded; means of whole models on the authors' benchmark are -0.2 (Stable Diffusion 2) to 10.6 (Kolors).
    Preprocessing: bicubic to multiples of 28 pixels near 448 x 448 in all, the aspect kept; CLIP's mean and deviation.
    16.6 GB in bfloat16, its published type: `hpsv3@cuda/bfloat16` holds it so. Images are read one at a time. Checked: pixels,
    tokens, formula and names, against transformers' processor and model with random weights; not: the published weights.
    """

    source: str = SOURCE

    def __post_init__(self) -> None:
        check_source(self.source, "hpsv3", needs=())

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return "hpsv3" if self.source == SOURCE else f"hpsv3:{self.source}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return load_hpsv3(self.source, images.device)(images, prompts)

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        load_hpsv3(self.source, device)
        return self


@dataclass(frozen=True)
class Judge:
    """HPSv3's frozen networks, its tokenizer and its instruction, on one device."""

    model: Any  # transformers.Qwen2VLModel
    head: nn.Sequential
    tokenizer: Any
    text: str

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scores (b,) of images (b, 3, h, w) in [0, 1] for their b prompts, float32.

        Images are read one at a time, so that none depends on its company to the last bit and nothing is padded. With several,
        the graph of each is made again in the backward pass: the memory is that of one.
        """
        alone = partial(checkpoint, self.score, use_reentrant=False, preserve_rng_state=False) if len(images) > 1 else self.score
        given = zip(images.split(1), map(self.tokens, prompts, [self.size(images)] * len(images)), strict=True)
        with torch.autocast(images.device.type, enabled=False) if lowered(images.device) else nullcontext():
            return torch.stack([alone(image, ids) for image, ids in given])

    def score(self, image: Tensor, ids: Tensor) -> Tensor:
        """mu, a scalar, of an image (1, 3, h, w) in [0, 1] that the tokens (n,) speak of.

        Positions count 0 to n - 1 on all three axes of Qwen2-VL's rotary embedding: HPSv3's forward gives the language model
        embeddings without positions, in training too, so a picture's tokens have none in two dimensions.
        """
        height, width = self.size(image)
        side, ids = self.model.config.vision_config.patch_size, ids.to(image.device)
        shape = torch.tensor([[1, height // side, width // side]], device=image.device)
        seen = self.model.visual(self.pixels(image).to(self.model.dtype), grid_thw=shape)
        seen = getattr(seen, "pooler_output", seen)  # transformers 4 gives the tensor itself
        words = self.model.get_input_embeddings()(ids)
        words = words.masked_scatter((ids == self.model.config.image_token_id)[:, None], seen.to(words.dtype))
        places = torch.arange(len(ids), device=image.device).expand(3, 1, -1)
        read = self.model.language_model(inputs_embeds=words[None], position_ids=places, use_cache=False).last_hidden_state[0]
        at = (ids == self.tokenizer.convert_tokens_to_ids(READ)).nonzero()[-1, 0]
        return self.head(read[at].float())[0]

    def size(self, images: Tensor) -> tuple[int, int]:
        """Height and width that images (b, 3, h, w) are resized to."""
        sees = self.model.config.vision_config
        return fitted(images.shape[-2], images.shape[-1], sees.patch_size * sees.spatial_merge_size)

    def pixels(self, image: Tensor) -> Tensor:
        """An image (1, 3, h, w) in [0, 1] as Qwen2-VL's `pixel_values` (patches, 3 * frames * side * side), in float32 or 64."""
        sees = self.model.config.vision_config
        x = normalize(resize(image, self.size(image)))[0]
        return patches(x, sees.patch_size, sees.spatial_merge_size, sees.temporal_patch_size)

    def tokens(self, prompt: str, size: tuple[int, int]) -> Tensor:
        """The numbers (n,) of the tokens for a prompt and a picture of this height and width.

        Raises UserError for a prompt that holds one of the two tokens that are looked for.
        """
        sees, blank = self.model.config.vision_config, self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        if said := next((token for token in (READ, blank) if token in prompt), None):
            raise UserError(f"hpsv3 cannot read the prompt {prompt!r}: {said} is a word of its own; leave it out")
        parts = [{"type": "image"}, {"type": "text", "text": self.text.replace(PROMPT, prompt)}]
        talk = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )  # fmt: skip
        many = size[0] * size[1] // (sees.patch_size * sees.spatial_merge_size) ** 2
        return self.tokenizer(talk.replace(blank, blank * many), return_tensors="pt")["input_ids"][0]


def fitted(height: int, width: int, side: int = 28) -> tuple[int, int]:
    """The height and width HPSv3 resizes a picture to: multiples of `side`, at most or at least `CELLS` of them in all.

    Qwen2-VL's rule with the smallest and the largest area the same. Raises UserError for a picture it does not take.
    """
    if max(height, width) > THINNEST * min(height, width):
        raise UserError(f"hpsv3 reads pictures whose sides are at most {THINNEST} to 1, not {height}x{width}")
    rows, columns = (max(1, round(each / side)) for each in (height, width))
    area = CELLS * side**2
    if rows * columns > CELLS:
        shrink = math.sqrt(height * width / area)
        rows, columns = (max(1, math.floor(each / shrink / side)) for each in (height, width))
    elif rows * columns < CELLS:
        grow = math.sqrt(area / (height * width))
        rows, columns = (math.ceil(each * grow / side) for each in (height, width))
    return rows * side, columns * side


def patches(x: Tensor, side: int, merge: int, frames: int) -> Tensor:
    """A picture (3, h, w) cut as Qwen2-VL's first layer reads it: (patches, 3 * frames * side * side).

    Patches that become one token stand together, `merge` x `merge` of them, row by row. A still picture is `frames` equal ones.
    """
    channels, height, width = x.shape
    cut = x.view(channels, height // (merge * side), merge, side, width // (merge * side), merge, side)
    flat = cut.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)  # rows, columns, merge, merge, channels, frames, side, side
    return flat.expand(*flat.shape[:5], frames, side, side).reshape(-1, channels * frames * side * side)


def instruction(folder: Path) -> str:
    """What HPSv3 is told about a picture, with {text_prompt} for the prompt and <|Reward|> for the token that is rated.

    It is the file `instruction.txt` in `folder`, or else it is read from the authors' package `hpsv3`, whose code is not run.
    Raises UserError if there is neither, or if one of the two words is not in it exactly once.
    """
    file = folder / "instruction.txt"
    text = file.read_text(encoding="utf-8") if file.is_file() else _published()
    if text is None:
        advice = "`pip install --no-deps hpsv3` brings it (it is read, not run)"
        raise UserError(f"no {str(file)!r}, and no package hpsv3 to take HPSv3's instruction from; {advice}")
    if wrong := next((word for word in (PROMPT, READ) if text.count(word) != 1), None):
        raise UserError(f"HPSv3's instruction must have {wrong} in it once, but has it {text.count(wrong)} times")
    return text


def _published() -> str | None:
    """The instruction in the source of the package hpsv3, if that is installed."""
    found = importlib.util.find_spec("hpsv3")
    place = next(iter(found.submodule_search_locations or ()), None) if found else None
    source = Path(place or "", "dataset", "data_collator_qwen.py")
    if place is None or not source.is_file():
        return None
    lines = [line for line in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(line, ast.Assign)]
    said = {ast.unparse(line.targets[0]): line.value for line in lines}
    parts = [said.get(name) for name in ("INSTRUCTION", "prompt_with_special_token")]
    return "".join(str(part.value) for part in parts if isinstance(part, ast.Constant))


def load_hpsv3(source: str, device: torch.device | str = "cpu") -> Judge:
    """The frozen HPSv3 of a file, folder or hub id, from safetensors: in float32, or in the type of an autocast (`On`'s).

    The head is in float32. Raises UserError for a checkpoint that is something else, lacks a tensor or has one too many.
    """
    name = full_name(device)
    return _load(check_source(source, "hpsv3", needs=()), name, lowered(torch.device(name)) or torch.float32)


@load_once
def _load(source: str, device: str, dtype: torch.dtype) -> Judge:
    here = Path(source)
    files = sorted(here.glob("*.safetensors")) if here.is_dir() else [fetch(_file(source))]
    text, tokenizer = instruction(files[0].parent), tokenizer_of(files[0], QWEN)
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer for {source!r} has no chat template; it is not that of a Qwen2-VL-Instruct")
    tokenizer.add_tokens([READ], special_tokens=True)
    state = {_name(key): value for file in files for key, value in read_state(file).items() if key != "lm_head.weight"}
    rating = {key.removeprefix("rm_head."): state.pop(key) for key in [*state] if key.startswith("rm_head.")}
    model = _network(state, files[0], dtype)
    if (last := tokenizer.convert_tokens_to_ids(READ)) >= model.config.text_config.vocab_size:
        raise UserError(f"{source!r} has no row for {READ}, token {last} of its tokenizer; it is another model's tokenizer")
    head = fill(reward_head(model.config.text_config.hidden_size), rating, files[0])
    return Judge(model.to(device), head.to(device), tokenizer, text)


def _file(source: str) -> str:
    """A file as it is; the published file of a hub id."""
    return source if source.endswith(".safetensors") else f"{source}/{FILE}"


def _name(key: str) -> str:
    """Qwen2VLModel's name for a tensor: the published file has those of transformers before 4.52, a newer copy may have others."""
    key = key.removeprefix("model.")
    return key if key.startswith(("visual.", "language_model.", "rm_head.")) else f"language_model.{key}"


def _network(state: dict[str, Tensor], path: Path, dtype: torch.dtype) -> Any:
    """Qwen2-VL without a language head, frozen, filled with exactly these tensors."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    source = str(path.parent) if (path.parent / "config.json").is_file() else QWEN
    try:
        config = Qwen2VLConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a configuration from {source!r}, or beside {str(path)!r}: {first_line(error)}") from error
    rows = state.get("language_model.embed_tokens.weight")
    if rows is None:
        raise UserError(f"{str(path)!r} is not an HPSv3 checkpoint: it has no 'model.embed_tokens.weight'")
    config.text_config.vocab_size = len(rows)  # Qwen's and one for <|Reward|>, without Qwen's empty ones
    with torch.device("meta"):
        wanted = {key: value.shape for key, value in Qwen2VLModel(config).state_dict().items()}
    if odd := sorted(wanted.keys() ^ state.keys()):
        said = "has no" if odd[0] in wanted else "should have no"
        raise UserError(f"{str(path)!r} is not an HPSv3 checkpoint: it {said} {odd[0]!r}")
    if odd := [key for key in wanted if wanted[key] != state[key].shape]:
        sizes = f"{tuple(state[odd[0]].shape)}, and by its configuration it is {tuple(wanted[odd[0]])}"
        raise UserError(f"{str(path)!r} does not fit: {odd[0]!r} is {sizes}")
    model = Qwen2VLModel.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return model.requires_grad_(False).eval()


def reward_head(width: int) -> nn.Sequential:
    """The layers that rate a hidden state of this width: `rm_head.0`, 3 and 5 of the checkpoint; out come mu and sigma."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )  # fmt: skip
