"""The schedule: stages, learning rate, momentum and windows at their corners."""

from dataclasses import replace

import pytest

import train_gpt

RACE = train_gpt.Settings()  # 1705 steps
WINDOWS = [(384, 128), (896, 384), (1408, 640)]  # 3, 7 and 11 times 128 tokens, and their halves


@pytest.mark.parametrize("number, changes, factor", [
    (937, {}, 1.0),  # 55 % of 1705 steps are 937.75
    (938, {}, 1 - 0.9 * (938 / 1705 - 0.55) / 0.45),
    (1705, {}, 0.1),
    (9, dict(num_iterations=10, cooldown_frac=0.2, final_lr_frac=0.5), 0.75),
    (10, dict(num_iterations=10, cooldown_frac=0.0), 1.0),
    (1, dict(num_iterations=9, cooldown_frac=1.0), 0.9),
    # from the factor of the stage down to the same end: 2 (1 - q) + 0.1 q with q = 0.5
    (15, dict(num_iterations=20, cooldown_frac=0.5, window_schedule=(3,), stage_lr_factors=(1.0, 2.0)), 1.05),
])
def test_the_learning_rate_is_constant_and_then_falls_linearly_to_the_last_step(number, changes, factor):
    schedule = train_gpt.make_schedule(replace(RACE, **changes))
    assert schedule[number].number == number
    assert schedule[number].lr_factor == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("number, momentum",
                         [(0, 0.85), (150, 0.9), (299, 0.85 + 0.1 * 299 / 300), (301, 0.95)])
def test_momentum_grows_linearly_over_300_steps(number, momentum):
    assert train_gpt.make_schedule(RACE)[number].momentum == pytest.approx(momentum, abs=1e-12)
    at_once = train_gpt.make_schedule(replace(RACE, muon_momentum_steps=0))
    assert at_once[number].momentum == 0.95


@pytest.mark.parametrize("number, stage", [(0, 0), (568, 0), (569, 1), (1137, 1), (1138, 2), (1705, 2)])
def test_the_windows_grow_at_each_third_of_the_run(number, stage):
    """1706 steps, with the one that only validates: 568.67 a stage."""
    found = train_gpt.make_schedule(RACE)[number].stage
    assert (found.long_window, found.short_window) == WINDOWS[stage]


def test_a_setting_with_several_values_has_one_for_each_stage_and_one_value_holds_for_all():
    s = replace(RACE, num_iterations=4, window_schedule=(2, 5), window_block=10, batch_tokens=(128, 256),
                max_seq_len=(7,), stage_starts=(0, 3), stage_lr_factors=(1.0, 1.5))
    first = train_gpt.Stage(0, 128, 7, 20, 10, 1.0, (20,))
    second = train_gpt.Stage(3, 256, 7, 50, 20, 1.5, (20, 50))
    assert train_gpt.make_stages(s) == [first, second]
    assert [step.stage for step in train_gpt.make_schedule(s)] == [first] * 3 + [second] * 2


def test_the_weights_of_later_tokens_hold_in_a_stage_that_is_only_validated():
    frontier = replace(train_gpt.Settings(), **train_gpt.PRESETS["frontier"])
    one_stage = dict(window_schedule=(3,), batch_tokens=(131_072,), max_seq_len=(896,),
                     stage_lr_factors=(1.0,))
    s = replace(frontier, num_iterations=10, extension_steps=0, **one_stage)
    *steps, last = train_gpt.make_schedule(s)
    assert steps[0].token_weights == (1.0, 0.5, 0.25) and last.token_weights == (1.0, 0.5, 0.0)
    fading = [0.25 * (1 - i / 10) for i in range(10)]
    assert [step.token_weights[2] for step in steps] == pytest.approx(fading)


def test_a_run_that_is_shorter_than_its_stages_leaves_some_out():
    schedule = train_gpt.make_schedule(replace(RACE, num_iterations=1))
    assert [step.stage.long_window for step in schedule] == [384, 896]
