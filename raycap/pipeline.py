"""The main job from end to end: prepare -> sweep -> export -> gate -> serve -> score -> report.

The only place where the rooms meet. Whatever holds a model runs in a Ray worker, so that the driver may sit on a node
without a GPU; between the stages lie files in the run folder.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycap.cluster import connect
from raycap.config import Config
from raycap.errors import GateError, Interrupted, RaycapError, RunError
from raycap.files import read_json, sha256_folder

if TYPE_CHECKING:
    from raycap.data.shards import Shards
    from raycap.report.ledger import Ledger
    from raycap.report.live import Progress

PICTURES = 12
"""Test images shown in the report."""


def sweep(
    config: Config,
    *,
    resume: bool = False,
    plain: bool = False,
    keep_serving: bool = False,
    command: str = "",
) -> Path:
    """Run the main job, or go on with the one in `config.run.dir`; returns the run folder.

    Raises:
        GateError: the winner lost too much when merged or quantised; everything but serving is in the run folder.
        Interrupted: a person stopped it; what is on disk can be resumed.
        RaycapError: what went wrong at a stage. The run folder says so too, in run.json.
    """
    from raycap.report.ledger import Ledger
    from raycap.report.live import Progress
    from raycap.report.provenance import MemoryMeter
    from raycap.tune.space import sample_trials

    sample_trials(config)  # a space that cannot be sampled is told before a folder is made
    command = command or shlex.join(["raycap", *sys.argv[1:]])
    ledger = (
        Ledger.reopen(config.run.dir, config, command=command) if resume else Ledger.create(config, command=command)
    )
    with (
        ledger,
        Progress(f"{config.run.name} · {ledger.folder}", steps=config.train.steps, plain=plain) as progress,
        MemoryMeter() as memory,
    ):
        run = _Run(config, ledger, progress, memory)
        try:
            with _terminable():
                run.work(resume=resume, keep_serving=keep_serving)
        except KeyboardInterrupt:
            stopped = Interrupted("stopped by Ctrl-C")
            run.end("interrupted", stopped)
            raise Interrupted(f"{stopped.message}. {_how_to_resume(ledger.folder)}") from None
        except Interrupted as error:
            run.end("interrupted", error)
            raise Interrupted(f"{error.message} {_how_to_resume(ledger.folder)}") from error
        except RaycapError as error:
            run.end("failed", error)
            raise
    return ledger.folder


class _Run:
    """One main job: the stages in order, and what they hand each other."""

    def __init__(self, config: Config, ledger: Ledger, progress: Progress, memory: Any):
        self.config, self.ledger, self.progress, self.memory = config, ledger, progress, memory
        self.folder = ledger.folder
        self.facts: dict[str, Any] = {}
        """Further keys of run.json."""

    def work(self, *, resume: bool, keep_serving: bool) -> None:
        shards = self._prepare()
        with connect(self.config) as ray:
            found = self._sweep(shards, resume)
            exported = self._export(ray, shards, found)
            if exported["refused"]:
                self._score(shards, exported["captions"], found)
                self._report()
                raise GateError(f"{exported['refused']} The report is {self.folder / 'report.html'}.")
            self._serve(shards, exported["captions"], found, keep_serving)

    def _prepare(self) -> Shards:
        from raycap.data.shards import open_shards, prepare_if_needed

        self.progress.phase("prepare", f"images of '{self.config.data.source}'")
        with self.ledger.phase("prepare"):
            shards = open_shards(prepare_if_needed(self.config, self.progress.count))
        self.facts["data_sha256"] = shards.content_sha256
        self.facts["base_sha256"] = base_sha256(self.config)
        self.facts["data"] = {"folder": str(shards.folder), "counts": dict(shards.counts)}
        self.progress.line("images: " + ", ".join(f"{n:,} {split}" for split, n in shards.counts.items()))
        return shards

    def _sweep(self, shards: Shards, resume: bool) -> Any:
        from raycap.tune.sweep import run_sweep

        self.progress.phase("sweep", f"{self.config.tune.trials} trials, {self.config.tune.slots} slots a pack")
        with self.ledger.phase("sweep"):
            found = run_sweep(self.config, self.folder, shards.folder, resume=resume, on_progress=self.progress.trials)
        self.ledger.write_trials([t.to_dict() for t in found.trials])
        self.facts.update(best_trial=found.best, pids=found.pids, notes=found.notes)
        return found

    def _export(self, ray: Any, shards: Shards, found: Any) -> dict[str, Any]:
        from raycap.export.card import CardFacts
        from raycap.export.stage import export_stage, facts_dict
        from raycap.report.provenance import versions

        trials = {t.trial_id: t for t in found.trials}
        best = trials[found.best]
        worst = _worst(found, self.config.train.select_by)
        card = CardFacts(
            name=self.config.run.name or self.folder.name,
            base=self.config.model.path,
            base_sha256=self.facts["base_sha256"],
            data=self.config.data.source,
            data_sha256=shards.content_sha256,
            lang=self.config.evaluate.lang,
            prompt=self.config.data.prompt,
            trial=best.trial_id,
            adapter={
                "rank": best.rank, "alpha": best.alpha, "lr": best.lr, "dropout": best.dropout,
                "steps": best.best_step, "targets": " ".join(best.targets),
            },
            versions=versions(),
        )  # fmt: skip
        self.progress.phase("export", "merging the winner, quantising it again, scoring each")
        with self.ledger.phase("export"):
            exported = in_worker(
                ray,
                export_stage,
                self.config.to_dict(),
                str(shards.folder),
                str(self.folder.absolute()),
                str(found.adapters[best.trial_id]),
                worst=str(found.adapters[worst]) if worst else None,
                worst_ids=picture_ids(shards),
                facts=facts_dict(card),
                log=self.folder / "logs" / "export.log",
                say=lambda message: self.progress.phase("export", message),
            )
        self.facts["worst_trial"] = worst
        return exported

    def _serve(self, shards: Shards, captions: dict[str, Any], found: Any, keep_serving: bool) -> None:
        from raycap.serve.app import serving

        variant = self.config.export.promote
        self.progress.phase("serve", f"starting Ray Serve with {variant}")
        with ExitStack() as stack:
            with self.ledger.phase("serve"):
                served = stack.enter_context(serving(self.config, self.folder / "best" / variant))
                self.progress.phase("serve", f"captioning the test split through {served.url}")
                captions["test"]["served"] = caption_through(served.url, shards, "test", self.config.serve.max_batch)
            self.facts["served_equals_local"] = self._compare_served(captions["test"], variant)
            self._score(shards, captions, found)
            self._report()
            if keep_serving:
                from raycap.report.runs import load_run
                from raycap.report.summary import text_summary

                self.progress.done(text_summary(load_run(self.folder)))
                _stay(self.progress, served)

    def _compare_served(self, captions: Mapping[str, Mapping[str, str]], variant: str) -> dict[str, Any]:
        """How many served captions differ from those of the same model in a local process, and which."""
        served, local = captions["served"], captions[variant]
        other = [i for i in served if served[i] != local[i]]
        found = {
            "images": len(served),
            "different": len(other),
            "examples": [{"image_id": i, "served": served[i], "local": local[i]} for i in other[:10]],
        }
        if len(other) > 0.01 * len(served):
            raise RunError(
                f"{len(other)} of {len(served)} served captions differ from those of the same model in a local process "
                f"(first: {other[0]}: served {served[other[0]]!r}, local {local[other[0]]!r}). At most 1 % may, and none in "
                "fp32: the served model is not the one that was scored."
            )
        return found

    def _score(self, shards: Shards, captions: dict[str, Any], found: Any) -> None:
        """Write every variant's captions, then score them: the winner alone meets the test split, and once."""
        from raycap.evaluate import score

        self.progress.phase("score", "BLEU, METEOR, ROUGE-L, CIDEr of every variant")
        per_image: dict[str, dict[str, dict[str, float]]] = {}
        with self.ledger.phase("score"):
            constant = shards.constant_caption()
            for split in ("val", "test"):
                references = shards.references(split)
                variants = {"constant": dict.fromkeys(references, constant), **captions[split]}
                variants.pop("worst", None)  # shown beside the winner's, never scored on test
                for variant, predicted in variants.items():
                    self.ledger.write_predictions(split, variant, predicted, references)
                for variant, predicted in variants.items():
                    scores = score(predicted, references, self.config.evaluate.metrics, lang=self.config.evaluate.lang)
                    self.ledger.add_metrics(split, variant, scores)
                    if "cider" in scores:
                        per_image.setdefault(split, {})[variant] = dict(scores["cider"].per_image)
            if "worst" in captions["test"]:
                self.ledger.write_predictions(
                    "test", "worst-trial", captions["test"]["worst"], shards.references("test")
                )
            self.facts["verdicts"] = self._verdicts(shards, per_image, found)
            self.facts["collapse"] = self._collapse(shards, captions["test"])
            self.facts["sentence"] = self.facts["verdicts"].get("sentence", "")

    def _verdicts(self, shards: Shards, per_image: dict[str, Any], found: Any) -> dict[str, Any]:
        """The winner against zero-shot and the constant caption on test, and against the runner-up on validation."""
        import numpy as np

        from raycap.evaluate.cider import CiderScorer
        from raycap.evaluate.significance import paired_bootstrap

        if "test" not in per_image:
            return {}
        test = per_image["test"]
        winner = "served" if "served" in test else "adapter"
        groups = shards.groups("test")
        verdicts: dict[str, Any] = {"metric": "cider", "split": "test", "winner": winner}

        def against(other: str) -> dict[str, Any]:
            ids = list(test[winner])
            verdict = paired_bootstrap(
                np.array([test[other][i] for i in ids]),
                np.array([test[winner][i] for i in ids]),
                groups=[groups[i] for i in ids],
                resamples=self.config.evaluate.resamples,
                seed=self.config.run.seed,
            )
            return _plain_verdict(verdict)

        for other in ("zero-shot", "constant"):
            if other in test:
                verdicts[other] = against(other)
        ranked = _ranked(found, self.config.train.select_by)
        if len(ranked) > 1:
            files = [found.adapters[t] / "val_captions.json" for t in ranked[:2]]
            first, second = (read_json(file) for file in files)
            ids = list(first)
            references = shards.references("val")
            scorer = CiderScorer({i: references[i] for i in ids})
            val_groups = shards.groups("val")
            verdict = paired_bootstrap(
                np.asarray(scorer.score(second)[1]),
                np.asarray(scorer.score(first)[1]),
                groups=[val_groups[i] for i in ids],
                resamples=self.config.evaluate.resamples,
                seed=self.config.run.seed,
            )
            verdicts["runner-up"] = {"trial": ranked[1], "split": "val", **_plain_verdict(verdict)}
        verdicts["sentence"] = _sentence(found.best, verdicts)
        return verdicts

    def _collapse(self, shards: Shards, captions: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
        from raycap.evaluate.collapse import collapse

        references = shards.references("test")
        return {
            variant: collapse(list(predicted.values()), [references[i] for i in predicted])
            for variant, predicted in captions.items()
            if variant != "worst"
        }

    def _report(self) -> None:
        from raycap.report.html import write_report

        self.progress.phase("report", "drawing report.html")
        status = "finished" if "served" in self.ledger.metrics.get("test", {}) else "failed"
        with self.ledger.phase("report"):
            self._finish(status)
            write_report(self.folder)

    def _finish(self, status: str, **more: Any) -> None:
        if (self.folder / "run.json").exists():
            return
        self.memory.sample()
        self.ledger.finish(status, peak_memory_bytes=self.memory.peak_bytes, **{**self.facts, **more})

    def end(self, status: str, error: RaycapError) -> None:
        """Note a run that did not finish, without hiding why behind a second error."""
        try:
            self._finish(status, reason=error.message)
        except RaycapError as second:
            self.progress.line(f"run.json could not be written either: {second.message}")


def train(config: Config, *, resume: bool = False, plain: bool = False, command: str = "") -> Path:
    """One setting, all the way to the served model: a sweep of the one trial that `config` describes."""
    return sweep(config, resume=resume, plain=plain, command=command)


def prepare(config: Config, out: Path, *, plain: bool = False) -> None:
    """Write `config.data.source` as shards into `out`."""
    from raycap.data.shards import prepare as write_shards
    from raycap.report.live import Progress

    with Progress(f"prepare · {out}", plain=plain, phases=("prepare",)) as progress:
        progress.phase("prepare", f"images of '{config.data.source}'")
        write_shards(config, out, progress.count)


def evaluate(
    config: Config, model: Path, *, split: str, out: Path | None = None, plain: bool = False
) -> dict[str, Any]:
    """Caption a split with a model folder through its HTTP endpoint, and score the answers.

    Returns: split, images, metrics {name: {score, signature}}, predictions (the file, where `out` was given).
    """
    from raycap.data.shards import open_shards, prepare_if_needed
    from raycap.evaluate import score
    from raycap.files import write_json, write_jsonl
    from raycap.report.live import Progress
    from raycap.serve.app import serving

    with Progress(f"evaluate · {model}", plain=plain, phases=("prepare", "serve", "score")) as progress:
        progress.phase("prepare", f"images of '{config.data.source}'")
        shards = open_shards(prepare_if_needed(config, progress.count))
        references = shards.references(split)
        progress.phase("serve", f"starting Ray Serve with {model}")
        with connect(config), serving(config, model, port=0) as served:
            progress.phase("serve", f"captioning {len(references):,} images of {split}")
            captions = caption_through(served.url, shards, split, config.serve.max_batch)
        progress.phase("score", ", ".join(config.evaluate.metrics))
        scores = score(captions, references, config.evaluate.metrics, lang=config.evaluate.lang)
    found: dict[str, Any] = {
        "split": split,
        "images": len(captions),
        "metrics": {name: {"score": s.score, "signature": s.signature} for name, s in scores.items()},
    }
    if out is not None:
        rows = [{"image_id": i, "caption": c, "references": references[i]} for i, c in captions.items()]
        found["predictions"] = str(write_jsonl(out / f"{split}.jsonl", rows))
        write_json(out / "metrics.json", found)
    return found


def caption(config: Config, model: Path, pictures: Sequence[Path]) -> list[str]:
    """Captions of picture files, in order, in this process.

    Raises:
        DataError: a file that is no picture, named.
    """
    import io

    from PIL import Image

    from raycap.data.clean import BadImage, check_image
    from raycap.errors import DataError
    from raycap.export.captioner import Captioner

    checked = []
    for picture in pictures:
        found = check_image(picture.read_bytes())
        if isinstance(found, BadImage):
            raise DataError(f"{picture}: {found.error}")
        checked.append(found.data)
    captioner = Captioner.load(config, model)
    return captioner.caption([captioner.prepare(Image.open(io.BytesIO(data)).convert("RGB")) for data in checked])


def serve(config: Config, model: Path, *, plain: bool = False) -> None:
    """Serve a model folder until Ctrl-C or SIGTERM."""
    from raycap.report.live import Progress
    from raycap.serve.app import serving

    with Progress(f"serve · {model}", plain=plain, phases=("serve",)) as progress:
        progress.phase("serve", "starting Ray Serve")
        with _terminable(), connect(config), serving(config, model) as served:
            _stay(progress, served)


def caption_through(url: str, shards: Shards, split: str, batch: int) -> dict[str, str]:
    """Image id -> caption of a whole split, asked of a server in requests of `batch` images."""
    from raycap.serve.client import caption_images

    ids: list[str] = []

    def named() -> Iterator[tuple[str, bytes]]:
        for row in shards.iter_rows(split, ("image_id", "image")):
            ids.append(row["image_id"])
            yield row["image_id"], row["image"]["bytes"]

    answers = caption_images(url, named(), batch=batch)
    return dict(zip(ids, answers, strict=True))


def _stay(progress: Progress, served: Any) -> None:
    progress.done(
        f"serving {served.name} at {served.url} until Ctrl-C. Caption a picture of yours:\n"
        f"  curl -F images=@photo.jpg {served.url}/v1/captions"
    )
    try:
        while True:
            time.sleep(1)
    except (KeyboardInterrupt, Interrupted):
        pass


def in_worker(
    ray: Any,
    work: Callable[..., dict[str, Any]],
    *arguments: Any,
    log: Path,
    say: Callable[[str], None],
    **options: Any,
) -> dict[str, Any]:
    """Run `work` in a Ray worker with all of a node's cores (and a GPU where there is one); what it says reaches `say`.

    Raises what `work` raised where that is an error of ours, and RunError with the end of its traceback otherwise.
    """
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("", encoding="utf-8")
    task = ray.remote(_logged).options(num_cpus=1, num_gpus=gpus, max_retries=1)
    future = task.remote(work, str(log.absolute()), arguments, options)
    last = ""
    while not ray.wait([future], timeout=0.5)[0]:
        lines = log.read_text(encoding="utf-8").splitlines()
        if lines and lines[-1] != last:
            last = lines[-1]
            say(last)
    try:
        return ray.get(future)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RaycapError):
            raise cause from error
        raise RunError(f"{work.__name__} failed: {type(cause).__name__}: {cause}\n{error.traceback_str}") from error


