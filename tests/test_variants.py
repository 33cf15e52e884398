"""The patches in records/, and the list of ideas: each applies to its script, compiles, and trains."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import repeat

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, random_documents
from test_report import our_log, report, write

import race

sys.path.insert(0, str(ROOT / "records/ideas"))

import ideas  # noqa: E402
import rank  # noqa: E402


@cache
def script_at(commit):
    """train_gpt.py at a commit. Skips the test where git's history lacks it."""
    done = subprocess.run(["git", "show", f"{commit}:train_gpt.py"], cwd=ROOT, capture_output=True)
    if done.returncode:
        pytest.skip(f"git's history here lacks commit {commit}")
    return done.stdout.decode()


def patched(commit, patches, folder):
    """The path of train_gpt.py at a commit with these patches."""
    script = folder / "train_gpt.py"
    script.write_text(script_at(commit), encoding="utf-8")
    for patch in patches:
        race.apply_patch(patch, folder)
    return script


def raced_with_patches():
    """(path of race.json, what it says of a version) for every version of a record that has patches."""
    found = []
    for path in sorted((ROOT / "records").glob("*/race.json")):
        for version in json.loads(path.read_text(encoding="utf-8"))["versions"]:
            if "patches" in version:
                found.append((path, version))
    return found


@pytest.mark.parametrize("path, version", raced_with_patches(),
                         ids=lambda x: x["label"] if isinstance(x, dict) else x.parent.name)
def test_base_and_patches_of_a_record_give_the_source_in_its_logs(path, version, tmp_path):
    patches = [path.parent / patch for patch in version["patches"]]
    source = patched(version["base"], patches, tmp_path).read_text(encoding="utf-8")
    compile(source, "train_gpt.py", "exec")
    logged = report.read_log(path.parent / version["label"] / "round-01.txt").source
    if logged != source.rstrip("\n"):  # some runs had a setting in their preset instead
        for name, value in version["overrides"].items():
            source, count = re.subn(rf"\b{name.lower()}=\d+", f"{name.lower()}={value}", source)
            assert count == 1
    assert logged == source.rstrip("\n")


