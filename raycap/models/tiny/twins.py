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
            if parameter.dim() >= 2:
                parameter.normal_(std=0.08)
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
