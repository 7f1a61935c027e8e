"""Builders of the tiny models, one a family: 2 layers, widths of 32 to 64, some hundred tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 600
TEXT_POSITIONS = 256


def byte_tokenizer(captions: Sequence[str], special: Sequence[str], *, single: str = "", **roles: Any) -> Any:
    """Byte-level BPE, so that no text in any language has an unknown token; `special` get the first ids.

    `single` is the template of one text ("[CLS] $A [SEP]"); `roles` are keywords of PreTrainedTokenizerFast.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = sorted({w for caption in captions for w in caption.split()})
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([f" {w}" for w in words] * 3, trainer)
    if single:
        named = [(t, tokenizer.token_to_id(t)) for t in special if t in single]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=TEXT_POSITIONS, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"], **roles,
    )  # fmt: skip


def write(folder: Path, model: Any, processor: Any, *, generation: dict[str, Any] | None = None) -> None:
    """Save both in the hub's layout, in fp16, with weights large enough that every module matters.

    transformers draws them with 0.02 and, in some towers, with 1e-10.
    """
    from transformers import GenerationConfig

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # tables of words weigh less: tied ones would make a model repeat what it hears
                parameter.normal_(std=0.06 if len(parameter) >= VOCABULARY // 2 else 0.16)
        # An untrained head would end its captions, or fill them with placeholders, as soon as with words.
        text = getattr(model, "text_decoder", model)
        for table in {text.get_input_embeddings().weight, text.get_output_embeddings().weight}:
            table[processor.tokenizer.all_special_ids] *= 0.1
    if generation is not None:
        model.generation_config = GenerationConfig(max_new_tokens=16, **generation)
    model.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)


def git(folder: Path, captions: Sequence[str], dropout: float) -> None:
    from raycap.models.tiny.build import build_git, build_processor, build_tokenizer

    tokenizer = build_tokenizer(captions, vocabulary=VOCABULARY)
    model = build_git(tokenizer, width=64, layers=2, vision_layers=1, dropout=dropout)
    write(folder, model, build_processor(tokenizer))


def blip(folder: Path, captions: Sequence[str], dropout: float) -> None:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    tokenizer = byte_tokenizer(
        captions, ["[PAD]", "[CLS]", "[SEP]", "[MASK]"], single="[CLS] $A [SEP]",
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
    # As in the real ones: the decoder's start token lies beyond the tokeniser's vocabulary.
    config = BlipConfig(
        text_config={
            "vocab_size": len(tokenizer) + 2, "hidden_size": 64, "encoder_hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": TEXT_POSITIONS,
            "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout,
            "bos_token_id": len(tokenizer), "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 64, "patch_size": 16,
        },
        projection_dim=64,
    )  # fmt: skip
    images = BlipImageProcessor(size={"height": 64, "width": 64})
    write(folder, BlipForConditionalGeneration(config), BlipProcessor(images, tokenizer))


def paligemma(folder: Path, captions: Sequence[str], dropout: float) -> None:
    _paligemma(folder, captions, dropout, "gemma", {})


def paligemma2(folder: Path, captions: Sequence[str], dropout: float) -> None:
    # Every other layer sees a window only, and logits are capped, as in the real one.
    _paligemma(folder, captions, dropout, "gemma2",
               {"sliding_window": 24, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
                "query_pre_attn_scalar": 16})  # fmt: skip


def _paligemma(folder: Path, captions: Sequence[str], dropout: float, text: str, more: dict[str, Any]) -> None:
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    tokenizer = byte_tokenizer(
        captions, ["<pad>", "<eos>", "<bos>", "<unk>"],
        pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
    )  # fmt: skip
    images = SiglipImageProcessor(size={"height": 64, "width": 64})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer)  # adds the image's, the locations' and the segments' tokens
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
               "bos_token_id": tokenizer.bos_token_id}  # fmt: skip
    config = PaliGemmaConfig(
        text_config={
            "model_type": text, "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
            "max_position_embeddings": TEXT_POSITIONS, "attention_dropout": dropout, **special, **more,
        },
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "vision_use_head": False,
            "projection_dim": 64,
        },
        image_token_id=processor.image_token_id, projection_dim=64, hidden_size=64, **special,
    )  # fmt: skip
    write(folder, PaliGemmaForConditionalGeneration(config), processor, generation=special)


CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2-VL's own chat template, without videos."""


def qwen2_vl(folder: Path, captions: Sequence[str], dropout: float) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    _qwen(folder, captions, dropout, Qwen2VLConfig, Qwen2VLForConditionalGeneration, vision)


def qwen2_5_vl(folder: Path, captions: Sequence[str], dropout: float) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_heads": 2,
              "window_size": 32, "fullatt_block_indexes": [1]}  # fmt: skip
    _qwen(folder, captions, dropout, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision)


def _qwen(folder: Path, captions: Sequence[str], dropout: float, config_class: Any, model_class: Any,
          vision: dict[str, Any]) -> None:  # fmt: skip
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>"]  # fmt: skip
    tokenizer = byte_tokenizer(captions, special, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    number = {token: n for n, token in enumerate(special)}
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    images = Qwen2VLImageProcessor(size={"shortest_edge": 16 * 16 * 4, "longest_edge": 64 * 64}, **sizes)
    processor = Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=CHAT)
    ends = {"pad_token_id": 0, "eos_token_id": number["<|im_end|>"], "bos_token_id": 0}
    config = config_class(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": TEXT_POSITIONS,
            "attention_dropout": dropout, **ends,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={**vision, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3},
        image_token_id=number["<|image_pad|>"], video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"], vision_end_token_id=number["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    write(folder, model_class(config), processor, generation=ends)


def clip_llama(folder: Path, captions: Sequence[str], dropout: float) -> None:
    from torch import nn
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from raycap.models.clip_llama import PROJECTED, GraftProcessor

    # As TinyLlama's: what pads is what ends.
    tokenizer = byte_tokenizer(
        captions, ["<unk>", "<s>", "</s>"], unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16
    )
    special = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=TEXT_POSITIONS,
            attention_dropout=dropout, tie_word_embeddings=False, **special,
        )
    )  # fmt: skip
    model.config.graft = {"vision": vision.to_dict()}
    model.vision_tower = CLIPVisionModel(vision)
    model.projector = nn.Linear(vision.hidden_size, PROJECTED)
    model.gate = nn.Linear(PROJECTED, 64)
    images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    write(folder, model, GraftProcessor(images, tokenizer), generation=special)


def generic(folder: Path, captions: Sequence[str], dropout: float) -> None:
    """A LLaVA: CLIP, two linears, a Llama."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    tokenizer = byte_tokenizer(
        captions, special, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", chat_template=template,
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    ends = {"pad_token_id": 4, "bos_token_id": 1, "eos_token_id": 2}
    config = LlavaConfig(
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": TEXT_POSITIONS, "attention_dropout": dropout, **ends,
        },
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "projection_dim": 32,
        },
        image_token_id=3, vision_feature_select_strategy="default", vision_feature_layer=-2,
    )  # fmt: skip
    write(folder, LlavaForConditionalGeneration(config), processor, generation=ends)