def import_file(path, name):
    """A Python file as a module of this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


TEXT = ideas.README.read_text(encoding="utf-8")
LIST = ideas.read_rows(TEXT)


def train_three_steps(patches, environment, folder):
    """(losses of three steps of a small model, its parameters) under these patches and settings. A parameter
    before two matrices that start at zero, as the gates are, changes in the third."""
    module = import_file(patched(ideas.BASE, patches, folder), "patched")
    preset = dict(PRESET="demo", NGRAM_ROWS="0", GATE_CHANNELS="12", WINDOW_SCHEDULE="3,7,11",
                  BATCH_TOKENS="3072", NUM_ITERATIONS="300")
    given, overrides, _ = module.read_settings(preset | environment)
    small = dict(SMALL, microbatches=1, batch_tokens=tuple(n // 48 for n in given.batch_tokens),
                 ngram_rows=given.ngram_rows and 64, ngram_dim=32)
    s = replace(given, **small)
    model = module.GPT(s, module.Kernels())
    module.init_weights(model, 0)
    optimizer = module.make_optimizer(model, 0, 1)
    tokens = np.concatenate(random_documents(1, 20))
    schedule = module.make_schedule(s)
    losses = []
    for step in (schedule[0], schedule[1], schedule[-2]):  # of the first stage, and of the last one
        model.enter_stage(step.stage)
        length = step.stage.batch_tokens
        batch = module.make_batch(tokens[:length + 1], np.array([0]), 1, length)
        losses.append(module.train_step(model, optimizer, repeat(batch), step).wait()[0])
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def base_result(tmp_path_factory):
    return train_three_steps([], {}, tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("row", LIST, ids=lambda row: row[0])
def test_an_idea_applies_trains_and_changes_what_is_learned(row, tmp_path, base_result):
    settings = dict(word.split("=") for word in ideas.settings_of(row))
    losses, parameters = train_three_steps(ideas.patches_of(row), settings, tmp_path)
    assert np.isfinite(losses).all()
    base = base_result[1]
    if parameters.keys() == base.keys():
        assert any(not torch.equal(base[name], parameters[name]) for name in base)


def test_the_list_has_at_least_20_ideas_and_6_losers_and_every_patch_in_it():
    kinds = [row[1] for row in LIST]
    assert len(LIST) >= 20 and kinds.count("loser") >= 6
    for row in LIST:
        gain = float(row[2])
        assert row[1] == ("neutral" if abs(gain) < 0.25 else "winner" if gain > 0 else "loser")
    assert {patch for row in LIST for patch in ideas.patches_of(row)} == set(ideas.FOLDER.glob("*.patch"))
    assert ideas.BASE in TEXT


def test_the_halves_of_the_list_are_those_that_the_seed_draws():
    assert ideas.fill_in(TEXT) == TEXT
    assert {row[-1] for row in LIST if row[0] in ideas.TRIED} == {"first"}
    for kind in ("winner", "loser"):
        halves = [row[-1] for row in LIST if row[1] == kind]
        assert abs(halves.count("first") - halves.count("second")) <= 1


def test_the_two_races_are_compared_idea_by_idea_and_as_ranks(tmp_path, capsys):
    """An idea that the base has is raced without it. With the signs of the big race all is right."""
    losses = {"base": (1.5, 1.52), "exclusive": (1.49, 1.5), "key-offset": (1.6, 1.63),
              "no-skip": (1.51, 1.53), "mudd": (1.45, 1.48), "one-skip": (1.5, 1.52)}
    for name, values in losses.items():
        logs = [our_log(loss, target=0.0, seed=seed) for seed, loss in enumerate(values, 1)]
        write(tmp_path / name, *logs, name="seed-{}.txt")
    assert rank.main([str(tmp_path), "--one-percent", "0.01", "--plot", str(tmp_path / "x.png")]) == 0
    shown = capsys.readouterr().out
    assert "| exclusive | winner | 2.2 | -0.0150 | 2 | right |" in shown
    assert "| key-offset | winner | 2.2 | -0.1050 | 2 | right |" in shown
    assert "| one-skip | neutral | 0.1 | +0.0000 | 2 | - |" in shown
    assert "signs right among winners: 3 of 3\nsigns right among losers: 1 of 1\n" in shown
    # the two seeds' differences are 0.01 apart for three ideas, and equal for two: sqrt(3 x 0.00005 / 5)
    assert "over seeds: 0.0055 nats" in shown
    assert "0.5 % of the steps is 0.0050 nats: an interval so wide takes 5 rounds" in shown
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert rank.main([str(tmp_path), "--half", "second"]) == 0
    assert "of 2 ideas" in capsys.readouterr().out
    assert rank.main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere/base: expected logs" in capsys.readouterr().err
    (tmp_path / "base/seed-2.txt").unlink()
    assert rank.main([str(tmp_path)]) == 1
    assert "base: expected a run with seed 2, as exclusive has, found none." in capsys.readouterr().err


def test_the_ideas_of_a_half_are_printed_as_versions_that_race_reads(capsys):
    script_at(ideas.BASE)  # skips the test where history lacks it
    assert ideas.main(["first"]) == 0
    versions = [race.read_version(text) for text in shlex.split(capsys.readouterr().out)]
    rows = [row for row in LIST if row[-1] == "first"]
    assert [version.label for version in versions] == ["base", *(row[0] for row in rows)]
    assert {version.commit for version in versions} == {ideas.BASE}
    for version, row in zip(versions[1:], rows):
        assert version.patches == ideas.patches_of(row)
        assert [f"{name}={value}" for name, value in version.overrides.items()] == ideas.settings_of(row)
