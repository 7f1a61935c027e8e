"""GIT (Wang et al. 2022): a CLIP tower's features, projected, stand before the text in one decoder.

Image tokens see each other, text sees the image and the text before it. Shapes as in base.py.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from raycap.errors import ConfigError
from raycap.models.base import Family, LabelLogits, evaluating, generate_options, head_at_labels


class Git(Family):
    name = "git"

    # --- parts --------------------------------------------------------------------------------------------------------

    def skip_modules(self, config):
        # Full paths: transformers matches a name against the path or its end, so "image_encoder" would skip nothing.
        return ["output", "git.image_encoder", "git.visual_projection"]

    def scopes(self):
        # "query, key, value, dense" match nothing in the tower (q_proj ...) by luck; the scope says it.
        return {
            "language": ("git.encoder.",),
            "vision": ("git.image_encoder.",),
            "projector": ("git.visual_projection.",),
        }

    def tower(self, model):
        encoder = model.git.image_encoder
        return encoder.tower if isinstance(encoder, _FeaturesOrTower) else encoder

    def load_weights(self, path, **options):
        from transformers import GitForCausalLM

        model = GitForCausalLM.from_pretrained(path, **options)
        if model.config.num_image_with_embedding is not None:
            raise ConfigError(f"{path} is a GIT for videos; raycap captions single images")
        model.git.image_encoder.requires_grad_(False)
        return model

    # --- images -------------------------------------------------------------------------------------------------------

    def image_size(self, processor):
        images = processor.image_processor
        size = images.crop_size if images.do_center_crop else images.size
        return 3, int(size["height"]), int(size["width"])

    def resize(self, processor, image):
        made = processor.image_processor(
            image.convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="np"
        )["pixel_values"][0]
        return np.ascontiguousarray(np.clip(np.round(made), 0, 255).astype(np.uint8))

    def pixel_values(self, processor, pixels):
        made = processor.image_processor(pixels, do_resize=False, do_center_crop=False, return_tensors="pt")
        return made["pixel_values"]

    def encode_images(self, cm, pixel_values):
        tower = self.tower(cm.model)
        dtype = next(tower.parameters()).dtype
        with evaluating(tower):
            return tower(pixel_values.to(cm.device, dtype)).last_hidden_state

    # --- text ---------------------------------------------------------------------------------------------------------

    def encode(self, processor, caption, prompt, max_tokens):
        head = self._head(processor, prompt)
        body = processor.tokenizer(caption, add_special_tokens=False)["input_ids"]
        room = max_tokens - len(head) - 1
        if room < 1:
            raise ConfigError(
                f"data.max_text_tokens={max_tokens} leaves no room for a caption: the prompt and the start and end "
                f"tokens are {len(head) + 1} tokens"
            )
        return [*head, *body[:room], processor.tokenizer.sep_token_id], len(head), len(body) > room

    def _head(self, processor, prompt: str) -> list[int]:
        """What the model is given: its start token and the prompt."""
        tokenizer = processor.tokenizer
        return [tokenizer.cls_token_id, *(tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else [])]

    # --- running ------------------------------------------------------------------------------------------------------

    def label_logits(self, cm, batch, images) -> LabelLogits:
        hidden = cm.model.git(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=self._visual_input(cm, images),  # GIT itself repeats fewer images over the rows, as tiles
            use_cache=False,
        ).last_hidden_state
        return head_at_labels(cm.model.output, hidden[:, -batch["input_ids"].shape[1] :], batch["labels"])

    @torch.no_grad()
    def generate(self, cm, images, decode):
        tokenizer = cm.processor.tokenizer
        head = self._head(cm.processor, cm.prompt)
        ids = torch.tensor([head] * images.shape[0], device=cm.device)
        out = cm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=self._visual_input(cm, images),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.sep_token_id,
            **generate_options(decode),
        )
        return [t.strip() for t in tokenizer.batch_decode(out[:, len(head) :], skip_special_tokens=True)]

    def _visual_input(self, cm, images: torch.Tensor) -> torch.Tensor:
        """`images` as GIT's pixel_values: [n, 3, H, W], or features [n, N, D] in four dimensions, which it asks for."""
        encoder = cm.model.git.image_encoder
        images = images.to(cm.device, next(self.tower(cm.model).parameters()).dtype)
        if images.dim() == 4:
            return images
        if not isinstance(encoder, _FeaturesOrTower):
            cm.model.git.image_encoder = _FeaturesOrTower(encoder)
        return images[:, None]


class _FeaturesOrTower(nn.Module):
    """GIT's tower; what it made before, handed in as [n, 1, N, D], it gives back as it is."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values, **options):
        from transformers.modeling_outputs import BaseModelOutput

        if pixel_values.shape[1] == 1:
            return BaseModelOutput(last_hidden_state=pixel_values[:, 0])
        return self.tower(pixel_values, **options)
