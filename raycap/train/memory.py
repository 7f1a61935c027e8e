"""How much memory of a GPU training and serving will take: told from the model's configuration, without its weights.

A step, the tower, a rung's validation and serving are each run on shapes alone (raycap.models.rehearsal) by the code that
runs them for real, so that what is predicted is what is done. Shapes: K slots, P parameters of a slot.

What is not in it: CUDA's own context (some hundred MB, which torch.cuda.max_memory_allocated does not count either).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raycap.checks import trains_alone
from raycap.config import Config
from raycap.errors import ConfigError, RaycapError
from raycap.models import load_family, resolve_path
from raycap.models.base import IGNORED, CaptionModel, evaluating
from raycap.models.known import KNOWN
from raycap.models.quantise import packed_bytes, packed_paths
from raycap.models.rehearsal import PackedLinear, Rehearsal, hollow
from raycap.train.engine import PackEngine
from raycap.train.features import TOWER_BATCH
from raycap.train.loss import slot_losses
from raycap.trial import TrialSpec, trial_spec

WORKSPACE_BYTES = 8_519_680
"""What cuBLAS takes through torch's allocator at its first product; 32 MiB on Hopper."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Bytes of a pack. What is there all the time, then what each kind of work takes on top of it at its worst."""

    slots: int
    weights: int
    """The base, quantised where it is."""
    adapters: int
    """Values, gradients, AdamW's moments and copies in the compute dtype of all slots, and their best values so far."""
    activations: int
    """Kept by a step's forward for its backward; part of `step`."""
    logits: int
    """Of a step; part of `step`."""
    step: int
    tower: int
    """Features of images by a frozen tower, before they are stored; 0 where the tower is not run alone."""
    validation: int
    """Validation loss, and decoding with its KV cache."""

    @property
    def total(self) -> int:
        return self.weights + self.adapters + WORKSPACE_BYTES + max(self.step, self.tower, self.validation)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Bytes of a replica."""

    variant: str
    rows: int
    weights: int
    checkpoint: int
    """The weights on disk."""
    decoding: int

    @property
    def total(self) -> int:
        return self.weights + WORKSPACE_BYTES + self.decoding


class Predictor:
    """Predictions for one base under `config`. benchmarks/gpu_memory.py has one that measures the same on a GPU.

    Raises:
        ModelError: the model's configuration can be had neither here nor from the hub.
    """

    device = torch.device("meta")
    values_on = torch.device("cpu")
    """Where token ids and pixels lie, which have numbers."""
    watch = Rehearsal
    """Makes what counts a block's bytes: `now` and `peak`."""

    def __init__(self, config: Config, *, dtype: torch.dtype | None = None):
        if alone := trains_alone(config):
            raise ConfigError(f"the memory that {alone} takes is not predicted")
        self.config = config
        self.family = load_family(config.model.family, config.model)
        path = config.model.path
        self.known = path in KNOWN
        place = path if self.known else resolve_path(path)
        self.dtype = dtype or (torch.float32 if config.model.compute_dtype == "fp32" else torch.bfloat16)
        self._engine: PackEngine | None = None
        self._validations: dict[int, int] = {}
        """Peaks by slots, without the copy of the adapters; a rank more or less changes little of them."""
        self.described = self.family.read_config(place, trust_remote_code=config.model.trust_remote_code)

    # --- the base -----------------------------------------------------------------------------------------------------

    def base(self, quantisation: str) -> CaptionModel:
        """The model without its numbers, and a stand-in for its processor."""
        made_in = None if quantisation == "none" else _dtype(self.described)
        model = hollow(lambda: self.family.build(self.described), self.dtype, made_in)
        for path in packed_paths(model, self.family, self.described, quantisation):
            linear = model.get_submodule(path)
            linear.__class__ = PackedLinear
            linear.weight.quant_state = None  # what a packed weight is known by
            if self.config.model.materialise:
                linear.dense = linear.weight.detach()
        # An instance of its own: its `head` is replaced by one of whatever length.
        family = load_family(self.config.model.family, self.config.model)
        return CaptionModel(
            family=family, model=model, processor=BlankProcessor(), path=self.config.model.path, quantisation=quantisation,
            compute_dtype=self.dtype, device=self.device, prompt="",
            max_text_tokens=self.config.data.max_text_tokens,
        )  # fmt: skip

    def weights(self, cm: CaptionModel, *, stored: bool = False) -> int:
        """Bytes of parameters and buffers, tied ones once; `stored`: as save_pretrained writes them, without buffers."""
        double = self.config.model.double_quantisation
        materialised = self.config.model.materialise and not stored
        total, seen = 0, set()
        for module in cm.model.modules():
            packed = isinstance(module, PackedLinear)
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                plain = parameter.numel() * parameter.element_size()
                if packed and name == "weight":
                    sizes = packed_bytes(*parameter.shape, cm.quantisation, double=double)
                    total += sum(sizes) + (plain if materialised else 0)
                else:
                    total += plain
            if not stored:
                total += sum(b.numel() * b.element_size() for b in module.buffers(recurse=False) if b is not None)
        return total

    # --- training -----------------------------------------------------------------------------------------------------

    def training(self, slots: int, spec: TrialSpec | None = None) -> Training:
        """A pack of that many slots, each a trial like `spec` (else as the settings stand)."""
        spec = spec or trial_spec(self.config, "any")
        if self._engine is None:
            cm = self.base(self.config.model.quantisation)
            self._engine = PackEngine(cm, {}, self.config, self.config.tune.slots)
            if self.device.type == "meta":
                self._engine.keys.mask = _masks(self._engine.keys)  # type: ignore[method-assign]
            cm.device = self.values_on
            self._weights = self.weights(cm)
            self._tower_peak, self._features = self._tower(self._engine)
        engine = self._engine
        adapters = self._stack(engine, spec, slots)
        step, activations, logits = self._step(engine, slots)
        if slots not in self._validations:
            self._validations[slots] = self._validation(engine, slots)
        return Training(
            slots=slots, weights=self._weights, adapters=adapters, activations=activations, logits=logits,
            # AdamW's update needs one tensor of all parameters beside the moments.
            step=max(step, 4 * slots * engine.stacks.width), tower=self._tower_peak,
            validation=self._validations[slots] + _bytes(engine.stacks._work),
        )  # fmt: skip

    def _stack(self, engine: PackEngine, spec: TrialSpec, slots: int) -> int:
        targets = [*engine._targets(spec), *engine.full]
        kind = engine.stacks.dtype
        value = {}
        for path in targets:
            inputs, outputs = engine.shapes[path]
            high, wide = (spec.r, spec.r)
            if path in engine.full:
                high, wide = outputs, int(engine.cm.model.get_submodule(path).bias is not None)
            value[path] = tuple(
                torch.empty(s, dtype=kind, device=self.device) for s in ((high, inputs), (outputs, wide))
            )
        engine.stacks.rebuild([spec] * slots, [{"value": value}] * slots)
        stacks = engine.stacks
        held = [stacks.value, stacks.m, stacks.v, stacks.grads, stacks._work, *stacks._work_grads]
        return sum(_bytes(t) for t in held) + _bytes(stacks.value)

    def _step(self, engine: PackEngine, slots: int) -> tuple[int, int, int]:
        """(Peak, kept for backward, logits) of a micro-batch at the longest text."""
        cm, rows = engine.cm, engine.micro
        cm.model.train()
        with self.watch() as watch:
            images = self._images(engine, rows if engine.frozen_vision else rows * slots)
            text = self._text(cm, rows * slots)
            engine.keys.set([0] * slots, [0] * slots, cm.device, 0, rows)
            output = cm.family.label_logits(cm, text, images)
            logits = _bytes(output.logits)
            activations = watch.now - logits
            gradient, tokens = output.logits.detach(), torch.ones(slots, device=self.values_on)
            slot_losses(gradient, output.labels, output.rows, rows, tokens, gradient=True)
            output.logits.backward(gradient)
            engine.keys.clear()
        return watch.peak, activations, logits

    def _tower(self, engine: PackEngine) -> tuple[int, torch.Tensor | None]:
        """(Peak of TOWER_BATCH images in a tower whose features are stored, features of one image)."""
        if not engine.images.stored:
            return 0, None
        cm, peaks, features = engine.cm, [], None
        for count in (1, 2):  # an image more costs what it costs
            with self.watch() as watch:
                values = cm.family.blank_images(self.described, count)
                features = cm.family.encode_images(cm, values)
            peaks.append(watch.peak)
        made = torch.zeros(1, *features.shape[1:])
        made[:, 0, : min(2, made.shape[-1])] = _first(values)  # where sizes stand in front
        return peaks[0] + (TOWER_BATCH - 1) * (peaks[1] - peaks[0]), made

    def _validation(self, engine: PackEngine, slots: int) -> int:
        cm = engine.cm
        images = max(1, self.config.decode.batch // slots)
        rows = images * slots
        with evaluating(cm.model), engine.stacks.applying(range(slots)):
            with self.watch() as watch:
                values = self._images(engine, images if engine.frozen_vision else rows)
                output = cm.family.label_logits(cm, self._text(cm, rows), values)
                slot_losses(*output, images, torch.ones(slots, device=self.values_on))
                del output, values
            return max(watch.peak, self._decoding(cm, lambda: self._images(engine, rows)))

    def _images(self, engine: PackEngine, count: int) -> torch.Tensor:
        """What the model is given for `count` images: stored features, or pixel values."""
        features = self._features
        if features is None:
            return engine.cm.family.blank_images(self.described, count).to(self.values_on, self.dtype)
        return features.to(self.values_on, self.dtype).repeat(count, *[1] * (features.dim() - 1))

    def _text(self, cm: CaptionModel, rows: int) -> dict[str, torch.Tensor]:
        """The longest texts that settings allow. Without a tokeniser, all but the first token counts as the caption's."""
        length = self.config.data.max_text_tokens
        head = cm.family.blank_head(self.described, 1)
        ids = torch.tensor([[*head, *[1] * (length - len(head))]], device=self.values_on).repeat(rows, 1)
        labels = ids.clone()
        labels[:, : len(head)] = IGNORED
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def _decoding(self, cm: CaptionModel, images: Callable[[], torch.Tensor], *, told: bool = True) -> int:
        """Peak of decoding a batch: two tokens after a text as long as a prompt and a whole caption but one.

        The cache is as large as it gets then; that the text's other positions are computed at once is more than happens.
        Without `told`, a caption of full length is decoded token by token.
        """
        decode = self.config.decode
        before, new = (decode.max_new_tokens, 2) if told else (2, decode.max_new_tokens)
        config = self.described
        cm.family.head = lambda processor, prompt: cm.family.blank_head(config, before)  # type: ignore[method-assign]
        plain = dataclasses.replace(
            decode, max_new_tokens=new, do_sample=False, bad_words=(), temperature=1.0, top_k=0, top_p=1.0, seed=0,
            no_repeat_ngram_size=0,
        )  # fmt: skip
        with self.watch() as watch:
            cm.family.generate(cm, images(), plain)
        return watch.peak

    # --- serving ------------------------------------------------------------------------------------------------------

    def serving(self, variant: str | None = None) -> Serving:
        """A replica with the merged model (16 bit) or its NF4 twin."""
        config = self.config
        variant = variant or config.export.promote
        cm = self.base("nf4" if variant == "merged-nf4" else "none")
        cm.device = self.values_on
        rows = min(config.serve.max_batch, config.decode.batch)
        with evaluating(cm.model):
            images = lambda: cm.family.blank_images(self.described, rows).to(self.values_on, self.dtype)  # noqa: E731
            decoding = self._decoding(cm, images)
        return Serving(variant=variant, rows=rows, weights=self.weights(cm),
                       checkpoint=self.weights(cm, stored=True), decoding=decoding)  # fmt: skip


def _dtype(described: Any) -> torch.dtype:
    """Of the checkpoint, from its configuration."""
    named = getattr(described, "dtype", None)
    named = getattr(torch, named, None) if isinstance(named, str) else named
    return named or torch.bfloat16


def _first(values: torch.Tensor) -> torch.Tensor | float:
    """What stands in front of an image's values where images say how large they are."""
    return values[0, 0, 0, :2] if values.shape[1] == 1 else 0.0


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _masks(keys: Any) -> Any:
    """Dropout's masks without their numbers, which take longest to draw."""

    def mask(name: str, shape: torch.Size, limits: torch.Tensor) -> torch.Tensor:
        lines = math.prod(shape[:-1]) // keys.slots
        hashes = torch.empty(len(limits), lines, -(-shape[-1] // 2), dtype=torch.int32)
        return torch.empty_like(hashes, dtype=torch.int16).new_empty(len(limits), lines, shape[-1])

    return mask


def common(specs: Sequence[TrialSpec]) -> TrialSpec:
    """A trial as large as a slot of a pack of these becomes: the highest rank, every target and layer, dropout if any.

    They share a scope.
    """
    layers = sorted({s.layers for s in specs}, key=lambda name: int(name.removeprefix("top") or 10**6))
    targets = dict.fromkeys(t for s in specs for t in s.targets)
    return dataclasses.replace(
        specs[0], r=max(s.r for s in specs), dropout=max(s.dropout for s in specs), layers=layers[-1],
        targets=tuple(targets),
    )  # fmt: skip


def stand_alone(config: Config, specs: Sequence[TrialSpec]) -> dict[str, int]:
    """Trial id -> bytes of a GPU that training it takes alone, a pack of one."""
    predictors: dict[Any, Predictor] = {}
    known: dict[Any, int] = {}
    found = {}
    for spec in specs:
        parts = (spec.scope, spec.full)
        if parts not in predictors:
            predictors[parts] = Predictor(_only(config, spec))
        size = (*parts, spec.r, spec.dropout > 0, spec.layers, spec.targets)
        if size not in known:
            known[size] = predictors[parts].training(1, spec).total
        found[spec.trial_id] = known[size]
    return found


def _only(config: Config, spec: TrialSpec) -> Config:
    """`config` for trials in this one's parts of the model alone."""
    space = {k: v for k, v in config.tune.space.items() if k not in ("lora.scope", "lora.full")}
    return dataclasses.replace(
        config,
        lora=dataclasses.replace(config.lora, scope=spec.scope, full=spec.full, targets=spec.targets),
        tune=dataclasses.replace(config.tune, space=space),
    )


def plan(config: Config, specs: Sequence[TrialSpec]) -> dict[str, Any]:
    """What `--dry-run` tells: `training`, a row for a pack of one and of tune.slots, `serving`, and what it was told by;
    `unknown` with the reason alone, where nothing can be told."""
    try:
        predictor = Predictor(config)
        scopes = [common([s for s in specs if s.scope == scope]) for scope in dict.fromkeys(s.scope for s in specs)]
        packs = [
            max((predictor.training(slots, spec) for spec in scopes), key=lambda told: told.total)
            for slots in sorted({1, config.tune.slots})
        ]
        served = predictor.serving()
    except RaycapError as error:
        return {"unknown": error.message}
    except Exception as error:  # a model of somebody's own may do what cannot be done without its numbers
        return {"unknown": f"{config.model.path} cannot be run on shapes alone ({type(error).__name__}: {error})"}
    return {
        "dtype": str(predictor.dtype).removeprefix("torch."),
        "known": predictor.known,
        "text_tokens": config.data.max_text_tokens,
        "training": [{**dataclasses.asdict(p), "total": p.total} for p in packs],
        "serving": {**dataclasses.asdict(served), "total": served.total},
    }


class BlankProcessor:
    """Stands in for a processor: special tokens alone, none of which is the one that is drawn without numbers (0)."""

    pad_token_id = 3
    bos_token_id = cls_token_id = 1
    eos_token_id = sep_token_id = 2

    @property
    def tokenizer(self) -> BlankProcessor:
        return self

    def batch_decode(self, ids: torch.Tensor, **options: Any) -> list[str]:
        return [""] * len(ids)
