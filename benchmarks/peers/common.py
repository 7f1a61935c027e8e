"""What both `transformers.Trainer` peers do alike: data, NF4 base, LoRA, one run, captions, and where its time goes.

Nothing of raycap is used here but the scorer of captions, which is faster than pycocoevalcap's at the same figures, so
that neither side wins by its metric. What was tried for speed, and what was kept, stands in benchmarks/README.md.

Shapes: N images, B rows, T text positions.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Job = dict[str, Any]
"""What `sweep_vs_trainer.py` wrote into job.json: the same for all sides."""
Report = Callable[[int, float, dict[str, str], Any], None]
"""Called at a rung with the step, CIDEr, the validation captions and the PEFT model."""


def read_job(path: str | Path) -> Job:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def prepare_data(job: Job) -> dict[str, Any]:
    """Decode, resize and normalise every image once, tokenise every caption once: plain numpy, shared by all runs.

    Small sets fit into memory whole; decoding them anew in each run, or in DataLoader workers, would be slower.
    """
    import numpy as np
    from datasets import Dataset
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(job["model"])
    tokenizer = processor.tokenizer
    prompt = tokenizer(job["prompt"], add_special_tokens=False)["input_ids"] if job["prompt"] else []
    head = [tokenizer.cls_token_id, *prompt]
    data: dict[str, Any] = {}
    for split in ("train", "val"):
        rows = Dataset.from_parquet(job["files"][split], cache_dir=str(Path(job["work"]) / "arrow"))
        if split == "val":
            rows = rows.select(job["val_rows"])
        pixels = []
        for batch in rows.iter(64):
            images = [image.convert("RGB") for image in batch["image"]]
            pixels.append(processor.image_processor(images, return_tensors="np")["pixel_values"])
        data[f"{split}_pixels"] = np.concatenate(pixels).astype(np.float32)
        captions = rows["captions"]
        if split == "train":
            room = job["max_text_tokens"] - len(head) - 1
            coded = [tokenizer(list(c), add_special_tokens=False)["input_ids"] for c in captions]
            data["train_ids"] = [[[*head, *ids[:room], tokenizer.sep_token_id] for ids in row] for row in coded]
            data["prompt_len"] = len(head)
        else:
            data["references"] = {i: list(c) for i, c in zip(rows["image_id"], captions)}
    return data


class Samples:
    """Item i is sample i % batch of optimiser step i // batch, in the order that all sides share."""

    def __init__(self, data: dict[str, Any], order: Any):
        self.pixels, self.ids, self.prompt_len = data["train_pixels"], data["train_ids"], data["prompt_len"]
        self.order = order.reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row, caption = self.order[i]
        return {"pixels": self.pixels[row], "ids": self.ids[row][caption], "prompt_len": self.prompt_len}


class Collate:
    """Rows to pixel_values [B, 3, H, W], input_ids, attention_mask and labels [B, T], -100 on prompt and padding."""

    def __init__(self, pad: int):
        self.pad = pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import numpy as np
        import torch

        width = max(len(row["ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.pad)
        labels = torch.full((len(rows), width), -100)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for k, row in enumerate(rows):
            size = len(row["ids"])
            ids[k, :size] = torch.tensor(row["ids"])
            labels[k, row["prompt_len"] : size] = ids[k, row["prompt_len"] : size]
            mask[k, :size] = 1
        pixels = torch.from_numpy(np.stack([row["pixels"] for row in rows]))
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "labels": labels}


def load_base(job: Job) -> Any:
    """The NF4 base as bitsandbytes' and peft's guides load it, the tower and the head left in 16 bits as in raycap."""
    import bitsandbytes as bnb
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype="auto",
        device_map={"": job["device"]},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=job["skip_modules"],
        ),
    )
    for module in model.modules():
        packed = isinstance(module, bnb.nn.Linear4bit)
        if packed:
            # On a CPU with AVX512-BF16 the first eval forward would repack the weight, and training break after it.
            module.support_avx512bf16_for_cpu = False
            module.weight.quant_state.dtype = dtype
        # Quantised from the checkpoint's own dtype, as in raycap, and everything else in the one that is computed in.
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not (packed and name == "weight"):
                parameter.data = parameter.data.to(dtype)
    model.requires_grad_(False)
    return model


def add_lora(model: Any, trial: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=trial["r"],
        lora_alpha=trial["alpha"],
        lora_dropout=trial["dropout"],
        target_modules=trial["modules"],
        bias="none",
    )
    return get_peft_model(model, config)


class Captions:
    """Captions of the validation images, and their CIDEr; references are tokenised once a process."""

    def __init__(self, job: Job, data: dict[str, Any]):
        import torch
        from transformers import AutoProcessor

        from raycap.evaluate.cider import CiderScorer

        self.job = job
        self.tokenizer = AutoProcessor.from_pretrained(job["model"]).tokenizer
        self.ids = list(data["references"])
        self.pixels = torch.from_numpy(data["val_pixels"])
        self.scorer = CiderScorer(data["references"])

    def __call__(self, model: Any) -> tuple[float, dict[str, str]]:
        texts = generate(model, self.pixels, self.job, self.tokenizer)
        captions = dict(zip(self.ids, texts))
        return float(self.scorer.score(captions)[0]), captions


