"""The sections of the tree of settings, each setting with its type, default and meaning; `config.py` reads and checks them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raycap.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """Where a run lives and what makes it repeatable."""

    name: str = ""
    """Name of the run; empty takes the preset's."""
    dir: str = ""
    """The run folder; empty takes results/<name> (numbered when that is taken)."""
    seed: int = 0
    """Seeds the trials, the sample order, the adapters' start, dropout and the bootstrap."""
    cache_dir: str = ""
    """Where prepared shards and vision features are kept between runs; empty takes $RAYCAP_CACHE or ~/.cache/raycap."""
    storage: str = ""
    """A folder that every node reaches: a path mounted on all of them, s3://bucket/folder, gs://bucket/folder. Shards,
    checkpoints and adapters travel through it, and `run.dir` is the driver's own. Empty: one node, or a `run.dir` and
    `run.cache_dir` that all nodes see."""
    store_gb: float = 0.0
    """Disk that decoded images and vision features may take under `cache_dir` on a node; those not used for longest make
    room, and a set that does not fit is read in windows. 0: four fifths of what is free."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """What is captioned."""

    source: str = "shapes"
    """`shapes` (built in), a folder or file in one of the layouts of docs/data.md, a hub data set's id (`owner/name`, with
    `@revision` and `:configuration` where wanted), a folder that `prepare` wrote, or the url of one (s3://, gs://)."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The set's own names for `image`, `captions` (or a list of columns), `split`, `image_id`, `group` and `lang`."""
    images: str = ""
    """Where the images lie when they are not beside the captions."""
    lang: str = ""
    """Language of captions whose source names none; empty: `ja` where they are written in kana, else `en`."""
    report: Literal["auto", "findings", "impression", "both"] = "auto"
    """What of an X-ray report is the caption; auto: both sections of an XML report, whatever annotation.json holds."""
    prompt: str | dict[str, str] = ""
    """Text put before the caption; its labels are masked. Or one for each language: `{en: ..., ja: ...}`."""
    max_text_tokens: int = 48
    """Longest prompt + caption + end, in the model's tokens; longer captions are cut, and counted."""
    captions: Literal["all", "first", "random-per-epoch", "best-clipscore", "weighted-clipscore"] = "all"
    """Which captions of an image are trained on: each as a sample of its own, or one an image: the first, another one
    each epoch, the one with the highest CLIPScore, or one each epoch with a chance proportional to its CLIPScore."""
    clip_model: str = "ViT-B-32/openai"
    """The CLIP that chooses captions: architecture/weights as open_clip lists them, or a folder in its layout."""
    store: Literal["original", "resized", "pixels"] = "original"
    """What the shards hold: the image files as they came, or each image resized once as the model's processor does it,
    as a compressed file (`resized`) or as plain pixels (`pixels`: larger, and read without decoding)."""
    quality: int = 0
    """Of data.store=resized: 0 is lossless (PNG), 1 to 100 the quality of a JPEG."""
    splits: tuple[float, ...] = (0.8, 0.1, 0.1)
    """Shares of train, val, test for images that name no split, drawn by group; or counts, such as 560,70,70."""
    missing_splits: Literal["refuse", "draw"] = "refuse"
    """draw: where a set names its splits and has no test (val), half of val (a share of train) becomes it, by group."""
    train_splits: tuple[str, ...] = ("train",)
    """train,val: a final run of one setting for a fixed number of steps, which has nothing left to choose by."""
    shapes_images: tuple[int, ...] = (1500, 256, 256)
    """Sizes of train, val and test of the built-in shapes set."""
    rows_per_shard: int = 256
    """Images a parquet shard holds."""
    duplicates: Literal["exact", "near", "keep"] = "exact"
    """Copies of a picture that are left out, official val and test aside: of equal pixels, nearly equal too, or none."""
    leaks: Literal["fail", "drop", "allow"] = "fail"
    """What a picture in two splits does: stop `prepare`, leave the row out of the earlier split, or nothing."""
    limit: int = 0
    """Use only the first images of each split (0: all)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """The base that stays frozen."""

    family: str = "git"
    path: str = "builtin:tiny-git"
    """A hub id, a local folder in the hub's layout, or builtin:tiny-git."""
    quantisation: Literal["nf4", "int8", "none"] = "nf4"
    """Of the linears that a family quantises: 4 bits, 8 bits, or none."""
    double_quantisation: bool = False
    """NF4 whose scales are quantised too: 0.37 bits a weight less, and other weights."""
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device computes in it, else fp16 with loss scaling on a GPU and fp32 on a CPU."""
    materialise: bool = False
    """Keep each quantised weight dequantised beside it: bitwise the same, faster, and without the saving of memory."""
    trust_remote_code: bool = False
    """Run code that a model's author keeps beside its weights. Read it first: it runs as you."""
    vision_path: str = ""
    """clip_llama: the CLIP whose [CLS] the language model sees; empty takes openai/clip-vit-base-patch32."""
    vision_cls: Literal["after-norm", "before-norm"] = "after-norm"
    """clip_llama: the [CLS] after the tower's last norm or before it."""
    graft_path: str = ""
    """clip_llama: a folder with the projector and gate to begin with; empty begins with random ones."""
    min_pixels: int = 0
    """qwen2_vl: images are enlarged to this many pixels; 0 takes the processor's own."""
    max_pixels: int = 0
    """qwen2_vl: images are shrunk to this many pixels, 28 x 28 of which become one token; 0 takes the processor's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    r: int = 16
    """Inner dimension of the update; trainable parameters grow linearly with it."""
    alpha: float = 0.0
    """Numerator of the scale alpha / r. Give this or `alpha_per_rank`."""
    alpha_per_rank: float = 0.0
    """The scale itself: alpha follows the rank. 0 with alpha 0 means 2."""
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "key", "value", "dense")
    """Names of the linear modules inside `scope` that get an adapter (suffixes, as in peft)."""
    layers: str = ""
    """Language layers that get adapters: `top6` are the six nearest the head; empty: all."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (rsLoRA)."""
    variant: Literal["lora", "dora", "prompt"] = "lora"
    """dora: each row of an adapted weight has a length of its own, learnt beside its direction. prompt: `prompt_tokens`
    vectors before every text are learnt, and no weight changes. Both train with tune.slots=1."""
    prompt_tokens: int = 20
    """Virtual tokens of lora.variant=prompt."""
    init_from: str = ""
    """A PEFT adapter that every trial begins with, of the same rank, alpha and targets; empty begins anew."""
    scope: str = "language"
    """Part of the model that gets adapters: language, vision, projector; several joined by +; or all."""
    full: tuple[Literal["projector"], ...] = ()
    """Parts whose linears are trained in full instead: each trial has a copy of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    steps: int = 1000
    """Optimiser steps of a full trial; the learning-rate schedule's horizon too."""
    batch: int = 16
    """Samples an optimiser step sees (the effective batch)."""
    accumulation: int = 1
    """Pieces the effective batch is computed in; the loss stays that of one large batch."""
    lr: float = 2e-3
    optimiser: Literal["adamw", "adamw-8bit-paged"] = "adamw"
    """adamw-8bit-paged: bitsandbytes' AdamW with moments in 8 bits, which a GPU may page out; with tune.slots=1."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    """Share of the steps; give this or `warmup_steps`."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    features: Literal["auto", "on", "off"] = "auto"
    """Whether what a frozen vision tower makes of an image is kept on disk: auto keeps it where a measurement at the start
    says that this is faster over the steps and rungs ahead, and `run.store_gb` has room; off computes it at each look."""
    gradient_checkpointing: bool = False
    """Keep less of the forward and compute it again in backward: memory for about a third more time."""
    base_dropout: bool = True
    """Whether the frozen base's own dropout is on while adapters train."""
    select_by: Literal["cider", "val_loss"] = "cider"
    """What prunes trials and picks checkpoints."""
    val_images: int = 128
    """Validation images scored at each rung."""
    checkpoint_every_s: float = 30.0
    max_failures: int = 3
    """Deaths of a worker that are survived."""
    workers: int = 1
    """Workers, each with a GPU where there are any, that share the rows of every step of a pack."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneSettings:
    trials: int = 12
    slots: int = 6
    """Adapters that train together on one base."""
    packs: int = 1
    """Workers, each with one base and `slots` adapters."""
    scheduler: Literal["asha", "none"] = "asha"
    eta: int = 3
    """Of the trials that reach a rung one in eta goes on."""
    grace_steps: int = 0
    """Step of the first rung; 0 takes steps / eta^2."""
    default_trial: bool = False
    """Train the settings as they stand too, as one more trial that is never pruned: the winner is compared with it."""
    prune_collapsed: bool = False
    """Stop a trial whose captions have collapsed at a rung, whatever its score."""
    memory_limit_bytes: int = 0
    """Trials that would take more of a GPU alone, as predicted, are trained but cannot win, and at the rungs they are
    compared among themselves, so that none takes the place of one that can win (0: no limit)."""
    confirm_seeds: int = 0
    """Train the best settings again with so many other seeds, for a verdict on the settings (0: adapters alone)."""
    confirm_top: int = 2
    """How many settings `confirm_seeds` trains again."""
    space: dict[str, Any] = field(default_factory=dict)
    """Setting -> {choice: [...]}, {uniform: [lo, hi]} or {loguniform: [lo, hi]}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSettings:
    max_new_tokens: int = 32
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    """With beams: end once `num_beams` captions are complete."""
    no_repeat_ngram_size: int = 0
    do_sample: bool = False
    """Draw each token. An image's draws follow from `seed` and its pixels alone, whatever it is decoded together with."""
    temperature: float = 1.0
    top_k: int = 0
    """Draw among the most likely tokens only (0: all)."""
    top_p: float = 1.0
    """Draw among the fewest tokens that hold this share of the probability only."""
    seed: int = 0
    bad_words: tuple[str, ...] = ()
    """Words or phrases that no caption may contain, as they are written."""
    batch: int = 64
    """Images decoded together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSettings:
    metrics: tuple[str, ...] = ("bleu", "meteor", "rouge_l", "cider")
    lang: str = "en"
    clip: str = ""
    """CLIP of the metric clipscore: architecture/weights as open_clip names them, or a folder; empty: ViT-B-32/openai."""
    resamples: int = 10000
    """Bootstrap resamples behind an interval."""
    prompts: dict[str, Any] = field(default_factory=dict)
    """Name -> prompt, for `raycap evaluate --grid prompts=...`."""
    decodings: dict[str, Any] = field(default_factory=dict)
    """Name -> settings of `decode`, for `raycap evaluate --grid decode=...`; greedy, beam, sample and beam-sample are there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSettings:
    max_drop: float = 0.05
    """Largest relative loss of CIDEr, adapter to promoted model, that the gate lets pass."""
    promote: Literal["merged", "merged-nf4"] = "merged"
    """The variant that is served."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    replicas: int = 1
    max_batch: int = 16
    batch_wait_s: float = 0.01
    max_queue: int = 64
    """Requests a replica holds at once, waiting or in work; the next one gets 503 and a Retry-After."""
    max_body_bytes: int = 32 * 2**20
    max_image_px: int = 50_000_000
    max_images: int = 64
    """Images one request may carry."""


def prompt_for(prompt: str | Mapping[str, str], lang: str) -> str:
    """The prompt (`data.prompt`) of captions in `lang`.

    Raises:
        ConfigError: the prompts name other languages.
    """
    if isinstance(prompt, str):
        return prompt
    if lang not in prompt:
        named = ", ".join(prompt) or "none"
        raise ConfigError(
            f"data.prompt holds prompts for {named}, and captions are in '{lang}': add `{lang}: ...` to it"
        )
    return prompt[lang]
