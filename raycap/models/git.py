"""GIT (Wang et al. 2022): a CLIP tower's features, projected, stand before the text in one decoder.

Image tokens see each other, text sees the image and the text before it. Shapes as in base.py.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import nn

from raycap.errors import ConfigError
from raycap.models.base import Family, LabelLogits, float_dtype, generate_options, head_at_labels


class Git(Family):
    name = "git"
    prompt_tuning = True

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
        return model.git.image_encoder

    def load_weights(self, path, **options):
        from transformers import GitForCausalLM

        model = GitForCausalLM.from_pretrained(path, **options)
        if model.config.num_image_with_embedding is not None:
            raise ConfigError(f"{path} is a GIT for videos; raycap captions single images")
        return self._reclassed(model)

    def build(self, config):
        from transformers import GitForCausalLM

        return self._reclassed(GitForCausalLM(config))

    def _reclassed(self, model):
        model.git.image_encoder.requires_grad_(False)
        # Another class of the same module, not a module around it: the tower's paths stay those that plain peft knows.
        encoder = model.git.image_encoder
        encoder.__class__ = _taking_features(type(encoder))
        last = model.git.encoder.layer[-1]
        last.__class__ = _text_only(type(last))
        return model

    # --- text ---------------------------------------------------------------------------------------------------------

    def head(self, processor, prompt):
        tokenizer = processor.tokenizer
        return [tokenizer.cls_token_id, *(tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else [])]

    def end_token(self, processor):
        return processor.tokenizer.sep_token_id

    # --- running ------------------------------------------------------------------------------------------------------

    def label_logits(self, cm, batch, images) -> LabelLogits:
        hidden = cm.model.git(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=self._visual_input(cm, images),  # GIT itself repeats fewer images over the rows, as tiles
            use_cache=False,
            text_tokens=batch["input_ids"].shape[1],
        ).last_hidden_state
        return head_at_labels(cm.model.output, hidden, batch["labels"])

    @torch.no_grad()
    def generate(self, cm, images, decode):
        tokenizer = cm.processor.tokenizer
        head = self.head(cm.processor, cm.prompt)
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
        images = images.to(cm.device, float_dtype(self.tower(cm.model)))
        return images if images.dim() == 4 else images[:, None]


@lru_cache
def _taking_features(kind: type[nn.Module]) -> type[nn.Module]:
    """A tower's class that gives what it made before, handed in as [n, 1, N, D], back as it is."""

    def forward(self, pixel_values, **options):
        from transformers.modeling_outputs import BaseModelOutput

        if pixel_values.shape[1] == 1:
            return BaseModelOutput(last_hidden_state=pixel_values[:, 0])
        return kind.forward(self, pixel_values, **options)

    return type(kind.__name__, (kind,), {"forward": forward})


@lru_cache
def _text_only(kind: type[nn.Module]) -> type[nn.Module]:
    """The last layer's class that, told `text_tokens`, gives those alone: what becomes of the image there nobody reads.

    Image tokens are still looked at; they have keys and values, but no queries and no feed-forward.
    """

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, *, text_tokens=None, **options):
        if text_tokens is None or past_key_values is not None:
            return kind.forward(self, hidden_states, attention_mask, past_key_values, **options)
        text = hidden_states[:, -text_tokens:]
        seen = _attend(self.attention.self, text, hidden_states, attention_mask[:, :, -text_tokens:])
        return self.feed_forward_chunk(self.attention.output(seen, text))

    return type(kind.__name__, (kind,), {"forward": forward})


def _attend(attention: nn.Module, asking: torch.Tensor, asked: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """GitSelfAttention of `asking` [B, T, D] over `asked` [B, N + T, D]; `mask` [B, 1, T, N + T] is added. [B, T, D]"""
    heads = (attention.num_attention_heads, attention.attention_head_size)
    query, key, value = (
        linear(x).unflatten(-1, heads).transpose(1, 2)
        for linear, x in ((attention.query, asking), (attention.key, asked), (attention.value, asked))
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(attention.attention_head_size) + mask
    found = attention.dropout(scores.softmax(dim=-1)) @ value
    return found.transpose(1, 2).flatten(2)
