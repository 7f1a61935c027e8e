"""The architectures of the presets' models, so that their memory can be told before anything is downloaded.

Keywords of `AutoConfig.for_model`, from the models' own config.json.
"""

from __future__ import annotations

from typing import Any

_CLIP_B32 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
             "image_size": 224, "patch_size": 32}  # fmt: skip
KNOWN: dict[str, dict[str, Any]] = {
    "microsoft/git-base": {"model_type": "git"},
    "Salesforce/blip-image-captioning-large": {
        "model_type": "blip",
        "text_config": {"vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024, "intermediate_size": 3072,
                        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512},
        "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                          "num_attention_heads": 16, "image_size": 384, "patch_size": 16},
    },
    "google/paligemma-3b-pt-224": {
        "model_type": "paligemma",
        "text_config": {"model_type": "gemma", "vocab_size": 257216, "hidden_size": 2048, "intermediate_size": 16384,
                        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
                          "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
                          "projection_dim": 2048, "vision_use_head": False},
        "projection_dim": 2048, "hidden_size": 2048, "image_token_id": 257152,
    },
    "Qwen/Qwen2-VL-2B-Instruct": {
        "model_type": "qwen2_vl", "tie_word_embeddings": True, "image_token_id": 151655, "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "text_config": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                        "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0,
                                            "mrope_section": [16, 24, 24]}},
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4,
                          "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3},
    },
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "openai/clip-vit-base-patch32": {"model_type": "clip_vision_model", **_CLIP_B32},
}  # fmt: skip
"""Hub id -> what its configuration is made of."""
