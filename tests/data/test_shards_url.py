"""Shards in a storage are read where they lie, by url."""

from __future__ import annotations

import pytest
from s3_server import s3_server

from raycap.config import from_dict
from raycap.data.shards import is_shards_folder, open_shards, prepare, prepare_if_needed
from raycap.data.stream import local_batches
from raycap.errors import ConfigError, DataError
from raycap.storage import Storage, join


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same shards as a local folder, and as the url of a copy of it."""
    folder = tmp_path_factory.mktemp("shards") / "out"
    prepare(from_dict({"data": {"source": "shapes", "shapes_images": [40, 8, 8], "rows_per_shard": 16}}), folder)
    with s3_server(tmp_path_factory.mktemp("s3")) as bucket:
        Storage.open(bucket).put_folder(folder, "sets/shapes", last="manifest.json")
        yield folder, join(bucket, "sets/shapes")


def test_rows_are_the_same_by_url(both):
    here, there = map(open_shards, both)
    assert is_shards_folder(both[1]) and not is_shards_folder(both[1].replace("shapes", "none"))
    assert there.counts == here.counts and there.content_sha256 == here.content_sha256
    assert there.read_rows("train") == here.read_rows("train")
    assert there.references("val") == here.references("val")
    there.verify()
    assert prepare_if_needed(from_dict({"data": {"source": both[1]}})) == both[1]


def test_a_stream_by_url_is_the_local_one(both):
    def prepare_row(row):
        return {"row": row["row"], "image_id": row["image_id"], "pixels": _pixels(row), "token_ids": [[1]],
                "prompt_lens": [0]}  # fmt: skip

    here, there = ([t.to_pylist() for t in local_batches(place, "train", prepare_row)] for place in both)
    assert here == there and sum(map(len, here)) == 40


def _pixels(row):
    import io

    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")).transpose(2, 0, 1)


def test_what_is_not_whole_in_a_storage_is_refused_without_its_key(both):
    with pytest.raises(DataError, match=r"s3://bucket/sets/none has no manifest.json") as error:
        open_shards(both[1].replace("shapes", "none"))
    assert "secret" not in str(error.value)
    cut = join(both[1].replace("/shapes", ""), "cut")
    storage = Storage.open(cut)
    for name in ("manifest.json", "train-00000.parquet"):
        storage.put(name, (both[0] / name).read_bytes())
    with pytest.raises(DataError, match=r"train-00001.parquet is missing"):
        open_shards(cut)
    with pytest.raises(ConfigError, match=r"data.limit=2 has no effect"):
        prepare_if_needed(from_dict({"data": {"source": both[1], "limit": 2}}))
    with pytest.raises(DataError, match="prepared already"):
        prepare(from_dict({"data": {"source": both[1]}}), both[0].parent / "again")


def test_a_shard_that_this_node_does_not_see_is_named_with_the_node(both, tmp_path):
    from raycap.data.parquet import read_row_group

    group = {**open_shards(both[0]).row_groups("val")[0], "file": str(tmp_path / "val-00000.parquet")}
    with pytest.raises(DataError, match=r"val-00000.parquet is not there on node .*run.storage"):
        read_row_group(group)
