"""The contract of a model family, and a loaded model with what belongs to it.

Shapes: B rows (one text each), n images, T text positions, M positions with a label, N visual tokens, D width,
V vocabulary. Pixels are uint8 as the store holds them; pixel values are what the model takes; features are what its
frozen vision tower makes of them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from raycap.config import DecodeSettings, ModelSettings
from raycap.errors import ConfigError, ModelError, did_you_mean
from raycap.files import sha256_json
from raycap.models.decoding import batch_options

if TYPE_CHECKING:
    from PIL import Image

_LAYER = re.compile(r"\.(?:layers|layer)\.(\d+)\.")
IGNORED = -100
"""Label of a position that is not learnt: prompt and padding."""


@dataclass
class CaptionModel:
    """A base (or a merged model) with its processor, loaded on one device."""

    family: Family
    model: nn.Module
    processor: Any
    path: str
    quantisation: str
    """One of raycap.models.quantise.QUANTISATIONS, as loaded."""
    compute_dtype: torch.dtype
    device: torch.device
    prompt: str
    max_text_tokens: int


class LabelLogits(NamedTuple):
    """Logits [M, V] at the labelled positions alone, their labels [M], and the row [M] each belongs to, ascending.

    With a large vocabulary the logits are most of a step's memory, and prompt, padding and image positions need none.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor


