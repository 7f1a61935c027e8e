"""GIT (Wang et al. 2022): projected features of a CLIP tower stand before the text in one causal decoder.

Shapes: B images, T text positions, N visual tokens, D width of the tower, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from raycap.config import DecodeSettings
from raycap.models.base import Family, head_at_labels


class Git(Family):
    name = "git"

    def load_weights(self, path, **options):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(path, **options)

    def skip_modules(self, config):
        # Full paths: a bare "image_encoder" skips nothing; a list of one's own switches off the default for the head.
        return ["output", "git.image_encoder", "git.visual_projection"]

    def scope_prefixes(self, scope):
        parts = {
            "language": ("git.encoder.",),
            "vision": ("git.image_encoder.",),
            "projector": ("git.visual_projection.",),
        }
        return sum(parts.values(), ()) if scope == "all" else parts[scope]

    def tower(self, model):
        return model.git.image_encoder

    def wrap_tower(self, model):
        """Let the tower's place take ready features [B, 1, N, D] as well as pixels [B, 3, H, W]."""
        if not isinstance(model.git.image_encoder, TowerOrFeatures):
            model.git.image_encoder = TowerOrFeatures(model.git.image_encoder)

    def image_size(self, processor):
        crop = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size
        return (3, crop["height"], crop["width"])

    def resize(self, processor, image):
        made = processor.image_processor(
            image.convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="np"
        )["pixel_values"][0]
        return np.ascontiguousarray(made.clip(0, 255).round().astype(np.uint8))

    def pixel_values(self, processor, pixels):
        p = processor.image_processor
        mean = torch.tensor(p.image_mean, device=pixels.device)[:, None, None]
        std = torch.tensor(p.image_std, device=pixels.device)[:, None, None]
        return (pixels.float() * p.rescale_factor - mean) / std

    def encode(self, processor, caption, prompt, max_tokens):
        """Token ids [CLS] prompt caption [SEP], how many of them the loss leaves out, and whether the caption was cut."""
        tokenizer = processor.tokenizer
        head = (
            [tokenizer.cls_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
            if prompt
            else [tokenizer.cls_token_id]
        )
        body = tokenizer(caption, add_special_tokens=False)["input_ids"]
        room = max_tokens - len(head) - 1
        return [*head, *body[:room], tokenizer.sep_token_id], len(head), len(body) > room

    @torch.no_grad()
    def encode_images(self, cm, pixel_values):
        tower = cm.model.git.image_encoder
        tower = getattr(tower, "tower", tower)
        dtype = next(tower.parameters()).dtype
        return tower(pixel_values.to(cm.device, dtype)).last_hidden_state

    def label_logits(self, cm, batch, *, pixel_values=None, features=None):
        images = features[:, None] if features is not None else pixel_values
        hidden = cm.model.git(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=images, use_cache=False
        ).last_hidden_state
        return head_at_labels(cm.model.output, hidden[:, -batch["input_ids"].shape[1] :], batch["labels"])

    @torch.no_grad()
    def generate(self, cm, images: torch.Tensor, decode: DecodeSettings) -> list[str]:
        """Captions of pixel values [B, 3, H, W] or tower features [B, N, D]."""
        tokenizer = cm.processor.tokenizer
        head = [tokenizer.cls_token_id]
        if cm.prompt:
            head += tokenizer(cm.prompt, add_special_tokens=False)["input_ids"]
        if images.dim() == 3:
            self.wrap_tower(cm.model)
            images = images[:, None]
        ids = torch.tensor([head] * images.shape[0], device=cm.device)
        options = {}
        if decode.num_beams > 1:
            options["length_penalty"] = decode.length_penalty
        if decode.no_repeat_ngram_size:
            options["no_repeat_ngram_size"] = decode.no_repeat_ngram_size
        out = cm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=images.to(cm.device),
            do_sample=False,
            num_beams=decode.num_beams,
            max_new_tokens=decode.max_new_tokens,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.sep_token_id,
            **options,
        )
        return [t.strip() for t in tokenizer.batch_decode(out[:, len(head) :], skip_special_tokens=True)]


class TowerOrFeatures(nn.Module):
    """A vision tower that passes ready features through. GIT checks that pixel_values have 4 or 5 dimensions."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values, **kwargs):
        from transformers.modeling_outputs import BaseModelOutput

        if pixel_values.shape[1] == 1:
            return BaseModelOutput(last_hidden_state=pixel_values[:, 0])
        return self.tower(pixel_values, **kwargs)
