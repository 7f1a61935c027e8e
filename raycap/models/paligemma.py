"""PaliGemma 1 and 2 (Beyer et al. 2024): SigLIP's features, projected, before a Gemma that sees its whole prefix.

Image and prompt see each other, the caption sees them and what of it came before. Shapes as in base.py.
"""

from __future__ import annotations

import torch

from raycap.models.base import IGNORED, Family, LabelLogits, float_dtype, generate_options, head_at_labels, tiled


class PaliGemma(Family):
    name = "paligemma"

    # --- parts --------------------------------------------------------------------------------------------------------

    def skip_modules(self, config):
        return ["lm_head", "model.vision_tower", "model.multi_modal_projector"]

    def scopes(self):
        return {
            "language": ("model.language_model.layers.",),
            "vision": ("model.vision_tower.",),
            "projector": ("model.multi_modal_projector.",),
        }

    def tower(self, model):
        return model.model.vision_tower

    def load_weights(self, path, **options):
        from transformers import PaliGemmaForConditionalGeneration

        return PaliGemmaForConditionalGeneration.from_pretrained(path, **options)

    def build(self, config):
        from transformers import PaliGemmaForConditionalGeneration

        return PaliGemmaForConditionalGeneration(config)

    # --- text ---------------------------------------------------------------------------------------------------------

    def head(self, processor, prompt):
        # As the processor writes it; the image's placeholders before it are put there at the last moment.
        tokenizer = processor.tokenizer
        return [tokenizer.bos_token_id, *tokenizer(f"{prompt}\n", add_special_tokens=False)["input_ids"]]

    # --- running ------------------------------------------------------------------------------------------------------

    def label_logits(self, cm, batch, images) -> LabelLogits:
        ids, labels = batch["input_ids"], batch["labels"]
        projected = self._projected(cm, images)
        places = ids.new_full((len(ids), projected.shape[1]), cm.model.config.image_token_id)
        # 0: the prefix, in which everything sees everything; without these the model is causal throughout, silently.
        suffix = (labels != IGNORED).cumsum(1).clamp(max=1)
        hidden = cm.model.model(
            input_ids=torch.cat([places, ids], 1),
            attention_mask=torch.cat([torch.ones_like(places), batch["attention_mask"]], 1),
            token_type_ids=torch.cat([torch.zeros_like(places), suffix], 1),
            mm_encoder_outputs=_ready(tiled(projected, len(ids))),
            use_cache=False,
        ).last_hidden_state
        return head_at_labels(self._logits(cm), hidden[:, places.shape[1] :], labels)

    @torch.no_grad()
    def generate(self, cm, images, decode):
        tokenizer = cm.processor.tokenizer
        projected = self._projected(cm, images)
        head = [cm.model.config.image_token_id] * projected.shape[1] + self.head(cm.processor, cm.prompt)
        ids = torch.tensor([head] * len(projected), device=cm.device)
        out = cm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.zeros_like(ids),
            mm_encoder_outputs=_ready(projected),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **generate_options(decode),
        )
        return [t.strip() for t in tokenizer.batch_decode(out[:, len(head) :], skip_special_tokens=True)]

    def _projected(self, cm, images: torch.Tensor) -> torch.Tensor:
        """[n, N, hidden size] of pixel values [n, 3, H, W] or of the tower's features [n, N, D]."""
        tower = cm.model.model.vision_tower
        images = images.to(cm.device, float_dtype(tower))
        features = images if images.dim() == 3 else tower(images).last_hidden_state
        return cm.model.model.multi_modal_projector(features)

    def _logits(self, cm):
        """The head with PaliGemma 2's soft cap, at the labelled positions alone: its vocabulary is 257,000."""
        cap = getattr(cm.model.config.get_text_config(), "final_logit_softcapping", None)
        if cap is None:
            return cm.model.lm_head
        return lambda hidden: torch.tanh(cm.model.lm_head(hidden) / cap) * cap


def _ready(projected: torch.Tensor) -> dict:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return {"image": BaseModelOutputWithPooling(pooler_output=projected)}
