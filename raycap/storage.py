"""A folder that every node of a cluster reaches: a path mounted on all of them (NFS, Lustre), s3://, gs://, or what fsspec knows.

Names inside are relative, with `/`. A file is whole or not there: on a disk it is written under another name and
renamed, in an object store it appears when its upload is complete. A folder is put file by file, with the one that
says that it is whole at the end.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from raycap.errors import ConfigError, RunError
from raycap.files import atomic_folder, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.fs

REMEDY = "Check the address, the network and this node's credentials, and that the bucket or folder exists."
_OBJECT_STORES = ("s3", "gcs", "abfs")


class Storage:
    """One folder of a filesystem; `storage / "name"` is a folder in it. Made by `Storage.open`.

    All calls raise RunError, naming the url and what to do, when the filesystem does not do as asked.
    """

    def __init__(self, filesystem: pyarrow.fs.FileSystem, root: str, url: str):
        self.filesystem = filesystem
        self.root = root.rstrip("/") or "/"
        self.url = url.rstrip("/")

    @classmethod
    def open(cls, place: Path | str) -> Storage:
        """The folder that a path or a url names; nothing is read or made yet.

        Raises:
            ConfigError: not a url of a kind that is known.
            RunError: its filesystem cannot be reached.
        """
        from pyarrow import fs

        text = str(place)
        if not is_url(text) or text.startswith("file://"):
            # A path is made absolute, because the working folder of another process is another one.
            path = Path(text.removeprefix("file://")).expanduser().absolute()
            return cls(fs.LocalFileSystem(), path.as_posix(), str(path))
        try:
            if text.split("://")[0] in ("s3", "gs", "gcs", "abfs", "abfss", "hdfs"):
                filesystem, root = fs.FileSystem.from_uri(text)
            else:
                import fsspec

                known, root = fsspec.core.url_to_fs(text)
                filesystem = fs.PyFileSystem(fs.FSSpecHandler(known))
        except (ValueError, ImportError) as error:
            kinds = "a path, file://, s3://, gs://, or what an installed fsspec filesystem reads"
            raise ConfigError(f"{without_secret(text)} is no storage: {_line(error)}. Give {kinds}.") from error
        except OSError as error:
            raise RunError(f"storage {without_secret(text)} cannot be reached: {_line(error)}. {REMEDY}") from error
        return cls(filesystem, root, text)

    def __truediv__(self, name: str) -> Storage:
        base, mark, query = self.url.partition("?")
        return Storage(self.filesystem, self._path(name), f"{base.rstrip('/')}/{name}{mark}{query}")

    def __str__(self) -> str:
        return without_secret(self.url)

    @property
    def local(self) -> Path | None:
        """The folder's path where it is one of this machine's (or mounted on it)."""
        return Path(self.root) if self.filesystem.type_name == "local" else None

    def put(self, name: str, data: str | bytes) -> None:
        """Write one file, whole or not at all."""
        raw = data.encode("utf-8") if isinstance(data, str) else data
        path = self._path(name)
        if self.local is not None:
            write_atomic(path, raw)
            return
        # Elsewhere than in an object store a reader could see a file that is still being written.
        whole = self.filesystem.type_name in _OBJECT_STORES
        first = path if whole else f"{path.rpartition('/')[0]}/.{path.rpartition('/')[2]}.{uuid.uuid4().hex[:8]}"
        with self._said(name, "written"):
            if not whole:
                self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            with self.filesystem.open_output_stream(first) as stream:
                stream.write(raw)
            if not whole:
                if self.has(name):
                    self.filesystem.delete_file(path)
                self.filesystem.move(first, path)

    def get(self, name: str) -> bytes | None:
        """A file's bytes, or None where there is none."""
        with self._said(name, "read"):
            try:
                with self.filesystem.open_input_stream(self._path(name)) as stream:
                    return stream.read()
            except FileNotFoundError:
                return None

    def has(self, name: str) -> bool:
        from pyarrow import fs

        with self._said(name, "read"):
            return self.filesystem.get_file_info(self._path(name)).type == fs.FileType.File

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none."""
        from pyarrow import fs

        with self._said(name, "read"):
            found = self.filesystem.get_file_info(self._path(name))
        return found.size if found.type == fs.FileType.File else None

    def files(self, name: str = "") -> list[str]:
        """Names of all files below a folder, relative to it and in order; none where it is not there."""
        return sorted(self._listed(name, recursive=True, folders=False))

    def folders(self, name: str = "") -> list[str]:
        """Names of the folders in a folder, in order."""
        return sorted(self._listed(name, recursive=False, folders=True))

    def put_folder(self, folder: Path | str, name: str, *, last: str = "") -> None:
        """Copy a folder's files to `name`; the one called `last`, which makes it whole for readers, after all others."""
        folder = Path(folder)
        found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        for file in sorted(found, key=lambda file: file == last):
            self._put_file(folder / file, f"{name}/{file}")

    def get_folder(self, name: str, folder: Path | str) -> Path:
        """Copy the files below `name` into the local `folder`, which appears whole.

        Raises:
            RunError: there are none.
        """
        found = self.files(name)
        if not found:
            raise RunError(f"storage {self} has no files in {name}, which was to be copied to {folder}.")
        with atomic_folder(folder) as temporary:
            for file in found:
                target = temporary / file
                target.parent.mkdir(parents=True, exist_ok=True)
                with self._said(f"{name}/{file}", "read"):
                    with self.filesystem.open_input_stream(self._path(f"{name}/{file}")) as source:
                        with open(target, "wb") as out:
                            shutil.copyfileobj(source, out, 1 << 22)
        return Path(folder)

    @contextmanager
    def as_folder(self, name: str) -> Iterator[Path]:
        """The folder `name` as one of this machine: itself, or a copy that is removed at the end."""
        if self.local is not None:
            yield self.local / name
            return
        with tempfile.TemporaryDirectory(prefix="raycap-") as temporary:
            yield self.get_folder(name, Path(temporary) / "copy")

    def delete(self, name: str) -> None:
        """Remove one file; nothing happens where there is none."""
        with self._said(name, "removed"):
            if self.has(name):
                self.filesystem.delete_file(self._path(name))

    def _put_file(self, file: Path, name: str) -> None:
        size = file.stat().st_size
        if self.local is not None or size < 1 << 26:
            self.put(name, file.read_bytes())
            return
        with self._said(name, "written"):
            path = self._path(name)
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            with open(file, "rb") as source, self.filesystem.open_output_stream(path) as stream:
                shutil.copyfileobj(source, stream, 1 << 24)

    def _listed(self, name: str, *, recursive: bool, folders: bool) -> Iterator[str]:
        from pyarrow import fs

        base = self._path(name) if name else self.root
        with self._said(name, "listed"):
            found = self.filesystem.get_file_info(fs.FileSelector(base, recursive=recursive, allow_not_found=True))
        for info in found:
            wanted = info.type == (fs.FileType.Directory if folders else fs.FileType.File)
            # What fsspec lists may begin with a slash that the root has not, or the other way round.
            inside = info.path.lstrip("/").removeprefix(base.lstrip("/")).strip("/")
            if wanted and inside and not any(part.startswith(".") for part in inside.split("/")):
                yield inside

    def _path(self, name: str) -> str:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts:
            raise RunError(f"{name!r} is not the name of a file inside the storage {self}")
        return f"{self.root.rstrip('/')}/{'/'.join(parts)}"

    @contextmanager
    def _said(self, name: str, done: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise RunError(f"storage {self}: {name or 'it'} cannot be {done}: not found. {REMEDY}") from error
        except (OSError, NotImplementedError) as error:
            raise RunError(f"storage {self}: {name or 'it'} cannot be {done}: {_line(error)}. {REMEDY}") from error


def is_url(place: Path | str) -> bool:
    """Whether `place` is a url (scheme://...), and not a path."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.:-]*://", str(place)) is not None


def join(place: Path | str, name: str) -> str:
    """`place/name`, for a path and for a url (whose query stays at its end)."""
    if not is_url(place):
        return str(Path(place) / name)
    base, mark, query = str(place).partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def open_file(place: Path | str) -> pa.NativeFile:
    """A path or url for reading at any position. OSError where it cannot be read."""
    from pyarrow import fs

    if not is_url(place):
        return fs.LocalFileSystem().open_input_file(str(place))
    storage = Storage.open(str(place))
    return storage.filesystem.open_input_file(storage.root)


def without_secret(place: Path | str) -> str:
    """A path as it is; a url fit to be shown, without key, password and query."""
    text = str(place)
    return re.sub(r"//[^/@]*@", "//", text).partition("?")[0] if is_url(text) else text


def _line(error: Any) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
