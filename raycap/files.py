"""Files that are whole or not there: written under a temporary name, synced, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raycap.errors import DataError, RunError


def write_atomic(path: Path | str, data: str | bytes) -> Path:
    """Write `data` to `path` so that a reader, or a crash at any moment, sees the old file or the new one."""
    path = Path(path)
    raw = data.encode("utf-8") if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}. Choose a folder you may write to.") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {unwritten(error)} What was there before is unchanged.") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def write_json(path: Path | str, value: Any) -> Path:
    """Write `value` as indented JSON, atomically; NaN becomes null so that every reader takes it."""
    return write_atomic(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path | str, rows: Iterable[dict[str, Any]]) -> Path:
    """Write one JSON object a line, atomically."""
    return write_atomic(path, "".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def read_rows(path: Path | str, needed: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of a JSONL file that a person may have written or edited, each with the keys `needed`.

    Raises:
        DataError: it cannot be read, or a line is no such object; the line is named.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read: it is no text in UTF-8 ({error.reason})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON: {error}") from error
        lacking = [key for key in needed if key not in row] if isinstance(row, dict) else ["an object"]
        if lacking:
            raise DataError(f"{path}:{number} has no {lacking[0]}: expected {{{', '.join(needed)}}}, found {line:.100}")
        rows.append(row)
    return rows


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a fresh sibling folder that becomes `path` when the block ends well, and vanishes when it does not."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        os.chmod(temporary, 0o777 & ~_umask())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}. Choose a folder you may write to.") from error
    try:
        yield temporary
        sync_tree(temporary)
        if path.exists():
            # Two renames, not one: a crash between them leaves the old folder under a name that says so.
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {unwritten(error)} What was there before is unchanged.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unwritten(error: OSError) -> str:
    """Why a write failed and, where a person can help it, what to do: sentences that end with a full stop."""
    told = f"{error.strerror or error}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        told += " Make room on that disk, then go on (a run: with --resume)."
    return told


def read_whole(path: Path | str) -> Any:
    """The JSON in `path`; None where there is none, or what a power cut left of it."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def set_aside(path: Path) -> None:
    """Rename what is damaged to <name>.damaged, so that a person can look at it and nobody reads it again."""
    try:
        os.replace(path, path.with_name(f"{path.name}.damaged"))
    except FileNotFoundError:
        pass


def sync_tree(folder: Path) -> None:
    """Bring every file under `folder`, and the names of them, to the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            _sync_folder(path)
        elif path.is_file():
            _sync_file(path)


def sha256_file(path: Path | str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_folder(path: Path | str, pattern: str = "*") -> str:
    """Hash of the names and contents of the files under `path` that match, in name order."""
    digest = hashlib.sha256()
    root = Path(path)
    for file in sorted(p for p in root.rglob(pattern) if p.is_file()):
        digest.update(f"{file.relative_to(root).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value that does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):  # numpy and torch scalars
        value = value.item()
    if isinstance(value, float) and value != value:
        return None
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
