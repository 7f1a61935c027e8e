"""A frozen CLIP grafted onto a language model: its [CLS], projected and gated, is one token before the text.

[CLS] [d] -> projector Linear(d, 512) -> gate Linear(512, hidden size). CLIP, projector and gate hang on the language
model as `vision_tower`, `projector` and `gate`, so that its own modules keep the paths that plain peft knows.
Shapes as in base.py; features are [n, 1, d].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from raycap.errors import ModelError
from raycap.models.base import (
    Family,
    LabelLogits,
    evaluating,
    float_dtype,
    generate_options,
    head_at_labels,
    read_config,
    tiled,
)

PROJECTED = 512
VISION = "openai/clip-vit-base-patch32"
PARTS = ("vision_tower", "projector", "gate")


class ClipLlama(Family):
    name = "clip_llama"
    uses = frozenset({"vision_path", "vision_cls", "graft_path"})
    full_file = "graft.safetensors"
    """Projector and gate stand beside the adapter: the language model that plain peft loads it on has neither."""

    # --- parts --------------------------------------------------------------------------------------------------------

    def skip_modules(self, config):
        return ["lm_head", *PARTS]

    def scopes(self):
        return {"language": ("model.layers.",), "vision": ("vision_tower.",), "projector": ("projector", "gate")}

    def tower(self, model):
        return model.vision_tower

    def load_weights(self, path, **options):
        from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

        model = AutoModelForCausalLM.from_pretrained(path, **options)
        dtype, device = float_dtype(model.lm_head), model.lm_head.weight.device
        saved = getattr(model.config, "graft", None)
        if saved:  # written by save_pretrained of a model that was put together here
            tower = CLIPVisionModel(CLIPVisionConfig(**saved["vision"]))
        else:
            tower = CLIPVisionModel.from_pretrained(self.settings.vision_path or VISION)
            model.config.graft = {"vision": tower.config.to_dict()}
        _graft(model, tower)
        if saved:
            _read_parts(model, path)
        if self.settings.graft_path:
            read_graft(model, Path(self.settings.graft_path).expanduser())
        for part in PARTS:
            getattr(model, part).to(device, dtype)
        return model

    def read_config(self, path, *, trust_remote_code=False):
        config = super().read_config(path, trust_remote_code=trust_remote_code)
        if not getattr(config, "graft", None):
            vision = read_config(self.settings.vision_path or VISION)
            config.graft = {"vision": getattr(vision, "vision_config", vision).to_dict()}
        return config

    def build(self, config):
        from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

        model = AutoModelForCausalLM.from_config(config)
        _graft(model, CLIPVisionModel(CLIPVisionConfig(**config.graft["vision"])))
        return model

    def blank_images(self, config, count):
        size = config.graft["vision"]["image_size"]
        return torch.zeros(count, 3, size, size)

    def load_processor(self, path, *, trust_remote_code=False):
        from transformers import AutoTokenizer, CLIPImageProcessor

        own = (Path(path) / "preprocessor_config.json").is_file()
        images = CLIPImageProcessor.from_pretrained(path if own else self.settings.vision_path or VISION)
        return GraftProcessor(images, AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code))

    # --- images and text ----------------------------------------------------------------------------------------------

    def encode_images(self, cm, pixel_values):
        with evaluating(cm.model.vision_tower):
            return self._cls(cm, pixel_values)

    def _cls(self, cm, pixel_values: torch.Tensor) -> torch.Tensor:
        tower = cm.model.vision_tower
        made = tower(pixel_values.to(cm.device, float_dtype(tower)))
        after = self.settings.vision_cls == "after-norm"
        return (made.pooler_output if after else made.last_hidden_state[:, 0])[:, None]

    def head(self, processor, prompt):
        tokenizer = processor.tokenizer
        return [tokenizer.bos_token_id, *(tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else [])]

    # --- running ------------------------------------------------------------------------------------------------------

    def label_logits(self, cm, batch, images) -> LabelLogits:
        ids = batch["input_ids"]
        token = tiled(self._token(cm, images), len(ids))
        mask = batch["attention_mask"]
        hidden = cm.model.model(
            inputs_embeds=torch.cat([token, cm.model.get_input_embeddings()(ids)], 1),
            attention_mask=torch.cat([torch.ones_like(mask[:, :1]), mask], 1),
            use_cache=False,
        ).last_hidden_state
        return head_at_labels(cm.model.lm_head, hidden[:, 1:], batch["labels"])

    @torch.no_grad()
    def generate(self, cm, images, decode):
        tokenizer, token = cm.processor.tokenizer, self._token(cm, images)
        ids = torch.tensor([self.head(cm.processor, cm.prompt)] * len(token), device=cm.device)
        embeds = torch.cat([token, cm.model.get_input_embeddings()(ids)], 1)
        out = cm.model.generate(  # given embeddings alone, it returns what it has generated alone
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=cm.device),
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **generate_options(decode),
        )
        return [t.strip() for t in tokenizer.batch_decode(out, skip_special_tokens=True)]

    def _token(self, cm, images: torch.Tensor) -> torch.Tensor:
        """The image's token [n, 1, hidden size]."""
        images = images.to(cm.device, float_dtype(cm.model.vision_tower))
        features = images if images.dim() == 3 else self._cls(cm, images)
        return cm.model.gate(cm.model.projector(features))


