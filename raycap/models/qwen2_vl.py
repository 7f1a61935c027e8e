"""Qwen2-VL and Qwen2.5-VL (Wang et al. 2024): images at their own aspect, two by two patches merged, in a chat.

Shapes as in base.py, and: M the most pixels of an image, P patches of it (M / patch^2), G = P / 4 groups of four that
become one token each, d the tower's width. Images differ in size, arrays do not, so each carries its own size in front:

- pixels: uint8 [3, 1, 2 + M]. The first two say height and width in groups (low byte, high byte), then the picture.
- pixel values: [n, 1, 1 + P, 3 * 2 * patch^2]. The first row begins with height and width in groups.
- features: [n, 1 + G, 4 * d], the tower's output before the projector (`visual.merger`), first row likewise.
"""

from __future__ import annotations

import numpy as np
import torch

from raycap.errors import DataError
from raycap.models.base import (
    IGNORED,
    Family,
    LabelLogits,
    evaluating,
    float_dtype,
    generate_options,
    head_at_labels,
    tiled,
)

MAX_PIXELS = 12_845_056
"""Of the processors that come with the models, where `model.max_pixels` does not say otherwise."""


class Qwen2VL(Family):
    name = "qwen2_vl"
    uses = frozenset({"min_pixels", "max_pixels"})
    one_placeholder = True
    packs_vision = False

    # --- parts --------------------------------------------------------------------------------------------------------

    def skip_modules(self, config):
        return ["lm_head", "model.visual"]

    def scopes(self):
        return {
            "language": ("model.language_model.layers.",),
            "vision": ("model.visual.blocks.",),
            "projector": ("model.visual.merger.",),
        }

    def tower(self, model):
        return model.model.visual

    def load_weights(self, path, **options):
        from transformers import AutoConfig

        return _class_of(AutoConfig.from_pretrained(path)).from_pretrained(path, **options)

    def build(self, config):
        return _class_of(config)(config)

    def blank_images(self, config, count):
        vision = config.vision_config
        unit = vision.patch_size * vision.spatial_merge_size
        groups = (self.settings.max_pixels or MAX_PIXELS) // unit**2
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        made = torch.zeros(count, 1, 1 + groups * vision.spatial_merge_size**2, width)
        made[:, 0, 0, :2] = torch.tensor([1.0, groups])
        return made

    def load_processor(self, path, *, trust_remote_code=False):
        processor = super().load_processor(path, trust_remote_code=trust_remote_code)
        size = dict(processor.image_processor.size)
        size["shortest_edge"] = self.settings.min_pixels or size["shortest_edge"]
        size["longest_edge"] = self.settings.max_pixels or size["longest_edge"]
        processor.image_processor.size = type(processor.image_processor.size)(**size)
        return processor

    # --- images -------------------------------------------------------------------------------------------------------

    def image_size(self, processor):
        return 3, 1, 2 + processor.image_processor.size["longest_edge"]

    def resize(self, processor, image):
        images = processor.image_processor
        made = images(image.convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="pt")
        _, rows, columns = made["image_grid_thw"][0].tolist()
        p, m = images.patch_size, images.merge_size
        # The patches back into a picture; of the two equal frames the first.
        patches = made["pixel_values"].view(rows // m, columns // m, m, m, 3, images.temporal_patch_size, p, p)
        whole = patches[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, -1)
        room = images.size["longest_edge"]
        if whole.shape[1] > room:
            raise DataError(
                f"an image of {image.width} x {image.height} px becomes {whole.shape[1]} px, more than "
                f"model.max_pixels={room}: its sides are too unequal. Remove it, or raise model.max_pixels"
            )
        canvas = np.zeros((3, 1, 2 + room), dtype=np.uint8)
        for place, units in enumerate((rows // m, columns // m)):
            canvas[:2, 0, place] = units % 256, units // 256
        canvas[:, 0, 2 : 2 + whole.shape[1]] = np.clip(np.round(whole.numpy()), 0, 255)
        return canvas

    def pixel_values(self, processor, pixels):
        images = processor.image_processor
        p, unit = images.patch_size, images.patch_size * images.merge_size
        width = 3 * images.temporal_patch_size * p * p
        made = torch.zeros(len(pixels), 1, 1 + (pixels.shape[-1] - 2) // p**2, width)
        for k, canvas in enumerate(pixels[:, :, 0]):
            rows, columns = (canvas[0, :2].long() + 256 * canvas[1, :2].long()).tolist()
            picture = canvas[:, 2 : 2 + rows * columns * unit**2].reshape(3, rows * unit, columns * unit)
            patches = images(picture, do_resize=False, return_tensors="pt")["pixel_values"]
            made[k, 0, 0, :2] = torch.tensor([rows, columns], dtype=torch.float32)
            made[k, 0, 1 : 1 + len(patches)] = patches
        return made

    def encode_images(self, cm, pixel_values):
        with evaluating(self.tower(cm.model)):
            return self._features(cm, pixel_values)

    def _features(self, cm, pixel_values: torch.Tensor) -> torch.Tensor:
        visual, config = cm.model.model.visual, cm.model.config.vision_config
        sizes, four = _sizes(pixel_values[:, 0]), config.spatial_merge_size**2
        grid = torch.cat([torch.ones_like(sizes[:, :1]), sizes * config.spatial_merge_size], 1)
        counts = sizes.prod(1).tolist()
        patches = torch.cat([image[0, 1 : 1 + four * n] for image, n in zip(pixel_values, counts)])
        made = visual(patches.to(cm.device, float_dtype(visual)), grid_thw=grid.to(cm.device)).last_hidden_state
        groups = made.view(len(made) // four, -1)
        if hasattr(visual, "window_size"):  # 2.5 attends in windows, and puts its groups back in order after the merger
            from transformers.vision_utils import get_vision_window_index

            windows, _ = get_vision_window_index(
                grid.to(cm.device), spatial_merge_size=visual.spatial_merge_size, window_size=visual.window_size,
                patch_size=visual.patch_size,
            )  # fmt: skip
            groups = groups[torch.argsort(windows)]
        features = groups.new_zeros(len(grid), 1 + (pixel_values.shape[2] - 1) // four, groups.shape[1])
        features[:, 0, :2] = sizes.to(features)
        for k, part in enumerate(groups.split(counts)):
            features[k, 1 : 1 + len(part)] = part
        return features

    # --- text ---------------------------------------------------------------------------------------------------------

    def head(self, processor, prompt):
        return processor.tokenizer(self._question(processor, prompt), add_special_tokens=False)["input_ids"]

    def _question(self, processor, prompt: str) -> str:
        """The chat up to where the answer begins, with one placeholder for the image."""
        content = [{"type": "image"}, *([{"type": "text", "text": prompt}] if prompt else [])]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    # --- running ------------------------------------------------------------------------------------------------------

    def label_logits(self, cm, batch, images) -> LabelLogits:
        merged, sizes = self._merged(cm, images)
        sizes = tiled(sizes, len(batch["input_ids"]))
        merged = tiled(merged, len(sizes))
        ids, mask, labels = spread_batch(batch, sizes.prod(1), cm.model.config.image_token_id)
        hidden = cm.model.model(attention_mask=mask, **self._inputs(cm, ids, merged, sizes), use_cache=False)
        cm.model.model.rope_deltas = None
        return head_at_labels(cm.model.lm_head, hidden.last_hidden_state, labels)

    @torch.no_grad()
    def generate(self, cm, images, decode):
        tokenizer = cm.processor.tokenizer
        merged, sizes = self._merged(cm, images)
        head = torch.tensor([self.head(cm.processor, cm.prompt)] * len(sizes), device=cm.device)
        ids, source = _spread(head, sizes.prod(1), cm.model.config.image_token_id, left=True)
        mask = (source != head.shape[1]).long()
        ids = torch.where(mask == 1, ids, self.pad_token(cm.processor))
        cm.model.model.rope_deltas = None  # of an earlier call: they are kept on the module
        out = cm.model.generate(
            attention_mask=mask,
            **self._inputs(cm, ids, merged, sizes),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **generate_options(decode),
        )
        cm.model.model.rope_deltas = None
        return [t.strip() for t in tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)]

    def _merged(self, cm, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(Projected tokens [n, G, hidden size], sizes in groups [n, 2]) of pixel values or features."""
        visual = cm.model.model.visual
        images = images.to(cm.device, float_dtype(visual))
        features = images if images.dim() == 3 else self._features(cm, images)
        # All G of them, the empty ones too: a pack's slots are equal blocks of rows then, whatever images they hold.
        groups = features[:, 1:].reshape(-1, visual.merger.ln_q.weight.shape[0])
        sizes = _sizes(images[:, 0] if images.dim() == 4 else images)
        return visual.merger(groups).view(len(features), features.shape[1] - 1, -1), sizes

    def _inputs(self, cm, ids, merged, sizes) -> dict:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        each = [tokens[:n] for tokens, n in zip(merged, sizes.prod(1).tolist())]
        grid = torch.cat([torch.ones_like(sizes[:, :1]), sizes * cm.model.config.vision_config.spatial_merge_size], 1)
        return {
            "input_ids": ids,
            "mm_token_type_ids": (ids == cm.model.config.image_token_id).int(),
            "image_grid_thw": grid,
            "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=each)},
        }


def _class_of(config):
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

    classes = {"qwen2_vl": Qwen2VLForConditionalGeneration, "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration}
    if config.model_type not in classes:
        raise ValueError(f"its model_type is {config.model_type}, expected one of {', '.join(classes)}")
    return classes[config.model_type]


def _sizes(rows: torch.Tensor) -> torch.Tensor:
    """Height and width in groups, int64 [n, 2], of images [n, 1 + ..., D] whose first row begins with them."""
    return rows[:, 0, :2].float().round().long()


def spread_batch(batch, counts: torch.Tensor, image: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask, labels) [B, W] of a collated batch whose one image token a row becomes `counts` [B]."""
    ids, source = _spread(batch["input_ids"], counts, image)
    last = batch["input_ids"].shape[1] - 1
    inside, within = (source >= 0) & (source <= last), source.clamp(0, last)
    labels = torch.where(inside, batch["labels"].gather(1, within), IGNORED)
    return ids, torch.where(inside, batch["attention_mask"].gather(1, within), (source == -1).long()), labels


def _spread(ids: torch.Tensor, counts: torch.Tensor, image: int, *, left: bool = False):
    """Repeat the one `image` token of each row of ids [B, T] `counts` [B] times.

    Returns (ids [B, W], source [B, W]): where in the row each came from, -1 for an image token and T for padding, which
    is on the right, or on the left.
    """
    place = (ids == image).int().argmax(1, keepdim=True)
    length, counts = ids.shape[1], counts[:, None]
    width = length - 1 + int(counts.max())
    at = torch.arange(width, device=ids.device)[None].expand(len(ids), -1)
    if left:
        at = at - (width - (length - 1 + counts))
    source = torch.where(at < place, at, torch.where(at < place + counts, -1, at - counts + 1))
    source = torch.where((at < 0) | (at >= length - 1 + counts), length, source)
    spread = ids.gather(1, source.clamp(0, length - 1))
    return torch.where(source == -1, image, spread), source