def generate(model: Any, pixels: Any, job: Job, tokenizer: Any) -> list[str]:
    """Greedy or beam captions of pixel values [N, 3, H, W], with the KV cache, in batches."""
    import torch

    decode, texts = job["decode"], []
    prompt = tokenizer(job["prompt"], add_special_tokens=False)["input_ids"] if job["prompt"] else []
    head = torch.tensor([[tokenizer.cls_token_id, *prompt]], device=job["device"])
    dtype = getattr(torch, job["dtype"])
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(job["device"].split(":")[0], dtype, enabled=dtype != torch.float32):
        for part in pixels.split(decode["batch"]):
            ids = head.expand(len(part), -1)
            out = model.generate(
                pixel_values=part.to(job["device"]), input_ids=ids, attention_mask=torch.ones_like(ids),
                max_new_tokens=decode["max_new_tokens"], num_beams=decode["num_beams"], do_sample=False, use_cache=True,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.sep_token_id,
            )  # fmt: skip
            texts += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    model.train(training)
    return [text.strip() for text in texts]


class VisionClock:
    """Seconds spent in the vision tower while training; on a GPU by events, so that nothing is synchronised for it."""

    def __init__(self, tower: Any, cuda: bool):
        self.seconds, self.cuda, self.on, self._pairs = 0.0, cuda, True, []
        tower.register_forward_pre_hook(self._start)
        tower.register_forward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        if self.cuda:
            import torch

            self._began = torch.cuda.Event(enable_timing=True)
            self._began.record()
        else:
            self._began = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        if not self.on:
            return
        if self.cuda:
            import torch

            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            self._pairs.append((self._began, ended))
        else:
            self.seconds += time.perf_counter() - self._began

    def total(self) -> float:
        if self._pairs:
            self._pairs[-1][1].synchronize()
        return self.seconds + sum(a.elapsed_time(b) for a, b in self._pairs) / 1e3


def train_one(job: Job, trial: dict[str, Any], data: dict[str, Any], captions: Captions, rungs: list[int],
              report: Report, notes: dict[str, Any]) -> None:  # fmt: skip
    """One Trainer run of one setting; `notes` takes what it cost, also when `report` ends it early."""
    import numpy as np
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

    began = time.perf_counter()
    set_seed(trial["seed"])
    model = add_lora(load_base(job), trial)
    cuda = job["device"].startswith("cuda")
    clock = VisionClock(model.get_base_model().git.image_encoder, cuda)
    order = np.load(job["order"])
    notes.update(load_s=time.perf_counter() - began, eval_s=0.0, steps=0, curve=[])

    class AtRungs(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            notes["steps"] = state.global_step
            if state.global_step in rungs:
                before, clock.on = time.perf_counter(), False
                cider, texts = captions(kwargs["model"])
                clock.on = True
                notes["curve"].append({"step": state.global_step, "cider": cider})
                notes["eval_s"] += time.perf_counter() - before
                report(state.global_step, cider, texts, kwargs["model"])

    workers = job["dataloader_workers"]
    arguments = TrainingArguments(
        output_dir=str(Path(job["work"]) / "trainer" / trial["trial_id"]),
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch"],
        learning_rate=trial["lr"],
        lr_scheduler_type=trial["schedule"],
        warmup_steps=trial["warmup_steps"],
        weight_decay=trial["weight_decay"],
        adam_beta1=trial["beta1"],
        adam_beta2=trial["beta2"],
        max_grad_norm=trial["max_grad_norm"],
        optim="adamw_torch_fused",
        bf16=job["dtype"] == "bfloat16",
        fp16=job["dtype"] == "float16",
        seed=trial["seed"],
        train_sampling_strategy="sequential",
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=max(1, job["steps"] // 10),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not cuda,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Samples(data, order[: job["steps"]]),
        data_collator=Collate(captions.tokenizer.pad_token_id),
        callbacks=[AtRungs()],
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    try:
        trainer.train()
    finally:
        if cuda:
            torch.cuda.synchronize()
        notes["train_s"] = time.perf_counter() - started - notes["eval_s"]
        notes["vision_s"] = clock.total()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        notes["loss"] = losses[-1] if losses else None


def save_best(folder: Path, model: Any, captions: dict[str, str]) -> Path:
    """The adapter in PEFT's layout, with the captions it made."""
    model.save_pretrained(folder)
    (folder / "val_captions.json").write_text(json.dumps(captions), encoding="utf-8")
    return folder


@contextmanager
def noting(job: Job, trial: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A record of one run, appended to trials.jsonl whatever ends it."""
    notes: dict[str, Any] = {"trial_id": trial["trial_id"], "pid": os.getpid(), "began": time.time()}
    try:
        yield notes
    finally:
        notes["ended"] = time.time()
        with open(Path(job["work"]) / "trials.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(notes) + "\n")