def _graft(model: nn.Module, tower: nn.Module) -> None:
    """Hang the tower, and a projector and a gate that are not trained yet, on the language model."""
    model.vision_tower = tower
    with torch.random.fork_rng(devices=[]):  # every process begins with the same
        torch.manual_seed(0)
        model.projector = nn.Linear(tower.config.hidden_size, PROJECTED)
        model.gate = nn.Linear(PROJECTED, model.get_input_embeddings().weight.shape[1])


class GraftProcessor:
    """CLIP's image processor and the language model's tokeniser, saved side by side."""

    def __init__(self, image_processor: Any, tokenizer: Any):
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def save_pretrained(self, folder: Path | str) -> None:
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def to_dict(self) -> dict[str, Any]:
        return {"image_processor": self.image_processor.to_dict()}


def _read_parts(model: nn.Module, path: str) -> None:
    """Tower, projector and gate out of the safetensors files that hold the language model too."""
    from safetensors import safe_open

    for part in PARTS:
        tensors = {}
        for file in sorted(Path(path).glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                names = [n for n in opened.keys() if n.startswith(f"{part}.")]  # noqa: SIM118
                tensors |= {n.removeprefix(f"{part}."): opened.get_tensor(n) for n in names}
        try:
            getattr(model, part).load_state_dict(tensors)
        except RuntimeError as error:
            raise ModelError(f"{path}: its {part} does not fit: {error}") from error


def read_graft(model: nn.Module, folder: Path) -> None:
    """Projector and gate of `folder`: graft.safetensors, or the proj_final.pt and gate_final.pt of older training code.

    Raises:
        ModelError: they are not there, or are of other shapes.
    """
    from safetensors.torch import load_file

    found: dict[str, dict[str, torch.Tensor]] = {"projector": {}, "gate": {}}
    try:
        if (folder / ClipLlama.full_file).is_file():
            for name, tensor in load_file(folder / ClipLlama.full_file).items():
                part, _, leaf = name.partition(".")
                found[part][leaf] = tensor
        else:
            for part, file in (("projector", "proj_final.pt"), ("gate", "gate_final.pt")):
                found[part] = torch.load(folder / file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(
            f"model.graft_path={folder} has no readable {ClipLlama.full_file}, nor proj_final.pt and gate_final.pt: {error}"
        ) from error
    for part, tensors in found.items():
        module = getattr(model, part)
        wanted = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if shapes != wanted:
            raise ModelError(f"model.graft_path={folder}: {part} has {shapes}, the model wants {wanted}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                module.get_parameter(name).copy_(tensor)
