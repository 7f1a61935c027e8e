"""Prompt tuning (Lester et al. 2021): some vectors before every text are learnt, and nothing else.

They stand for token ids that the vocabulary does not have, which a module around the word embeddings turns into the
vectors; so a family's own code feeds, trains and decodes as ever. Plain peft puts the same vectors before the texts'
embeddings. Shapes: n virtual tokens, D width, B rows, T positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raycap.errors import ConfigError, ModelError
from raycap.files import read_json, write_atomic, write_json
from raycap.trial import TrialSpec

if TYPE_CHECKING:
    from raycap.models.base import CaptionModel, Family

PROMPT = "prompt"
"""What a state calls the vectors, in the place of a module's path."""
KEY = "prompt_embeddings"
"""What peft calls them."""


class SoftPrompt(nn.Module):
    """Word embeddings, with the vectors `soft.weight` [n, D] where a row begins with their ids."""

    def __init__(self, base: nn.Embedding, family: Family, count: int):
        super().__init__()
        self.base_layer, self.family = base, family
        self.soft = nn.Embedding(count, base.embedding_dim, device=base.weight.device)
        self.ids = list(range(base.num_embeddings, base.num_embeddings + count))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        count = len(self.ids)
        if ids.shape[1] <= count or int(ids[0, 0]) < self.ids[0]:  # a step of decoding
            return self.base_layer(ids)
        words = self.base_layer(ids[:, count:])
        return torch.cat([self.soft.weight.to(words.dtype).expand(len(ids), -1, -1), words], dim=1)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def enable_adapters(self, on: bool) -> None:
        """Whether texts begin with the vectors: prompts and batches of this family's texts are then that much longer."""
        family, kind = self.family, type(self.family)
        for name in ("head", "collate"):
            vars(family).pop(name, None)
        if not on:
            return

        def head(processor: Any, prompt: str) -> list[int]:
            return [*self.ids, *kind.head(family, processor, prompt)]

        def collate(ids: Sequence[Sequence[int]], prompt_lens: Sequence[int], pad: int) -> dict[str, torch.Tensor]:
            lens = [len(self.ids) + int(length) for length in prompt_lens]
            return kind.collate(family, [[*self.ids, *row] for row in ids], lens, pad)

        family.head, family.collate = head, collate


def require_prompts(family: Family) -> None:
    """ConfigError unless plain peft can use a prompt that was learnt for a model of this family."""
    if not family.prompt_tuning:
        raise ConfigError(
            f"lora.variant=prompt: peft cannot put a prompt before the texts of family {family.name} (`raycap doctor` lists "
            "the families that it can). Take lora.variant=lora or dora"
        )


def put_prompt(model: nn.Module, family: Family, count: int) -> tuple[str, SoftPrompt]:
    """A prompt of `count` vectors around the model's word embeddings, enabled, and the path that it stands at.

    Raises:
        ConfigError: plain peft could not use what is learnt for models of this family.
    """
    require_prompts(family)
    words = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is words)
    prompt = SoftPrompt(words, family, count).train(words.training)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, prompt)
    prompt.enable_adapters(True)
    return path, prompt


def start_prompt(spec: TrialSpec, words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a trial begins with: `spec.prompt_tokens` rows of the word embeddings [V, D], drawn by its seed alone."""
    digest = hashlib.sha256(f"{spec.seed}\0{PROMPT}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    rows = torch.randint(len(words), (spec.prompt_tokens,), generator=generator)
    return words.detach()[rows.to(words.device)].to(dtype)


def export_prompt(folder: Path | str, vectors: torch.Tensor, base: str, task_type: str | None) -> Path:
    """Write vectors [n, D] as peft's prompt tuning of the model that it finds at `base`."""
    from safetensors.torch import save

    folder = Path(folder)
    tensor = vectors.detach().cpu().contiguous()
    write_atomic(folder / "adapter_model.safetensors", save({KEY: tensor}, metadata={"format": "pt"}))
    settings = {
        "peft_type": "PROMPT_TUNING",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "num_virtual_tokens": len(tensor),
        "token_dim": tensor.shape[1],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
    }
    # Last: a folder without it is unfinished.
    write_json(folder / "adapter_config.json", settings)
    return folder


def is_prompt(folder: Path | str) -> bool:
    """Whether a PEFT folder holds vectors of prompt tuning."""
    file = Path(folder) / "adapter_config.json"
    return file.is_file() and read_json(file).get("peft_type") == "PROMPT_TUNING"


def import_prompt(folder: Path | str) -> torch.Tensor:
    """Vectors [n, D] of a folder of peft's prompt tuning.

    Raises:
        ModelError: there are none.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        kind = read_json(folder / "adapter_config.json").get("peft_type")
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no readable PEFT adapter: {error}") from error
    if kind != "PROMPT_TUNING" or KEY not in tensors:
        raise ModelError(f"{folder} is a {kind} adapter, and lora.variant=prompt goes on from PROMPT_TUNING alone")
    return tensors[KEY]


def apply_prompt(cm: CaptionModel, folder: Path | str) -> None:
    """Let `cm` caption with the vectors in `folder` before its texts.

    Raises:
        ModelError: they are of another width.
        ConfigError: its family cannot.
    """
    vectors = import_prompt(folder)
    width = cm.model.get_input_embeddings().embedding_dim
    if vectors.shape[1] != width:
        raise ModelError(
            f"{folder}: vectors of width {vectors.shape[1]} before embeddings of width {width} ({cm.path})"
        )
    _, prompt = put_prompt(cm.model, cm.family, len(vectors))
    prompt.soft.weight = nn.Parameter(vectors.to(prompt.soft.weight.device), requires_grad=False)
