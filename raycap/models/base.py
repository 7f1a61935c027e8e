"""What every family provides, and a loaded model with what belongs to it.

Shapes: B images, T text positions, N visual tokens, D width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raycap.errors import ConfigError, did_you_mean
from raycap.files import sha256_json

if TYPE_CHECKING:
    pass


@dataclass
class CaptionModel:
    family: Family
    model: nn.Module
    processor: Any
    path: str
    quantisation: str
    compute_dtype: torch.dtype
    device: torch.device
    prompt: str
    max_text_tokens: int


class Family(ABC):
    name = ""

    @abstractmethod
    def load_weights(self, path: str, **options: Any) -> nn.Module: ...

    @abstractmethod
    def skip_modules(self, config: Any) -> list[str]: ...

    @abstractmethod
    def scope_prefixes(self, scope: str) -> tuple[str, ...]: ...

    def load_processor(self, path: str, *, trust_remote_code: bool = False) -> Any:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)

    def fingerprint(self, processor: Any) -> str:
        """Hash of what pixels and token ids depend on: the processor's settings and the tokeniser's content."""
        backend = getattr(processor.tokenizer, "backend_tokenizer", None)
        tokeniser = backend.to_str() if backend is not None else processor.tokenizer.get_vocab()
        return sha256_json({"processor": processor.to_dict(), "tokeniser": tokeniser})

    def lora_targets(self, model: nn.Module, scope: str, names: Sequence[str]) -> list[str]:
        """Full paths of the linear modules inside `scope` whose last name is one of `names`."""
        prefixes = self.scope_prefixes(scope)
        inside = [n for n, m in model.named_modules() if is_linear(m) and n.startswith(prefixes)]
        found: list[str] = []
        for name in names:
            matched = [n for n in inside if n == name or n.endswith("." + name)]
            if not matched:
                leaves = sorted({n.rsplit(".", 1)[-1] for n in inside})
                raise ConfigError(
                    f"lora.targets: '{name}' matches no linear module in scope '{scope}' of family {self.name}; "
                    f"{did_you_mean(name, leaves)}"
                )
            found += matched
        return sorted(set(found))


def targets_among(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """Those of `paths` whose last names are among `names`."""
    return [p for p in paths if any(p == n or p.endswith("." + n) for n in names)]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def head_at_labels(
    head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The head at those positions alone whose next token has a label: with a large vocabulary its logits are most of
    a step's memory, and prompts, padding and images need none.

    hidden [B, T, D], labels [B, T]. Returns logits [M, V], their labels [M], and the row of each [M].
    """
    following = labels[:, 1:]
    rows, places = torch.nonzero(following != -100, as_tuple=True)
    picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows * hidden.shape[1] + places)
    return head(picked), following[rows, places], rows
