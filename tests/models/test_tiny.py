"""The tiny GIT that ships: loads in plain transformers, knows its words, describes plain scenes."""

import json
from pathlib import Path

import pytest
import torch

import raycap.models.tiny
from raycap.data.shapes import generate
from raycap.models.tiny.build import IMAGE_SIZE, MAX_TEXT_POSITIONS, build_git, build_processor, build_tokenizer, save

FOLDER = Path(raycap.models.tiny.__file__).parent / "git"
DATA = Path(__file__).parents[3] / "shared" / "data"
HELD_OUT = 1_000_000_000


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def caption(model, processor, images):
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    return processor.tokenizer.batch_decode(model.generate(pixel_values=pixels), skip_special_tokens=True)


def test_sizes(model):
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 8e6
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (128, 4, 512)
    assert config.max_position_embeddings == MAX_TEXT_POSITIONS == 128
    vision = config.vision_config
    assert (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers) == (64, 16, 128, 4)
    assert not config.tie_word_embeddings
    assert model.output.weight.data_ptr() != model.git.embeddings.word_embeddings.weight.data_ptr()


def test_processor_is_gits(processor):
    assert type(processor).__name__ == "GitProcessor"
    tokenizer = processor.tokenizer
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    first, *words, last = tokenizer("a red ring")["input_ids"]
    assert (first, len(words), last) == (1, 3, 2)
    image = next(generate(1, seed=0)).image
    assert processor(images=image, return_tensors="pt")["pixel_values"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)


TEXTS = ["a small red circle left of two stars", "a dog's ball, on the beach .", "犬が走る", "naïve 🐈"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_as_it_was(processor, text):
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert processor.tokenizer.decode(processor.tokenizer(text.upper())["input_ids"], skip_special_tokens=True) == text


def test_every_word_of_the_scenes_is_one_token(processor):
    captions = [c for style in ("plain", "demo") for s in generate(1500, seed=11, style=style) for c in s.captions]
    for word in sorted({w for c in captions for w in c.split()}):
        assert len(processor.tokenizer(word)["input_ids"]) == 3, word


def test_the_tokeniser_is_what_the_builder_makes(processor):
    captions = [c for style in ("plain", "demo") for s in generate(2000, seed=1, style=style) for c in s.captions]
    assert build_tokenizer(captions).get_vocab() == processor.tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["flickr8k", "ucm_captions"])
def test_captions_of_photographs_take_few_tokens_and_no_unknown_one(processor, name):
    path = DATA / name / "captions.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    captions = [c for line in path.read_text(encoding="utf-8").splitlines() for c in json.loads(line)["captions"]]
    ids = processor.tokenizer(captions)["input_ids"]
    tokens = [t for row in ids for t in row]
    unknown = processor.tokenizer.unk_token_id
    assert sum(t == unknown for t in tokens) / len(tokens) < 1e-3
    for text, row in list(zip(captions, ids, strict=True))[:500]:
        assert processor.tokenizer.decode(row, skip_special_tokens=True) == text.lower()
    mean = len(tokens) / len(captions) - 2
    print(f"{name}: {mean:.1f} tokens a caption")
    assert mean <= 20


def test_it_describes_plain_scenes(model, processor):
    scenes = list(generate(200, seed=0, style="plain", start=HELD_OUT))
    said = caption(model, processor, [s.image for s in scenes])
    right = sum(t == s.captions[0] for t, s in zip(said, scenes, strict=True)) / len(scenes)
    print(f"plain scenes captioned word for word right: {right:.1%}")
    assert right > 0.4


def test_generate_is_the_same_alone_and_in_a_batch(model, processor):
    images = [s.image for s in generate(6, seed=2)]
    assert caption(model, processor, images) == [caption(model, processor, [i])[0] for i in images]


def test_the_card_names_how_it_was_made():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "tools/pretrain_tiny_git.py" in text
    assert "--seed" in text


def test_a_new_twin_saves_and_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoProcessor

    tokenizer = build_tokenizer(["a red circle", "two blue squares"], vocabulary=300)
    torch.manual_seed(0)
    twin = build_git(tokenizer, width=32, layers=1, vision_layers=1)
    save(tmp_path, twin, build_processor(tokenizer))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert caption(loaded, AutoProcessor.from_pretrained(tmp_path), [next(generate(1, seed=0)).image])
    assert next(twin.parameters()).dtype == torch.float32