def _logged(work: Callable[..., Any], log: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """In the worker: `work` with a `say` that appends to `log`, and threads for all cores (Ray would give it one)."""

    def say(message: str) -> None:
        with open(log, "a", encoding="utf-8") as file:
            file.write(message + "\n")

    return work(*arguments, **options, threads=os.cpu_count() or 1, say=say)


def picture_ids(shards: Shards) -> list[str]:
    """The test images that a report shows: evenly spread over the split."""
    ids = list(shards.references("test"))
    return ids[:: max(1, len(ids) // PICTURES)][:PICTURES]


def base_sha256(config: Config) -> str:
    """Hash of the base's weights where they lie on this machine; empty for a hub id that is not here."""
    from raycap.models import resolve_path

    path = Path(str(resolve_path(config.model.path)))
    return sha256_folder(path, "*.safetensors") if path.is_dir() else ""


def _ranked(found: Any, select_by: str) -> list[str]:
    scored = [(t.score(select_by), t.trial_id) for t in found.trials if t.trial_id in found.adapters]
    return [trial_id for _, trial_id in sorted(scored, key=lambda s: (-s[0], s[1]))]


def _worst(found: Any, select_by: str) -> str | None:
    ranked = _ranked(found, select_by)
    return ranked[-1] if len(ranked) > 1 else None


def _plain_verdict(verdict: Any) -> dict[str, Any]:
    return {name: getattr(verdict, name) for name in ("difference", "low", "high", "p", "sentence")}


def _sentence(best: str, verdicts: Mapping[str, Any]) -> str:
    """One honest sentence on the winner: this adapter, never this setting, for a setting needs several seeds."""

    def clause(name: str, other: str) -> str:
        found = verdicts[other]
        interval = f"{found['difference']:+.3f} [{found['low']:.3f}, {found['high']:.3f}]"
        if found["low"] > 0:
            return f"beats {name} by CIDEr {interval}"
        if found["high"] < 0:
            return f"is worse than {name}: CIDEr {interval}"
        return f"cannot be told apart from {name} (CIDEr {interval})"

    parts = [clause(name, other) for name, other in (("zero-shot", "zero-shot"), ("the constant caption", "constant"))
             if other in verdicts]  # fmt: skip
    text = f"On test, the adapter of {best} " + " and ".join(parts)
    if "runner-up" in verdicts:
        runner = verdicts["runner-up"]
        text += "; on validation it " + clause(f"the runner-up {runner['trial']}", "runner-up")
    return text + "."


def _how_to_resume(folder: Path) -> str:
    return f"Go on with: raycap sweep --resume {folder}"


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a stage as Ctrl-C does (`ray job stop` sends it)."""
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}.")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
