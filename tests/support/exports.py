"""Fixtures of exports: of a test's own `config` and `adapter`, both ways of merging, and NF4 again."""

from __future__ import annotations

import pytest

from raycap.export.merge import merge
from raycap.export.requantise import requantise


@pytest.fixture(scope="module")
def merged(config, adapter, tmp_path_factory):
    """Both ways of merging."""
    out = tmp_path_factory.mktemp("merged")
    return {onto: merge(config.model, config.data, adapter, out / onto, onto) for onto in ("original", "dequantised")}


@pytest.fixture(scope="module")
def nf4(config, merged, tmp_path_factory):
    return requantise(config.model, config.data, merged["dequantised"], tmp_path_factory.mktemp("nf4") / "model")
