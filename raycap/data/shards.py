"""`prepare`: from a source to a folder of parquet shards. Reading them back is `parquet.py`'s, offered here too.

The source is read once and spooled to disk; the images are decoded and checked (checking.py); only then are all groups
known, and copies, leaks and splits can be settled (choosing.py); captions are scored by CLIP, where asked for, and the
shards are written (writing.py). All but the reading is cut into pieces (units.py) that may run on many cores and nodes,
and that a restart does not do again. The same input gives the same bytes: nothing depends on time, place or the order of
a dict; pyarrow's version, on which the bytes of a parquet file depend, is recorded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raycap.config import Config
from raycap.data.checking import check_rows
from raycap.data.choosing import LEAKS, choose_splits, drop_duplicates, groups_of, limited, settle_leaks
from raycap.data.lock import FileLock
from raycap.data.manifest import Manifest, key_of, make_manifest, rejected_line, summary
from raycap.data.order import SCORED
from raycap.data.parquet import MANIFEST, REJECTED, Shards, is_shards_folder, open_shards
from raycap.data.sources import SPLITS, Source, detect, open_source
from raycap.data.units import Progress, Tools
from raycap.data.writing import check_space, clip_scores_of, write_shards
from raycap.errors import ConfigError, DataError, RunError
from raycap.files import read_json, write_json, write_jsonl
from raycap.storage import is_url, without_secret

__all__ = ["Manifest", "Progress", "Shards", "Tools", "is_shards_folder", "open_shards", "prepare", "prepare_if_needed"]

_LOCK = ".lock"
_WORK = ".work"


def prepare(config: Config, out: Path | str, progress: Progress | None = None, tools: Tools | None = None) -> Manifest:
    """Write `config.data.source` as shards into `out`, and return the manifest, which is written last.

    An unfinished folder is gone on with, when it had the same input; a finished one is done anew, once the source could
    be opened. `tools` are what the settings ask for from other rooms (pipeline.prepare_tools gives them).

    Raises:
        ConfigError: a setting needs a tool that is not given.
        DataError: the source cannot be read, nothing of it is left, or a split would have no rows.
        RunError: `out` cannot be written, or holds files that are not shards.
    """
    out = Path(out)
    if is_url(config.data.source) or is_shards_folder(Path(config.data.source).expanduser()):
        raise DataError(f"data.source={without_secret(config.data.source)} is prepared already; use it as it is")
    tools = _checked_tools(config, tools)
    source = open_source(config.data, config.run.seed)
    _check_empty(out)
    with FileLock(out / _LOCK):
        return _prepare(config, source, out, tools, progress)


def _checked_tools(config: Config, tools: Tools | None) -> Tools:
    tools, store = tools or Tools(), config.data.store
    if (store != "original") != (tools.resize is not None):
        raise ConfigError(f"data.store={store} and a model's resizing that was {'not ' * (tools.resize is None)}given")
    if needs_clip_scores(config) and tools.score is None:
        raise ConfigError(f"data.captions={config.data.captions} needs CLIPScores, and no scorer was given")
    return tools


def needs_clip_scores(config: Config) -> bool:
    """Whether training, or a trial of the sweep, chooses captions by CLIPScore."""
    searched = (config.tune.space.get("data.captions") or {}).get("choice") or ()
    return config.data.captions in SCORED or any(choice in SCORED for choice in searched)


def prepare_if_needed(config: Config, progress: Progress | None = None, tools: Tools | None = None) -> Path | str:
    """The shards of `config.data.source`: itself when it is a shards folder (a path, or a url of one that `prepare`
    wrote), else prepared once under the cache.

    The cache's folder is named by settings and content, so that a changed source is prepared again.
    """
    if is_url(config.data.source):
        _check_prepared(config, found := open_shards(config.data.source))
        return found.folder
    given = Path(config.data.source).expanduser()
    if is_shards_folder(given) or (given / REJECTED).is_file():  # rejected.jsonl alone: `prepare` did not finish
        _check_prepared(config, open_shards(given))
        return given
    tools = _checked_tools(config, tools)
    source = open_source(config.data, config.run.seed)
    key = key_of(config, source, tools)[:16]
    folder = config.cache_dir / "data" / f"{detect(config.data.source)}-{key}"
    if not _opens(folder):
        with FileLock(folder / _LOCK):
            if not _opens(folder):  # nobody finished it while we waited
                _prepare(config, source, folder, tools, progress)
    open_shards(folder)
    return folder


def _opens(folder: Path) -> bool:
    """Whether a folder of the cache is finished and whole; one that a power loss cut short is prepared again."""
    try:
        open_shards(folder)
    except DataError:
        return False
    return True


def _prepare(config: Config, source: Source, out: Path, tools: Tools, progress: Progress | None) -> Manifest:
    with _writing(out):
        work = _working_folder(config, source, out, tools)
        checked = check_rows(source, config.data.limit, work, tools, progress)
        write_jsonl(out / REJECTED, [rejected_line(r) for r in checked.rejected])
        drop_duplicates(config, checked)
        splits = choose_splits(config, source, checked)
        splits = settle_leaks(config, source, checked, splits, out)
        write_jsonl(out / REJECTED, [rejected_line(r) for r in checked.rejected])
        kept = limited(checked, splits, config.data.limit)
        rows, splits = [checked.rows[i] for i in kept], [splits[i] for i in kept]
        groups, langs = groups_of(rows, splits), [row.source.lang for row in rows]
        check_space(config, out, work, rows, tools, progress)
        scores = clip_scores_of(work, rows, tools, progress)
        files, content = write_shards(config, work, rows, splits, groups, scores, tools, progress)
        manifest = make_manifest(config, source, checked, files, splits, groups, langs, content, tools)
        write_json(out / MANIFEST, manifest)
        shutil.rmtree(work)
    if progress:
        progress(checked.read, checked.read, summary(manifest))
    return manifest


def _working_folder(config: Config, source: Source, out: Path, tools: Tools) -> Path:
    """The folder of what is done so far: that of a `prepare` that was killed, when it had the same input, else a new one."""
    import pyarrow as pa

    work, same = out / _WORK, {"key": key_of(config, source, tools), "pyarrow": pa.__version__}
    begun = work / "begun.json"
    if (out / MANIFEST).is_file() or not begun.is_file() or read_json(begun) != same:
        for leftover in (out / MANIFEST, out / REJECTED, out / LEAKS, *out.glob("*.parquet"), *out.glob(".*.parquet")):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_json(begun, same)
    return work


def _check_prepared(config: Config, shards: Shards) -> None:
    """Raise for settings that a folder prepared already cannot follow."""
    if needs_clip_scores(config) and "clip_scores" not in shards.manifest:
        raise ConfigError(
            f"data.captions={config.data.captions}: {shards.folder} was prepared without CLIPScores. Prepare the source "
            "again with this setting."
        )
    store = (shards.manifest.get("store") or {}).get("kind", "original")
    if config.data.store not in ("original", store):
        raise ConfigError(
            f"data.store={config.data.store} has no effect on {shards.folder}, which is prepared already as '{store}'"
        )
    limit = config.data.limit
    if limit and max(shards.counts.values()) > limit:
        raise ConfigError(
            f"data.limit={limit} has no effect on {without_secret(shards.folder)}, which is prepared already ({shards.counts}): "
            "set it when preparing, or give the source itself"
        )


def _check_empty(out: Path) -> None:
    """Refuse a folder with files that `prepare` did not write: it would remove parquet files there."""
    if out.exists() and not out.is_dir():
        raise RunError(f"cannot write {out}: it is a file. Choose a folder.")
    ours = (MANIFEST, REJECTED, LEAKS)
    with _writing(out):
        files = sorted(out.iterdir()) if out.is_dir() else []
    for file in files:
        known = file.name in ours or file.name.startswith(".") or _is_shard_name(file.name)
        if not known:
            raise RunError(f"{out} holds {file.name}, which is no shard: choose an empty folder for the shards")


def _is_shard_name(name: str) -> bool:
    split, _, rest = name.partition("-")
    return split in SPLITS and rest.endswith(".parquet")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}. Choose a folder you may write to.") from error
