"""Cells of a decoding grid: what the axes mean, what a name stands for, what is refused."""

from __future__ import annotations

import pytest

from raycap.config import load_config
from raycap.errors import ConfigError, UsageError
from raycap.evaluate.grid import Cell, cells, read_axes

RISC = [
    "evaluate.prompts={A: 'Describe this image in detail:', B: 'Describe this image:', C: 'What do you see in this image:'}",
    "decode.max_new_tokens=16",
]


def config(*settings):
    return load_config("shapes-git", [*RISC, *settings])


def grid(*words, settings=()):
    axes, more = read_axes(words)
    return cells(config(*settings, *more), axes)


def test_every_prompt_with_every_decoding():
    found = grid("prompts=A,B,C", "decode=greedy,beam-sample", "decode.batch=32")
    assert [c.name for c in found] == [f"{p}-{d}" for p in "ABC" for d in ("greedy", "beam-sample-s0")]
    greedy, drawn = found[0].decode, found[1].decode
    assert found[0].prompt == "Describe this image in detail:"
    assert (greedy.num_beams, greedy.do_sample, greedy.max_new_tokens, greedy.batch) == (1, False, 16, 32)
    assert (drawn.num_beams, drawn.top_p, drawn.top_k, drawn.temperature) == (4, 0.9, 50, 0.8)
    assert drawn.early_stopping and drawn.no_repeat_ngram_size == 2 and drawn.max_new_tokens == 16


def test_seeds_multiply_what_is_drawn_alone():
    found = grid("decode=greedy,sample", "seeds=3,4")
    assert [(c.decode_name, c.seed) for c in found] == [("greedy", None), ("sample", 3), ("sample", 4)]
    assert len({c.signature() for c in found}) == 3
    with pytest.raises(ConfigError, match="no effect: nothing is sampled"):
        grid("decode=greedy,beam", "seeds=3,4")


def test_signature_names_the_order_where_captions_depend_on_it():
    sample, beams = grid("prompts=A", "decode=sample,beam-sample")
    assert "draws:image" in sample.signature() and "batch" not in sample.signature()
    assert "|draws:batch|order:split|batch:" in beams.signature() and "prompt:'Describe" in beams.signature()


def test_own_decodings_and_prompts():
    own = "evaluate.decodings={wide: {num_beams: 8, length_penalty: 0.6}}"
    (found,) = grid("prompts=what is it", "decode=wide", settings=(own, "decode.bad_words=red,blue"))
    assert found.prompt == "what is it" and found.decode.num_beams == 8 and found.decode.length_penalty == 0.6
    assert found.decode.bad_words == ("red", "blue") and "bad_words:red,blue" in found.signature()
    assert Cell.from_dict(found.to_dict()) == found
    assert [c.prompt for c in grid("prompts=none,default")] == ["", ""]


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["prompts=D"], (), "evaluate.prompts has no 'D'"),
        (["decode=gredy"], (), "did you mean 'greedy'"),
        (["decode=w"], ("evaluate.decodings={w: {beams: 2}}",), "unknown setting 'decode.beams'"),
        (["decode=w"], ("evaluate.decodings={w: {top_p: 0.5}}",), "decodings.w.top_p=0.5 has no effect with"),
        (["decode=w"], ("evaluate.decodings={w: 4}",), "not a mapping"),
        (["prompts=none one,none-one"], ("evaluate.prompts={none-one: x}",), "would be called none-one-default"),
    ],
)
def test_what_is_refused(words, settings, message):
    with pytest.raises(ConfigError, match=message):
        grid(*words, settings=settings)


@pytest.mark.parametrize("words", [["prompt=A"], ["prompts="], ["prompts=A,A"], ["decode=greedy", "decode=beam"]])
def test_axes_that_are_none(words):
    with pytest.raises(UsageError, match="--grid"):
        read_axes(words)
