"""A storage does the same on a disk, through fsspec and in an object store, and says clearly what it cannot do."""

from __future__ import annotations

import pickle

import pytest
from pyarrow import fs
from s3_server import s3_server

from raycap.errors import ConfigError, RunError
from raycap.storage import Storage, is_url, join, open_file, without_secret


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture(params=["path", "file url", "fsspec", "subtree", "s3"])
def storage(request, tmp_path):
    if request.param == "path":
        return Storage.open(tmp_path / "store")
    if request.param == "file url":
        return Storage.open(f"file://{tmp_path}/store")
    if request.param == "fsspec":
        return Storage.open(f"memory://{tmp_path}/store")
    if request.param == "subtree":
        return Storage(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "store", "tree://store")
    return Storage.open(join(request.getfixturevalue("s3"), tmp_path.name))


def test_what_is_put_is_there_and_whole(storage):
    assert storage.get("a/b.json") is None and not storage.has("a/b.json") and storage.size("a/b.json") is None
    assert storage.files() == storage.folders() == []
    storage.put("a/b.json", "äb")
    storage.put("a/c/d", b"12")
    storage.put("a/b.json", "later")
    assert storage.get("a/b.json") == b"later" and storage.has("a/b.json") and storage.size("a/c/d") == 2
    assert storage.files() == ["a/b.json", "a/c/d"] and storage.files("a") == ["b.json", "c/d"]
    assert storage.folders() == ["a"] and storage.folders("a") == ["c"] and storage.folders("none") == []
    inside = storage / "a"
    assert inside.files() == ["b.json", "c/d"] and inside.get("c/d") == b"12" and str(inside).endswith("/a")
    storage.delete("a/b.json")
    storage.delete("a/b.json")
    assert storage.files("a") == ["c/d"]


def test_a_folder_travels_with_its_last_file_last(storage, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.json", "trial.json", "z.bin", "deep/b"):
        (folder / name).write_text(name)
    order, put = [], Storage.put
    monkeypatch.setattr(Storage, "put", lambda self, name, data: (order.append(name), put(self, name, data)))
    storage.put_folder(folder, "t00", last="trial.json")
    assert order[-1] == "t00/trial.json" and len(order) == 4
    back = storage.get_folder("t00", tmp_path / "back")
    assert {p.relative_to(back).as_posix(): p.read_text() for p in back.rglob("*") if p.is_file()} == {
        name: name for name in ("a.json", "trial.json", "z.bin", "deep/b")
    }
    with storage.as_folder("t00") as seen:
        assert (seen / "deep" / "b").read_text() == "deep/b"
    with pytest.raises(RunError, match="no files in t01"):
        storage.get_folder("t01", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_storage_travels_to_other_processes(storage):
    storage.put("a", "1")
    again = pickle.loads(pickle.dumps(storage))
    assert again.url == storage.url and again.get("a") == b"1"


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x"])
def test_no_name_leads_out_of_it(storage, name):
    with pytest.raises(RunError, match="not the name of a file inside"):
        storage.put(name, "x")


def test_a_url_opens_again_in_another_process(s3):
    Storage.open(join(s3, "again")).put("x", "12345")
    with open_file(join(s3, "again/x")) as file:
        file.seek(3)
        assert file.read() == b"45"


def test_errors_name_the_url_and_what_to_do(tmp_path, s3):
    with pytest.raises(ConfigError, match=r"nope://bucket/x is no storage.*s3://"):
        Storage.open("nope://bucket/x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=f"{tmp_path}/file"):
        Storage.open(tmp_path / "file").put("a", "1")
    gone = Storage.open(s3.replace("@bucket", "@no-such-bucket"))
    with pytest.raises(RunError, match=r"storage s3://no-such-bucket.*cannot be written.*credentials") as error:
        gone.put("a", "1")
    assert "secret" not in str(error.value)


def test_places_are_told_apart_and_joined():
    assert is_url("s3://b/x") and not is_url("/a/b") and not is_url("a:b") and is_url("gs://x")
    assert join("s3://b/x?region=r", "y/z") == "s3://b/x/y/z?region=r" and join("/a", "b") == "/a/b"
    assert without_secret("s3://key:secret@b/x?y=1") == "s3://b/x" and without_secret("/a/b") == "/a/b"
