"""What each verb hands to the pipeline and prints of its answer; the pipeline itself is tested elsewhere."""

from __future__ import annotations

import json
import sys
import types

import pytest
import yaml

from raycap.cli import main
from raycap.config import load_config
from raycap.report.ledger import Ledger


@pytest.fixture
def pipeline(monkeypatch):
    """Stands in for raycap.pipeline and notes its calls."""
    calls = []
    module = types.ModuleType("raycap.pipeline")

    def note(name, answer):
        def called(*arguments, **options):
            calls.append((name, arguments, options))
            return answer(*arguments, **options) if callable(answer) else answer

        setattr(module, name, called)

    module.note, module.calls = note, calls
    monkeypatch.setitem(sys.modules, "raycap.pipeline", module)
    import raycap

    monkeypatch.setattr(raycap, "pipeline", module, raising=False)
    return module


@pytest.fixture
def run_folder(tmp_path):
    """A finished run with two variants' predictions on three pictures."""
    return make_run(tmp_path / "run", {"a": "a red square", "b": "a blue circle", "c": "two green stars"})


def make_run(folder, captions, status="finished", references=None):
    config = load_config("shapes-git", [f"run.dir={folder}"])
    references = references or {"a": ["a red square"], "b": ["a blue circle"], "c": ["two green stars"]}
    with Ledger.create(config, command="raycap sweep shapes-git") as ledger:
        for variant in ("zero-shot", "served"):
            ledger.write_predictions("test", variant, captions, {i: references[i] for i in captions})
            ledger.add_metrics("test", variant, {"cider": {"score": 1.25, "signature": "cider|test"}})
        if status:
            ledger.finish(status, best_trial="t03", sentence="The winner beats zero-shot.", data_sha256="x")
    merged = folder / "best" / "merged"
    merged.mkdir(parents=True)
    (merged / "config.json").write_text("{}")
    return folder


