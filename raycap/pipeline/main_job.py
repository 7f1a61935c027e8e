"""The main job from end to end: prepare -> sweep -> export -> gate -> serve -> score -> report.

The only place where the rooms meet. Whatever holds a model runs in a Ray worker, so that the driver may sit on a node
without a GPU; between the stages lie files in the run folder.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycap.cluster import connect, devices
from raycap.config import Config
from raycap.errors import GateError, Interrupted, RaycapError, RunError
from raycap.files import atomic_folder, sha256_folder, write_jsonl
from raycap.models.tiny import twin_note
from raycap.pipeline.remote import in_worker
from raycap.pipeline.tools import prepare_tools
from raycap.pipeline.verbs import caption_through, pictures, stay
from raycap.pipeline.verdicts import ranked, separation, verdicts
from raycap.settings import prompt_for
from raycap.stop import Stopped, resume_command, stoppable

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
    from raycap.evaluate.metrics import check_metrics
    from raycap.report.ledger import Ledger
    from raycap.report.live import Progress
    from raycap.report.provenance import MemoryMeter
    from raycap.serve.ports import find_port
    from raycap.tune.space import sweep_trials

    # What cannot work is told before a folder is made, and before hours are spent.
    sweep_trials(config)
    check_metrics(config.evaluate.metrics)
    if keep_serving:
        find_port(config.serve.host, config.serve.port)
    command = command or shlex.join(["raycap", *sys.argv[1:]])
    ledger = (
        Ledger.reopen(config.run.dir, config, command=command) if resume else Ledger.create(config, command=command)
    )
    with (
        stoppable(),
        ledger,
        Progress(f"{config.run.name} · {ledger.folder}", steps=config.train.steps, plain=plain) as progress,
        MemoryMeter() as memory,
    ):
        run = _Run(config, ledger, progress, memory)
        if progress.plain:  # the live display has it in its title
            progress.line(f"run folder: {ledger.folder}")
        try:
            run.work(resume=resume, keep_serving=keep_serving)
        except KeyboardInterrupt as error:
            stopped = _interrupted(error, ledger.folder)
            run.end("interrupted", stopped)
            raise stopped from None
        except Interrupted as error:
            run.end("interrupted", error)
            raise
        except RaycapError as error:
            run.end("failed", error)
            raise
        except Exception as error:
            run.end("failed", RunError(f"unexpected {type(error).__name__}: {error}"))
            raise
    return ledger.folder


class _Run:
    """One main job: the stages in order, and what they hand each other."""

    def __init__(self, config: Config, ledger: Ledger, progress: Progress, memory: Any):
        self.config, self.ledger, self.progress, self.memory = config, ledger, progress, memory
        self.folder = ledger.folder
        self.facts: dict[str, Any] = {}
        """Further keys of run.json."""
        self.note = ""
        """What is to be said beside every score of this run."""
        self.together: list[str] = []
        """Trials that cannot be told apart from the best."""

    def work(self, *, resume: bool, keep_serving: bool) -> None:
        shards = self._prepare()
        with connect(self.config, log=self.folder / "logs" / "ray.log") as ray, self._noting():
            self.facts["device"] = devices(ray)
            found = self._sweep(ray, shards, resume)
            self._confirm(shards, found)
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
            tools = prepare_tools(self.config)
            folder = prepare_if_needed(self.config, self.progress.count, tools)
            shards = open_shards(folder).speaking(self.config.evaluate.lang)
        self.facts["data_sha256"] = shards.content_sha256
        self.facts["base_sha256"] = base_sha256(self.config)
        if note := twin_note(self.config.model.path):
            self.note = f"{note} "
            self.progress.line(note)
        self.facts["data"] = {"folder": str(shards.folder), "counts": dict(shards.counts)}
        self.progress.line("images: " + ", ".join(f"{n:,} {split}" for split, n in shards.counts.items()))
        if aside := shards.aside(("val", "test")):
            self.progress.line(f"val and test are scored in {shards.lang} alone; rows left aside: {aside}")
            self.facts["data"]["languages"] = shards.languages
        for lang in shards.languages.get("train", {}):
            prompt_for(self.config.data.prompt, lang)  # a language without a prompt is told before hours are spent
        return shards

    def _memory(self, ray: Any) -> dict[str, str]:
        """Trials that cannot win because of their memory, told before anything is trained."""
        from raycap.tune.memory import over_limit, trial_memory

        if not self.config.tune.memory_limit_bytes:
            return {}
        with self.ledger.phase("sweep"):
            memory = in_worker(
                ray, trial_memory, self.config.to_dict(), log=self.folder / "logs" / "memory.log",
                say=lambda said: self.progress.phase("sweep", said),
            )  # fmt: skip
        self.facts["memory_bytes"] = memory
        ruled_out = over_limit(self.config, memory)
        for trial_id, why in ruled_out.items():
            self.progress.line(f"{trial_id} {why}")
        return ruled_out

    def _sweep(self, ray: Any, shards: Shards, resume: bool) -> Any:
        from raycap.tune.sweep import run_sweep

        ruled_out = self._memory(ray)
        self.progress.phase("sweep", f"{self.config.tune.trials} trials, {self.config.tune.slots} slots a pack")
        with self.ledger.phase("sweep"):
            found = run_sweep(
                self.config, self.folder, shards.folder, resume=resume, on_progress=self.progress.trials,
                ruled_out=ruled_out,
            )  # fmt: skip
            self.together = separation(self.config, shards, found).get("together", [])
        self._write_trials(found)
        self.facts.update(best_trial=found.best, pids=found.pids, notes=found.notes)
        if found.tokens:
            self.facts["data"]["tokens"] = found.tokens
        if found.features:
            self.facts["features"] = found.features
        return found

    def _write_trials(self, found: Any) -> None:
        from raycap.tune.space import sweep_trials

        memory = self.facts.get("memory_bytes", {})
        # With all that a space can vary, not only what trials.csv has a column for: the report shows the effect of each.
        specs = {spec.trial_id: spec.to_dict() for spec in sweep_trials(self.config)}
        rows = [
            {**specs.get(t.trial_id, {}), **t.to_dict(), "not_separable": t.trial_id in self.together,
             "memory_bytes": memory.get(t.trial_id)}
            for t in found.trials
        ]  # fmt: skip
        self.ledger.write_trials(rows)

    def _confirm(self, shards: Shards, found: Any) -> None:
        """Train the best settings again with other seeds, where that is asked for."""
        if not self.config.tune.confirm_seeds:
            return
        from raycap.pipeline.confirm import confirm

        self.progress.phase("sweep", f"the best settings again, with {self.config.tune.confirm_seeds} other seeds")
        with self.ledger.phase("confirm"):
            order = ranked(found, self.config.train.select_by)
            self.facts["settings"] = confirm(
                self.config, self.folder, shards, found, order, lambda said: self.progress.phase("sweep", said)
            )

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
            prompt=prompt_for(self.config.data.prompt, self.config.evaluate.lang),
            trial=best.trial_id,
            adapter={
                "kind": "DoRA" if best.variant == "dora" else "LoRA", "rank": best.rank, "alpha": best.alpha,
                "base in": {"nf4": "NF4", "int8": "8 bits"}.get(self.config.model.quantisation, ""),
                "lr": best.lr, "dropout": best.dropout,
                "steps": best.best_step, "targets": " ".join(best.targets),
            },
            versions=versions(),
        )  # fmt: skip
        self.progress.phase("export", "merging the winner, quantising it again, scoring each")
        keep_adapter(found.adapters[best.trial_id], self.folder / "best" / "adapter")
        with self.ledger.phase("export"):
            exported = in_worker(
                ray,
                export_stage,
                self.config.to_dict(),
                str(shards.folder),
                str(self.folder.absolute()),
                str(found.adapters[best.trial_id]),
                default=self._default(found),
                worst=str(found.adapters[worst]) if worst else None,
                worst_ids=picture_ids(shards),
                facts=facts_dict(card),
                memory="memory_bytes" not in self.facts,
                log=self.folder / "logs" / "export.log",
                say=lambda message: self.progress.phase("export", message),
            )
        self.facts["worst_trial"] = worst
        if exported["memory"]:
            self.facts["memory_bytes"] = exported["memory"]
            self._write_trials(found)
        return exported

    def _serve(self, shards: Shards, captions: dict[str, Any], found: Any, keep_serving: bool) -> None:
        from raycap.serve.app import serving

        variant = self.config.export.promote
        self.progress.phase("serve", f"starting Ray Serve with {variant}")
        with ExitStack() as stack:
            with self.ledger.phase("serve"):
                # Nobody has to find a server that only scores: it takes a free port.
                port = self.config.serve.port if keep_serving else 0
                served = stack.enter_context(serving(self.config, self.folder / "best" / variant, port))
                self.progress.phase("serve", f"captioning the test split through {served.url}")
                captions["test"]["served"] = caption_through(served.url, shards, "test", self.config.serve.max_batch)
            self.facts["served_equals_local"] = self._compare_served(captions["test"], variant)
            self._score(shards, captions, found)
            self._report()
            if keep_serving:
                from raycap.report.runs import load_run
                from raycap.report.summary import text_summary

                self.progress.done(text_summary(load_run(self.folder)))
                stay(self.progress, served)

    def _default(self, found: Any) -> str | None:
        """The adapter of the preset's own settings, unless it is the winner or was never scored."""
        from raycap.tune.space import DEFAULT

        if not self.config.tune.default_trial or found.best == DEFAULT or DEFAULT not in found.adapters:
            return None
        return str(found.adapters[DEFAULT])

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
        from raycap.evaluate.signature import require_same

        self.progress.phase("score", "BLEU, METEOR, ROUGE-L, CIDEr of every variant")
        per_image: dict[str, dict[str, dict[str, float]]] = {}
        scales: dict[tuple[str, str], tuple[str, str]] = {}  # variants of a split stand side by side in one table
        with self.ledger.phase("score"):
            constant = shards.constant_caption()
            for split in ("val", "test"):
                references = shards.references(split)
                images = pictures(self.config, shards, split)
                variants = {"constant": dict.fromkeys(references, constant), **captions[split]}
                variants.pop("worst", None)  # shown beside the winner's, never scored on test
                for variant, predicted in variants.items():
                    self.ledger.write_predictions(split, variant, predicted, references)
                for variant, predicted in variants.items():
                    scores = score(
                        predicted, references, self.config.evaluate.metrics, lang=self.config.evaluate.lang,
                        images=images, clip=self.config.evaluate.clip,
                    )  # fmt: skip
                    self.ledger.add_metrics(split, variant, scores)
                    for name, found_score in scores.items():
                        scale = scales.setdefault((split, name), (variant, found_score.signature))
                        require_same(scale[1], found_score.signature, (scale[0], variant))
                    if "cider" in scores:
                        per_image.setdefault(split, {})[variant] = dict(scores["cider"].per_image)
            self._flag(shards, captions)
            if "worst" in captions["test"]:
                self.ledger.write_predictions(
                    "test", "worst-trial", captions["test"]["worst"], shards.references("test")
                )
            told = verdicts(self.config, shards, per_image, found, self.facts.get("settings"))
            self.facts["verdicts"] = told
            self.facts["collapse"] = self._collapse(shards, captions["test"])
            self.facts["sentence"] = self.note + self.facts["verdicts"].get("sentence", "")

    def _flag(self, shards: Shards, captions: Mapping[str, Mapping[str, Mapping[str, str]]]) -> None:
        """review/<split>.jsonl: captions of the winner that a person should look at."""
        from raycap.evaluate.collapse import flagged

        prompt = prompt_for(self.config.data.prompt, self.config.evaluate.lang)
        for split, variants in captions.items():
            said = variants.get("served") or variants.get("adapter")
            rows = (
                flagged(said, shards.references(split), prompt=prompt, lang=self.config.evaluate.lang) if said else []
            )
            if rows:
                write_jsonl(self.folder / "review" / f"{split}.jsonl", rows)
            self.facts.setdefault("flagged", {})[split] = len(rows)

    def _collapse(self, shards: Shards, captions: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
        from raycap.evaluate.collapse import collapse

        references, lang = shards.references("test"), self.config.evaluate.lang
        prompt = prompt_for(self.config.data.prompt, lang)
        return {
            variant: collapse(list(predicted.values()), [references[i] for i in predicted], prompt=prompt, lang=lang)
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
        from raycap.report.provenance import weights_bytes

        self.memory.sample()
        self.facts["weights_bytes"] = weights_bytes(self.folder, self.config.to_dict())
        self.ledger.finish(status, peak_memory_bytes=self.memory.peak_bytes, **{**self.facts, **more})

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Note an interruption before Ray is taken down, which takes longer than `ray job stop` has patience."""
        try:
            yield
        except KeyboardInterrupt as error:
            self.end("interrupted", _interrupted(error, self.folder))
            raise
        except Interrupted as error:
            self.end("interrupted", error)
            raise

    def end(self, status: str, error: RaycapError) -> None:
        """Note a run that did not finish, without hiding why behind a second error."""
        try:
            self._finish(status, reason=error.message)
        except RaycapError as second:
            self.progress.line(f"run.json could not be written either: {second.message}")


def train(config: Config, *, resume: bool = False, plain: bool = False, command: str = "") -> Path:
    """One setting, all the way to the served model: a sweep of the one trial that `config` describes."""
    return sweep(config, resume=resume, plain=plain, command=command)


def keep_adapter(trial: Path, out: Path) -> None:
    """Copy a trial's PEFT files, and nothing else of it, to where a person looks for the winner."""
    with atomic_folder(out) as folder:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(trial / name, folder / name)


def picture_ids(shards: Shards) -> list[str]:
    """The test images that a report shows: evenly spread over the split."""
    ids = list(shards.references("test"))
    return ids[:: max(1, len(ids) // PICTURES)][:PICTURES]


def base_sha256(config: Config) -> str:
    """Hash of the base's weights where they lie on this machine; empty for a hub id that is not here."""
    from raycap.models import resolve_path

    path = Path(str(resolve_path(config.model.path)))
    return sha256_folder(path, "*.safetensors") if path.is_dir() else ""


def _worst(found: Any, select_by: str) -> str | None:
    order = ranked(found, select_by)
    return order[-1] if len(order) > 1 else None


def _interrupted(error: KeyboardInterrupt, folder: Path) -> Interrupted:
    how = error.name if isinstance(error, Stopped) else "Ctrl-C"
    return Interrupted(f"stopped by {how}; nothing that was done is lost. Go on with: {resume_command(folder)}")
