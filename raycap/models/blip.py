"""BLIP (Li et al. 2022): a decoder that looks at the vision tower's features by cross-attention. Shapes as in base.py."""

from __future__ import annotations

import torch

from raycap.models.base import Family, LabelLogits, float_dtype, generate_options, head_at_labels, tiled


class Blip(Family):
    name = "blip"
    # peft's CAUSAL_LM hands a model `inputs_embeds` and the like, and BLIP passes on to its tower what it does not know.
    task_type = None

    # --- parts --------------------------------------------------------------------------------------------------------

    def skip_modules(self, config):
        # The tower is quantised too: it is two thirds of the model, and the small checkpoint is the point of it.
        return ["text_decoder.cls"]

    def scopes(self):
        # Without a projector: the cross-attention's own key and value take the features as they are.
        return {"language": ("text_decoder.bert.encoder.",), "vision": ("vision_model.",)}

    def tower(self, model):
        return model.vision_model

    def load_weights(self, path, **options):
        from transformers import BlipForConditionalGeneration

        return BlipForConditionalGeneration.from_pretrained(path, **options)

    def build(self, config):
        from transformers import BlipForConditionalGeneration

        return BlipForConditionalGeneration(config)

    # --- text ---------------------------------------------------------------------------------------------------------

    def head(self, processor, prompt):
        # The model replaces the first token by its own start token, which the tokeniser does not know.
        tokenizer = processor.tokenizer
        return [tokenizer.cls_token_id, *(tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else [])]

    def end_token(self, processor):
        return processor.tokenizer.sep_token_id

    # --- running ------------------------------------------------------------------------------------------------------

    def label_logits(self, cm, batch, images) -> LabelLogits:
        ids = batch["input_ids"].clone()
        ids[:, 0] = cm.model.config.text_config.bos_token_id
        hidden = cm.model.text_decoder.bert(
            input_ids=ids,
            attention_mask=batch["attention_mask"],
            encoder_hidden_states=tiled(self._features(cm, images), len(ids)),
            is_decoder=True,
            use_cache=False,
        ).last_hidden_state
        return head_at_labels(cm.model.text_decoder.cls, hidden, batch["labels"])

    @torch.no_grad()
    def generate(self, cm, images, decode):
        # What BlipForConditionalGeneration.generate does with pixels, for features too. All prompts are of one length:
        # it knows no left padding.
        tokenizer, text = cm.processor.tokenizer, cm.model.config.text_config
        features = self._features(cm, images)
        head = self.head(cm.processor, cm.prompt)
        head[0] = text.bos_token_id
        ids = torch.tensor([head] * len(features), device=cm.device)
        out = cm.model.text_decoder.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=features,
            encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long, device=cm.device),
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            **generate_options(decode),
        )
        return [t.strip() for t in tokenizer.batch_decode(out[:, len(head) :], skip_special_tokens=True)]

    def _features(self, cm, images: torch.Tensor) -> torch.Tensor:
        """[n, N, D] of pixel values [n, 3, H, W]; features come back as they are."""
        images = images.to(cm.device, float_dtype(cm.model.vision_model))
        return images if images.dim() == 3 else cm.model.vision_model(pixel_values=images).last_hidden_state