def test_dry_run_prints_settings_and_trials_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "shapes-git", "tune.trials=5", "--dry-run", "train.lr=1e-3"]) == 0
    out = capsys.readouterr().out
    settings, _, rest = out.partition("trial_id")
    assert yaml.safe_load(settings)["train"]["lr"] == 1e-3
    assert [f"t0{n}" in rest for n in range(5)] == [True] * 5
    assert "predicted work" in rest and "predicted memory" in rest and "folder: results/shapes-git" in rest
    assert not list(tmp_path.iterdir())

    assert main(["sweep", "shapes-git", "tune.trials=5", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [t["trial_id"] for t in found["trials"]] == ["t00", "t01", "t02", "t03", "t04", "default"]


def test_dry_run_shows_every_setting_that_trials_differ_in(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space = "tune.space={lora.full: {choice: [[], [projector]]}, train.schedule: {choice: [linear, cosine]}}"
    assert main(["sweep", "shapes-git", "tune.trials=6", space, "--dry-run"]) == 0
    heads, *rows = capsys.readouterr().out.partition("trial_id")[2].splitlines()[:7]
    assert heads.split() == ["r", "alpha", "scale", "lr", "dropout", "seed", "schedule", "full"]
    assert {tuple(row.split()[-2:]) for row in rows} <= {
        (s, f) for s in ("linear", "cosine") for f in ("-", "projector")
    }


def test_code_from_outside_is_said_loudly_before_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["sweep", "shapes-git", "tune.trials=2", "--dry-run", "--json"]
    assert main([*asked, "model.trust_remote_code=true"]) == 0
    said = capsys.readouterr().err
    assert said.startswith(
        "WARNING: model.trust_remote_code=true runs the code that came with builtin:tiny-git, as you"
    )
    assert main(asked) == 0 and "WARNING" not in capsys.readouterr().err


def test_sweep_calls_the_pipeline_and_prints_what_came_of_it(pipeline, run_folder, capsys):
    pipeline.note("sweep", run_folder)
    assert main(["sweep", "shapes-git", "train.steps=50", "--plain"]) == 0
    ((_, (config,), options),) = pipeline.calls
    assert config.train.steps == 50
    assert options == {
        "resume": False, "plain": True, "keep_serving": False,
        "command": "raycap sweep shapes-git train.steps=50 --plain",
    }  # fmt: skip
    out = capsys.readouterr().out
    for expected in ("finished", "CIDEr 1.250", str(run_folder), "The winner beats zero-shot."):
        assert expected in out

    assert main(["sweep", "shapes-git", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["test"]["served"]["cider"]["score"] == 1.25


def test_resume_takes_the_runs_own_settings(pipeline, tmp_path, capsys):
    folder = make_run(tmp_path / "cut", {"a": "x"}, status="")
    pipeline.note("sweep", folder)
    assert main(["sweep", "--resume", str(folder), "export.max_drop=0.2"]) == 1, "the made-up pipeline finished nothing"
    ((_, (config,), options),) = pipeline.calls
    assert (config.run.dir, config.export.max_drop, options["resume"]) == (str(folder), 0.2, True)
    pipeline.calls.clear()

    assert main(["sweep", "shapes-git", f"run.dir={folder}", "--resume"]) == 1
    assert pipeline.calls[0][1][0] == load_config("shapes-git", [f"run.dir={folder}"])
    capsys.readouterr()

    assert main(["sweep", "--resume", str(folder), "train.lr=1"]) == 2
    assert "would not be comparable" in capsys.readouterr().err
    assert main(["sweep", "--resume", str(tmp_path)]) == 2
    assert "no config.yaml" in capsys.readouterr().err
    assert main(["sweep", str(folder)]) == 2
    assert "--resume" in capsys.readouterr().err


def test_resuming_a_finished_run_says_so_and_runs_nothing(pipeline, run_folder, capsys):
    assert main(["sweep", "--resume", str(run_folder)]) == 0
    assert not pipeline.calls and "finished" in capsys.readouterr().out


def test_train_is_a_pack_of_one_that_nobody_prunes(pipeline, run_folder):
    pipeline.note("train", run_folder)
    assert main(["train", "shapes-git", "lora.r=4"]) == 0
    ((_, (config,), _),) = pipeline.calls
    assert (config.tune.trials, config.tune.slots, config.tune.scheduler, config.tune.space) == (1, 1, "none", {})
    assert config.lora.r == 4


def test_prepare_takes_a_folder_or_a_preset(pipeline, tmp_path, capsys):
    from raycap.data.shards import prepare

    counts = {
        "tokeniser": "tiny",
        "captions": 50,
        "captions_cut": 3,
        "limit": 9,
        "tokens": 400,
        "unknown_share": 0.0125,
    }
    pipeline.note("prepare", lambda config, out, tokens, plain: prepare(config, out) and tokens and {"en": counts})
    out = tmp_path / "shards"
    assert main(["prepare", "shapes-git", "data.shapes_images=6,2,2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "10 rows kept, 0 rejected" in said
    assert "tiny, en: 3 of 50 captions cut at 9 tokens; 400 tokens, 1.25% of them unknown" in said

    source = tmp_path / "mine"
    source.mkdir()
    pipeline.note("prepare", {})
    assert main(["prepare", str(source), "--out", str(out), "--json"]) == 0
    (config, _), options = pipeline.calls[-1][1:]
    assert not options["tokens"]  # no model is named
    assert (config.data.source, config.run.name) == (str(source), "mine")
    assert json.loads(capsys.readouterr().out)["counts"] == {"train": 6, "val": 2, "test": 2}


def test_caption_prints_a_line_a_picture(pipeline, run_folder, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("b.png", "a.JPG", "notes.txt"):
        (pictures / name).write_bytes(b"")
    pipeline.note("caption", lambda config, model, files: [f"caption of {f.name}" for f in files])
    assert main(["caption", str(run_folder), str(pictures)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{pictures / 'a.JPG'}\tcaption of a.JPG", f"{pictures / 'b.png'}\tcaption of b.png",
    ]  # fmt: skip
    _, (config, model, _), _ = pipeline.calls[0]
    assert model == run_folder / "best" / "merged" and config.run.dir == str(run_folder)

    assert main(["caption", str(run_folder), str(pictures / "a.JPG"), "--json", "--set", "decode.num_beams=3"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"image": str(pictures / "a.JPG"), "caption": "caption of a.JPG"}]
    assert pipeline.calls[-1][1][0].decode.num_beams == 3

    assert main(["caption", str(run_folder), str(pictures / "b.jpg")]) == 2
    assert "did you mean 'b.png'" in capsys.readouterr().err
    assert main(["caption", str(run_folder), "x.png", "--variant", "merged-nf4"]) == 2
    assert "it has merged" in capsys.readouterr().err


def test_a_model_folder_alone_and_an_adapter(pipeline, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    pipeline.note("serve", None)
    assert main(["serve", str(model), "serve.port=0"]) == 0
    _, (config, folder), _ = pipeline.calls[0]
    assert (folder, config.model.path, config.serve.port, config.run.dir) == (model, str(model), 0, "")

    (model / "adapter_config.json").write_text("{}")
    assert main(["serve", str(model)]) == 2
    assert "adapter without its base" in capsys.readouterr().err


def test_evaluate_prints_scores_with_their_signatures(pipeline, run_folder, capsys):
    answer = {
        "split": "val",
        "images": 7,
        "metrics": {"cider": {"score": 0.5, "signature": "cider|x"}},
        "predictions": "p",
    }
    pipeline.note("evaluate", answer)
    assert main(["evaluate", str(run_folder), "--split", "val"]) == 0
    out = capsys.readouterr().out
    assert "0.5000" in out and "cider|x" in out and "7 images" in out
    assert main(["evaluate", str(run_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == answer


def test_evaluate_hands_a_grid_to_the_pipeline_and_prints_its_table(pipeline, run_folder, tmp_path, capsys):
    row = {
        "model": "run", "prompt": "A", "decode": "greedy", "seed": None, "prompt_text": "This is", "images": 3, "key": "k",
        "metrics": {"cider": {"score": 0.5, "signature": "cider|x"}}, "decoding": "decode|x",
        "collapse": {"collapsed": True, "reasons": ["90% of the captions are the same"]},
    }  # fmt: skip
    pipeline.note("evaluate_grid", {"split": "test", "images": 3, "rows": [row]})
    settings = ["evaluate.prompts={A: This is}", "decode.max_new_tokens=9"]
    verb = ["evaluate", str(run_folder)]
    assert main([*verb, settings[0], "--grid", "prompts=A", "decode=greedy,beam", settings[1]]) == 0
    out = capsys.readouterr().out
    assert "0.5000" in out and "! 90% of the captions are the same" in out and str(run_folder / "grid" / "test") in out
    _, (config, models, wanted), options = pipeline.calls[-1]
    assert models == [run_folder / "best" / "merged"] and config.decode.max_new_tokens == 9
    assert [(c.prompt, c.decode.num_beams, c.decode.max_new_tokens) for c in wanted] == [
        ("This is", 1, 9),
        ("This is", 4, 9),
    ]
    assert options == {"split": "test", "out": run_folder / "grid" / "test", "plain": False}

    assert main([*verb, "--grid", "promts=A"]) == 2
    assert "did you mean 'prompts'" in capsys.readouterr().err
    assert main(["evaluate", str(run_folder / "best" / "merged"), "--grid", "decode=beam"]) == 2
    assert "--out" in capsys.readouterr().err
    models = f"models={run_folder / 'best' / 'merged'}"
    assert main([*verb, "--grid", "decode=beam", models, "--out", str(tmp_path / "o"), "--json"]) == 0
    assert len(pipeline.calls[-1][1][1]) == 2 and json.loads(capsys.readouterr().out)["rows"] == [row]


def test_compare_on_shared_pictures(tmp_path, capsys):
    names = [f"p{n}" for n in range(60)]
    references = {i: [f"a {w} thing number {n}", f"{w} number {n}"] for n, i in enumerate(names) for w in ["red"]}
    good = make_run(tmp_path / "good", {i: references[i][0] for i in names}, references=references)
    same = make_run(tmp_path / "same", {i: references[i][0] for i in names[:50]}, references=references)
    bad = make_run(tmp_path / "bad", dict.fromkeys(names, "a cat"), references=references)
    assert main(["compare", str(good), str(same), str(bad), "--resamples", "500", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["variant"]) == (50, "served")
    first, second, third = found["runs"]
    assert second["difference"] == 0 and second["verdict"] == "cannot be told apart at this size"
    assert third["difference"] < 0 and third["high"] < 0 and third["verdict"] == "worse"
    assert third["difference"] == pytest.approx(third["cider"] - first["cider"])
    assert main(["compare", str(good), str(bad), "--resamples", "500"]) == 0
    assert "worse" in capsys.readouterr().out

    other = make_run(tmp_path / "other", {"p0": "x"}, references={"p0": ["something else"]})
    assert main(["compare", str(good), str(other)]) == 1
    assert "other references" in capsys.readouterr().err
    assert main(["compare", str(good), str(bad), "--variant", "merged"]) == 1
    assert "there: zero-shot, served" in capsys.readouterr().err


def test_compare_names_what_is_wrong_with_a_folder(tmp_path, run_folder, capsys):
    good = str(run_folder)
    assert main(["compare", good]) == 2 and "at least two run folders" in capsys.readouterr().err
    assert main(["compare", good, str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["compare", good, str(tmp_path)]) == 1
    assert "is no run folder: there is no config.yaml" in capsys.readouterr().err
    references = {"a": ["a red square"], "b": ["a blue circle"], "c": ["two green stars"]}
    torn = make_run(tmp_path / "torn", dict.fromkeys(references, "x"), references=references)
    file = torn / "predictions" / "test.served.jsonl"
    whole = file.read_text().splitlines()
    for line, said in ((whole[1][:-9], "test.served.jsonl:2 is not JSON"), ('{"image_id": "b"}', ":2 has no caption")):
        file.write_text("\n".join([whole[0], line]))
        assert main(["compare", good, str(torn)]) == 1
        assert said in capsys.readouterr().err
    (torn / "config.yaml").write_text("run: {name: [")
    assert main(["compare", good, str(torn)]) == 1
    assert "config.yaml" in capsys.readouterr().err


def test_evaluate_refuses_before_it_captions(run_folder, tmp_path, capsys):
    verb = ["evaluate", str(run_folder)]
    (tmp_path / "file").write_text("{}\n")
    assert main([*verb, "--out", str(tmp_path / "file")]) == 2 and "a file has that name" in capsys.readouterr().err
    assert main([*verb, "--exclude", str(tmp_path / "nowhere")]) == 2 and "no such file" in capsys.readouterr().err
    assert (
        main([*verb, "--exclude", str(tmp_path / "file")]) == 1 and "file:1 has no image_id" in capsys.readouterr().err
    )
    assert (
        main([*verb, "--grid", "decode=greedy", "--also", "x"]) == 2
        and "--also has no effect" in capsys.readouterr().err
    )
    assert main(["evaluate", str(tmp_path / "nowhere")]) == 2 and "there is no folder" in capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "shapes-git" in found["presets"] and "git" in found["families"]
    assert {"python", "cores", "memory", "gpu", "compute", "java"} <= found["machine"].keys()
    for item in found["missing"]:
        assert item["what"] and item["how"]
    assert main(["doctor"]) == 0
    assert "ready: raycap sweep shapes-git" in capsys.readouterr().out


def test_prepare_takes_a_folder_a_file_and_a_hub_id(tmp_path):
    from raycap.cli.prepare import source_config

    (tmp_path / "dataset_mini.json").write_text("{}")
    assert source_config(str(tmp_path / "dataset_mini.json"), []).data.source == str(tmp_path / "dataset_mini.json")
    named = "reach-vb/pokemon-blip-captions@3790f29:default"
    config = source_config(named, ["data.splits=560,70,70", "data.columns={captions: text}"])
    assert config.data.source == named and config.data.splits == (560, 70, 70)
    assert config.data.columns == {"captions": "text"}
