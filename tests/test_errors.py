"""Errors keep their text between processes, and say what is near."""

from __future__ import annotations

import pickle

import pytest

from raycap import errors


@pytest.mark.parametrize("kind", [errors.RaycapError, *errors.RaycapError.__subclasses__()])
def test_an_error_survives_two_trips(kind):
    error = kind("shard x, row 3: captions is None")
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))
    assert type(again) is kind and str(again) == str(error) and again.exit_code == error.exit_code


def test_suggestions():
    assert "'train.lr'" in errors.did_you_mean("train.lrr", ["train.lr", "lora.r"])
    assert errors.did_you_mean("zzz", ["a", "b"]) == "valid: a, b"
    assert "nothing" in errors.did_you_mean("x", [])
