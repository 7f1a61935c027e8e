"""Builds tiny models in the hub's file layout: the byte-level tokeniser, the processor, the untrained GIT."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GitForCausalLM, GitProcessor, PreTrainedTokenizerFast

PAD, BOS, EOS = "[PAD]", "[CLS]", "[SEP]"
"""Ids 0, 1, 2; the names are those of GIT's own tokeniser."""
IMAGE_SIZE = 64
MAX_TEXT_POSITIONS = 128


def common_words() -> list[str]:
    """Words that captions in English often use, most general first."""
    text = (resources.files("raycap.models.tiny") / "words.txt").read_text(encoding="utf-8")
    return list(dict.fromkeys(text.split()))


def build_tokenizer(captions: Iterable[str], vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE over lower-cased text, so that no text has an unknown token.

    The words of `captions` become whole tokens; how often they occur does not matter. Every word carries its leading
    space (`a` and ` a` are one token), which the decoder takes off the front again.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(content=" ", left=1, right=0)])
    words = common_words()
    # Zipf's law stands in for a corpus: the n-th word is seen 20,000 / n times, so frequent words merge first.
    corpus = [w for n, w in enumerate(words, start=1) for _ in range(max(20, math.ceil(20_000 / n)))]
    corpus += sorted({w for caption in captions for w in caption.split()}) * 500
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, BOS, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(t, tokenizer.token_to_id(t)) for t in (BOS, EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, cls_token=BOS, sep_token=EOS,
        model_max_length=MAX_TEXT_POSITIONS, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def build_processor(tokenizer: PreTrainedTokenizerFast) -> GitProcessor:
    """CLIP's preprocessing at 64 pixels beside the tokeniser."""
    from transformers import CLIPImageProcessor, GitProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return GitProcessor(images, tokenizer)


def build_git(tokenizer: PreTrainedTokenizerFast, *, width: int = 128, layers: int = 4, vision_layers: int = 4,
              dropout: float = 0.0) -> GitForCausalLM:  # fmt: skip
    """A GIT with weights from torch's generator: 64 px in 16 patches, heads of 32."""
    from transformers import GenerationConfig, GitConfig, GitForCausalLM

    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
               "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    config = GitConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        intermediate_size=4 * width, max_position_embeddings=MAX_TEXT_POSITIONS, tie_word_embeddings=False,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **special,
        vision_config={
            "hidden_size": width, "num_hidden_layers": vision_layers, "num_attention_heads": width // 32,
            "intermediate_size": 4 * width, "image_size": IMAGE_SIZE, "patch_size": 16, "projection_dim": width,
        },
    )  # fmt: skip
    model = GitForCausalLM(config)
    model.generation_config = GenerationConfig(max_new_tokens=32, **special)
    return model


def save(folder: Path, model: GitForCausalLM, processor: GitProcessor) -> None:
    """Write model and processor into `folder` in the hub's layout, weights as float16; `model` is left as it was."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in Path(folder).iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone, and packages keep the mode
