"""Any model of AutoModelForImageTextToText with a chat template and one placeholder an image: LLaVA and its likes.

For models without a file of their own here. Features are those behind the projector. Shapes as in base.py.
"""

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from raycap.errors import ConfigError, ModelError
from raycap.models.base import Family, LabelLogits, evaluating, float_dtype, generate_options, head_at_labels, tiled
from raycap.models.qwen2_vl import spread_batch

TOWERS = ("vision_tower", "vision_model", "visual")
PROJECTORS = ("multi_modal_projector", "connector")


class Generic(Family):
    name = "generic"
    stores_projected = one_placeholder = prompt_tuning = True

    def skip_modules(self, config):
        return ["lm_head", *(f"model.{name}" for name in (*TOWERS, *PROJECTORS))]

    def scopes(self):
        return {
            "language": ("model.language_model.layers.", "model.text_model.layers."),
            "vision": tuple(f"model.{name}." for name in TOWERS),
            "projector": tuple(f"model.{name}." for name in PROJECTORS),
        }

    def tower(self, model):
        return self._part(model, TOWERS)

    def feature_modules(self, model):
        return [self.tower(model), self._part(model, PROJECTORS)]

    def _part(self, model, names):
        for name in names:
            if hasattr(model.model, name):
                return getattr(model.model, name)
        raise ModelError(f"{type(model).__name__} has none of {', '.join(names)}: it needs a family of its own")

    def load_weights(self, path, **options):
        model = AutoModelForImageTextToText.from_pretrained(path, **options)
        if not model._supports_mm_encoder_outputs():
            raise ModelError(f"{type(model).__name__} takes no ready image features: it needs a family of its own")
        if any("expert" in name for name, _ in model.named_modules()):
            raise ModelError(f"{type(model).__name__} is a mixture of experts, which packs do not train")
        return model

    def build(self, config):
        return AutoModelForImageTextToText.from_config(config)

    # --- images -------------------------------------------------------------------------------------------------------

    def image_size(self, processor):
        shapes = {self.resize(processor, Image.new("RGB", size)).shape for size in ((64, 64), (90, 40), (40, 90))}
        if len(shapes) > 1:
            raise ConfigError(
                f"family generic: {type(processor).__name__} makes images of different shapes ({sorted(shapes)}); one "
                "that keeps their aspect needs a family of its own"
            )
        return shapes.pop()

    def resize(self, processor, image):
        made = processor.image_processor(
            image.convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="np"
        )["pixel_values"][0]
        if made.ndim != 3:
            raise ConfigError(
                f"family generic: {type(processor).__name__} cuts an image into {len(made)} tiles; it needs a family of its own"
            )
        return np.ascontiguousarray(np.clip(np.round(made), 0, 255).astype(np.uint8))

    def encode_images(self, cm, pixel_values):
        with evaluating(cm.model):
            return self._features(cm, pixel_values)

    def _features(self, cm, pixel_values: torch.Tensor) -> torch.Tensor:
        pixel_values = pixel_values.to(cm.device, float_dtype(self.tower(cm.model)))
        made = cm.model.model.get_image_features(pixel_values, return_dict=True).pooler_output
        return made if isinstance(made, torch.Tensor) else torch.stack(list(made))

    # --- text ---------------------------------------------------------------------------------------------------------

    def head(self, processor, prompt):
        ids = processor.tokenizer(self._chat(processor, prompt), add_special_tokens=False)["input_ids"]
        image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        if ids.count(image) != 1:
            raise ConfigError(f"family generic: the chat template puts {ids.count(image)} image tokens, expected one")
        return ids

    def bodies(self, processor, captions, prompt):
        # With what the template puts between the question and the answer: often a space.
        begin = self._chat(processor, prompt)
        texts = []
        for caption in captions:
            whole = self._chat(processor, prompt, caption)
            lead = whole[len(begin) :].partition(caption)[0] if caption and whole.startswith(begin) else ""
            texts.append(lead + caption)
        return processor.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _chat(self, processor, prompt: str, answer: str | None = None) -> str:
        if not getattr(processor, "chat_template", None):
            raise ModelError(f"family generic: {type(processor).__name__} has no chat template")
        content = [{"type": "image"}, *([{"type": "text", "text": prompt}] if prompt else [])]
        chat = [{"role": "user", "content": content}]
        if answer is not None:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return processor.apply_chat_template(chat, add_generation_prompt=answer is None, tokenize=False)

    # --- running ------------------------------------------------------------------------------------------------------

    def label_logits(self, cm, batch, images) -> LabelLogits:
        features = tiled(self._ready(cm, images), len(batch["input_ids"]))
        ids, mask, labels = _spread(cm, batch, features)
        hidden = cm.model.model(
            input_ids=ids, attention_mask=mask, mm_encoder_outputs=_outputs(features), use_cache=False
        ).last_hidden_state
        return head_at_labels(cm.model.lm_head, hidden, labels)

    @torch.no_grad()
    def generate(self, cm, images, decode):
        tokenizer, features = cm.processor.tokenizer, self._ready(cm, images)
        head = torch.tensor([self.head(cm.processor, cm.prompt)] * len(features), device=cm.device)
        batch = {"input_ids": head, "attention_mask": torch.ones_like(head), "labels": head}
        ids, mask, _ = _spread(cm, batch, features)
        out = cm.model.generate(
            input_ids=ids, attention_mask=mask, mm_encoder_outputs=_outputs(features),
            pad_token_id=self.pad_token(cm.processor), eos_token_id=tokenizer.eos_token_id, **generate_options(decode),
        )  # fmt: skip
        return [t.strip() for t in tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)]

    def _ready(self, cm, images: torch.Tensor) -> torch.Tensor:
        return images.to(cm.device) if images.dim() == 3 else self._features(cm, images)


def _spread(cm, batch, features):
    counts = torch.full((len(features),), features.shape[1], device=cm.device)
    return spread_batch(batch, counts, cm.model.config.image_token_id)


def _outputs(features: torch.Tensor) -> dict:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return {"image": BaseModelOutputWithPooling(pooler_output=list(features))}