class Family(ABC):
    """One file a family. Full module paths, never bare names: a bare name may match nothing, or too much."""

    name = ""
    task_type: str | None = "CAUSAL_LM"
    """What peft is told the model is for."""
    uses: frozenset[str] = frozenset()
    """Settings of `model.*` beyond the common ones that have an effect on this family."""
    stores_projected = False
    """Whether features are those behind the projector, so that nothing in it may train where they are stored."""
    full_file = ""
    """File beside an adapter for modules that are trained in full; empty: in the adapter itself, as peft keeps them."""
    one_placeholder = False
    """Whether `head` holds one token that stands for the image."""
    prompt_tuning = False
    """Whether plain peft captions with a learnt prompt as raycap does (tested for each family that says so)."""
    packs_vision = True
    """Whether several slots can train an adapter in the tower together."""

    def __init__(self, settings: ModelSettings | None = None):
        self.settings = settings or ModelSettings()

    # --- parts --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def skip_modules(self, config: Any) -> list[str]:
        """Full paths of what is never quantised, the head among them; `config` is the model's own."""

    @abstractmethod
    def scopes(self) -> Mapping[str, tuple[str, ...]]:
        """Scope (`language`, `vision`, `projector`) -> prefixes of the module paths inside it."""

    @abstractmethod
    def tower(self, model: nn.Module) -> nn.Module:
        """The vision tower."""

    def feature_modules(self, model: nn.Module) -> list[nn.Module]:
        """What features depend on."""
        return [self.tower(model)]

    # --- loading ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def load_weights(self, path: str, **options: Any) -> nn.Module:
        """The model through its own class's from_pretrained."""

    def build(self, config: Any) -> nn.Module:
        """The model that `config` describes, as `load_weights` leaves one, without anybody's weights in it."""
        raise ModelError(f"family {self.name} cannot build a model from its configuration alone")

    def read_config(self, path: str, *, trust_remote_code: bool = False) -> Any:
        """The model's configuration: one that raycap knows by its hub id, else what the folder or the hub has."""
        return read_config(path, trust_remote_code=trust_remote_code)

    def blank_images(self, config: Any, count: int) -> torch.Tensor:
        """Pixel values of `count` images without content, as large as the model takes them."""
        size = config.vision_config.image_size
        return torch.zeros(count, 3, size, size)

    def blank_head(self, config: Any, length: int) -> list[int]:
        """Token ids as `head` gives them, of no meaning but the image's."""
        return [config.image_token_id, *[1] * (length - 1)] if self.one_placeholder else [1] * length

    def load_processor(self, path: str, *, trust_remote_code: bool = False) -> Any:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)

    def fingerprint(self, processor: Any) -> str:
        """Hash of what pixels and token ids depend on: the processor's settings and the tokeniser's content."""
        backend = getattr(processor.tokenizer, "backend_tokenizer", None)
        tokeniser = backend.to_str() if backend is not None else processor.tokenizer.get_vocab()
        parts = {"processor": processor.to_dict(), "tokeniser": tokeniser}
        if getattr(processor, "chat_template", None):
            parts["chat_template"] = processor.chat_template
        return sha256_json(parts)

    def image_fingerprint(self, processor: Any) -> str:
        """Hash of what `resize` depends on."""
        return sha256_json({"family": self.name, "image_processor": processor.image_processor.to_dict()})

    def max_positions(self, model: nn.Module) -> int | None:
        """Text positions the model has, or None where they are unlimited."""
        return getattr(model.config.get_text_config(), "max_position_embeddings", None)

    # --- images -------------------------------------------------------------------------------------------------------

    def image_size(self, processor: Any) -> tuple[int, int, int]:
        """(C, H, W) of what `resize` gives."""
        images = processor.image_processor
        size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
        return 3, int(size["height"]), int(size["width"])

    def resize(self, processor: Any, image: Image.Image) -> np.ndarray:
        """uint8 [C, H, W]: what the model's processor makes of an RGB image before it rescales and normalises."""
        made = processor.image_processor(
            image.convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="np"
        )["pixel_values"][0]
        return np.ascontiguousarray(np.clip(np.round(made), 0, 255).astype(np.uint8))

    def pixel_values(self, processor: Any, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [n, C, H, W] -> what the processor would hand the model, float32, by image along the first axis."""
        off = {name: False for name in ("do_resize", "do_center_crop") if hasattr(processor.image_processor, name)}
        return processor.image_processor(pixels, **off, return_tensors="pt")["pixel_values"]

    def encode_images(self, cm: CaptionModel, pixel_values: torch.Tensor) -> torch.Tensor:
        """The tower's features [n, N, D], in its own dtype, without gradients or dropout."""
        tower = self.tower(cm.model)
        with evaluating(tower):
            return tower(pixel_values.to(cm.device, float_dtype(tower))).last_hidden_state

    # --- text ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def head(self, processor: Any, prompt: str) -> list[int]:
        """Token ids that stand before every caption: start token and prompt. None of them is learnt."""

    def end_token(self, processor: Any) -> int:
        """Ends every caption, and is learnt."""
        return processor.tokenizer.eos_token_id

    def bodies(self, processor: Any, captions: Sequence[str], prompt: str) -> list[list[int]]:
        """Token ids of the captions themselves."""
        return processor.tokenizer(list(captions), add_special_tokens=False)["input_ids"]

    def encode(self, processor: Any, caption: str, prompt: str, max_tokens: int) -> tuple[list[int], int, bool]:
        """`encode_all` of one caption."""
        return self.encode_all(processor, [caption], prompt, max_tokens)[0]

    def encode_all(
        self, processor: Any, captions: Sequence[str], prompt: str, max_tokens: int
    ) -> list[tuple[list[int], int, bool]]:
        """Of each: (token ids from the first to the end token, how many lead without a label, whether it was cut).

        The end token is always there, and learnt. Raises ConfigError where `max_tokens` leaves no room for a caption.
        """
        head, end = self.head(processor, prompt), self.end_token(processor)
        room = max_tokens - len(head) - 1
        if room < 1:
            raise ConfigError(
                f"data.max_text_tokens={max_tokens} leaves no room for a caption: the prompt and the start and end "
                f"tokens are {len(head) + 1} tokens"
            )
        bodies = self.bodies(processor, captions, prompt)
        return [([*head, *body[:room], end], len(head), len(body) > room) for body in bodies]

    def unknown_token(self, processor: Any) -> int | None:
        return getattr(processor.tokenizer, "unk_token_id", None)

    def pad_token(self, processor: Any) -> int:
        """What fills a row up; masked, so that any token does where the tokeniser has none for it."""
        pad = processor.tokenizer.pad_token_id
        return 0 if pad is None else pad

    def collate(self, ids: Sequence[Sequence[int]], prompt_lens: Sequence[int], pad: int) -> dict[str, torch.Tensor]:
        """Rows padded on the right: input_ids, attention_mask and labels, int64 [B, T]."""
        lengths = np.array([len(row) for row in ids])
        width = int(lengths.max())
        input_ids = np.full((len(ids), width), pad, dtype=np.int64)
        for row, tokens in enumerate(ids):
            input_ids[row, : len(tokens)] = tokens
        place = np.arange(width)[None]
        mask = place < lengths[:, None]
        labels = np.where(mask & (place >= np.asarray(prompt_lens)[:, None]), input_ids, IGNORED)
        arrays = {"input_ids": input_ids, "attention_mask": mask.astype(np.int64), "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    # --- adapters -----------------------------------------------------------------------------------------------------

    def linear_paths(self, model: nn.Module, scope: str) -> list[str]:
        """Full paths of the linear modules inside `scope`, in the model's order."""
        prefixes = sum((self.scopes()[part] for part in self.parts_of(scope)), ())
        return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(prefixes)]

    def parts_of(self, scope: str) -> list[str]:
        """The parts that `scope` names: one, several joined by +, or all of them."""
        scopes = self.scopes()
        parts = list(scopes) if scope == "all" else scope.split("+")
        for part in parts:
            if part not in scopes:
                raise ConfigError(
                    f"lora.scope={scope!r}: '{part}' is no part of family {self.name}; {did_you_mean(part, scopes)}"
                )
        return parts

    def lora_targets(self, model: nn.Module, scope: str, names: Sequence[str]) -> list[str]:
        """Full paths of the linear modules inside `scope` that `names` mean: whole paths or their ends, as in peft.

        Raises:
            ConfigError: a name matches nothing there; the message has the nearest one that would.
        """
        return self.match_targets(self.linear_paths(model, scope), scope, names)

    def match_targets(self, paths: Sequence[str], scope: str, names: Sequence[str]) -> list[str]:
        """`lora_targets` among `paths`, for a model whose modules have been wrapped since they were listed."""
        chosen: set[str] = set()
        for name in names:
            found = {p for p in paths if p == name or p.endswith(f".{name}")}
            if not found:
                leaves = sorted({p.rsplit(".", 1)[-1] for p in paths})
                raise ConfigError(
                    f"lora.targets: '{name}' matches no linear module in scope '{scope}' of family {self.name}; "
                    f"{did_you_mean(name, leaves)}"
                )
            chosen |= found
        return [p for p in paths if p in chosen]

    def in_layers(self, paths: Sequence[str], layers: str, every: Sequence[str]) -> list[str]:
        """Those of `paths` in the language layers that `layers` means (`top6`), and those outside the language part.

        `every` are all linears of the model's scope: they tell how many layers there are.

        Raises:
            ConfigError: the model has not more layers than that, so that the setting would do nothing.
        """
        if not layers:
            return list(paths)
        prefixes = self.scopes()["language"]
        number = {p: int(found[1]) for p in every if p.startswith(prefixes) and (found := _LAYER.search(p))}
        count, top = 1 + max(number.values(), default=-1), int(layers.removeprefix("top"))
        if top >= count:
            raise ConfigError(
                f"lora.layers={layers}: family {self.name} has {count} language layers here: leave it out"
            )
        return [p for p in paths if number.get(p, count) >= count - top]

    # --- running ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def label_logits(self, cm: CaptionModel, batch: Mapping[str, torch.Tensor], images: torch.Tensor) -> LabelLogits:
        """Forward of texts `batch` (as `collate` gives) on `images`: pixel values or features.

        `images` may be fewer than the rows: row i then takes image i modulo their number, so that the slots of a pack,
        each a block of rows, share one copy.
        """

    @abstractmethod
    def generate(self, cm: CaptionModel, images: torch.Tensor, decode: DecodeSettings) -> list[str]:
        """A caption for each of `images` (pixel values or features), decoded after the model's prompt, KV cache on."""


def read_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of the model in `path`: one of raycap.models.known, else a folder's or the hub's.

    Raises:
        ModelError: it is neither here nor can it be fetched.
    """
    from transformers import AutoConfig

    from raycap.models.known import KNOWN

    if path in KNOWN:
        return AutoConfig.for_model(**KNOWN[path])
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"the configuration of {path} cannot be read: {str(error).splitlines()[0]}") from error


def head_at_labels(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> LabelLogits:
    """Apply `head` to those positions of `hidden` [B, T, D] whose next position has a label in `labels` [B, T]."""
    following = labels[:, 1:]
    rows, places = torch.nonzero(following != IGNORED, as_tuple=True)
    picked = hidden.flatten(0, 1).index_select(0, rows * hidden.shape[1] + places)
    return LabelLogits(head(picked), following[rows, places], rows)


def checkpoint_layers(cm: CaptionModel) -> None:
    """Keep the layers' inputs alone and compute the rest again in backward (Chen et al. 2016).

    Raises:
        ConfigError: the model's layers cannot.
    """
    try:
        # The kind that re-enters would want an input with a gradient, and frozen embeddings have none.
        cm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers makes the embeddings ask for a gradient, for the other kind; GIT adds to them in place.
        cm.model.disable_input_require_grads()
    except ValueError as error:
        raise ConfigError(f"train.gradient_checkpointing=true: {type(cm.model).__name__} cannot ({error})") from error


def float_dtype(module: nn.Module) -> torch.dtype:
    """What `module` computes in: the dtype of its first parameter that is not packed into integers."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def tiled(images: torch.Tensor, rows: int) -> torch.Tensor:
    """[n, ...] -> [rows, ...], row i being image i modulo n."""
    return images if len(images) == rows else images.repeat(rows // len(images), *[1] * (images.dim() - 1))


def generate_options(decode: DecodeSettings) -> dict[str, Any]:
    """`decode` as keywords of transformers' generate; only what departs from greedy search is named."""
    options: dict[str, Any] = {
        "max_new_tokens": decode.max_new_tokens, "num_beams": decode.num_beams, "do_sample": False, "use_cache": True,
    }  # fmt: skip
    if decode.num_beams > 1:
        options["length_penalty"] = decode.length_penalty
        if decode.early_stopping:
            options["early_stopping"] = True
    if decode.no_repeat_ngram_size:
        options["no_repeat_ngram_size"] = decode.no_repeat_ngram_size
    return options | batch_options(decode)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for a block; every submodule then has the mode that it had before."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, mode in modes:
            m.training = mode
