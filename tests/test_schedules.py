"""Learning rate, momentum and windows at their corners."""

from dataclasses import replace

import pytest

import train_gpt

RACE = train_gpt.Settings()  # 1705 steps


def of_length(steps, **others):
    return replace(RACE, num_iterations=steps, **others)


# ---------------------------------------------------------------------------------------------------
# Learning rate


def test_the_learning_rate_is_constant_for_55_percent_of_the_run():
    assert {train_gpt.lr_scale(step, RACE) for step in range(938)} == {1.0}  # 0.55 x 1705 = 937.75
    assert train_gpt.lr_scale(938, RACE) < 1.0


@pytest.mark.parametrize("step, scale", [(0, 1.0), (55, 1.0), (64, 0.82), (73, 0.64), (99, 0.12), (100, 0.1)])
def test_the_learning_rate_falls_linearly_to_a_tenth(step, scale):
    """Of 100 steps, the 45 from 55 to 100 take 0.9 off it: 0.02 a step."""
    assert train_gpt.lr_scale(step, of_length(100)) == pytest.approx(scale, abs=1e-12)


def test_the_cooldown_of_the_race_is_a_straight_line_from_1_to_a_tenth():
    for step in range(938, 1706):
        expected = 1 - 0.9 * (step / 1705 - 0.55) / 0.45
        assert train_gpt.lr_scale(step, RACE) == pytest.approx(expected, abs=1e-12)


def test_where_the_cooldown_starts_and_ends_are_settings():
    s = of_length(10, cooldown_frac=0.2, final_lr_frac=0.5)
    assert [train_gpt.lr_scale(step, s) for step in (0, 8, 9, 10)] == pytest.approx([1.0, 1.0, 0.75, 0.5])


def test_no_cooldown_keeps_the_learning_rate_to_the_end():
    assert {train_gpt.lr_scale(step, of_length(10, cooldown_frac=0.0)) for step in range(11)} == {1.0}


def test_a_cooldown_as_long_as_the_run_falls_from_the_first_step():
    scales = [train_gpt.lr_scale(step, of_length(9, cooldown_frac=1.0)) for step in range(10)]
    assert scales == pytest.approx([1 - step / 10 for step in range(10)])


# ---------------------------------------------------------------------------------------------------
# Momentum


@pytest.mark.parametrize(
    "step, momentum",
    [
        (0, 0.85),
        (30, 0.86),
        (150, 0.90),
        (299, 0.85 + 0.1 * 299 / 300),
        (300, 0.95),
        (301, 0.95),
        (1704, 0.95),
    ],
)
def test_momentum_warms_linearly_from_085_to_095_over_300_steps(step, momentum):
    assert train_gpt.muon_momentum(step, RACE) == pytest.approx(momentum, abs=1e-12)


def test_the_warming_of_momentum_does_not_depend_on_the_length_of_the_run():
    assert train_gpt.muon_momentum(30, of_length(40)) == train_gpt.muon_momentum(30, RACE)


def test_momentum_without_a_warm_up_is_the_final_one_at_once():
    assert train_gpt.muon_momentum(0, of_length(10, muon_momentum_steps=0)) == 0.95


# ---------------------------------------------------------------------------------------------------
# Windows

# long and short windows of the stages 3, 7 and 11: ws x 128 and (ws // 2) x 128
STAGES = [(384, 128), (896, 384), (1408, 640)]


@pytest.mark.parametrize(
    "step, stage", [(0, 0), (1, 0), (568, 0), (569, 1), (1137, 1), (1138, 2), (1704, 2), (1705, 2)]
)
def test_the_windows_of_the_race_grow_at_each_third(step, stage):
    """1706 steps with the one that only validates: 568.67 a stage."""
    assert train_gpt.attention_windows(step, RACE) == STAGES[stage]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 11, 100])
def test_the_stage_is_floor_of_3_step_over_steps_plus_1(steps):
    for step in range(steps + 1):
        stage = next(n for n in (2, 1, 0) if n * (steps + 1) <= 3 * step)  # without a division
        assert train_gpt.attention_windows(step, of_length(steps)) == STAGES[stage]


def test_the_window_schedule_and_its_unit_are_settings():
    s = of_length(3, window_schedule="2,5", window_block=10)
    assert [train_gpt.attention_windows(step, s) for step in range(4)] == [(20, 10)] * 2 + [(50, 20)] * 2


@pytest.mark.parametrize("steps", [2, 5, 100, 1705])
def test_the_warm_up_visits_every_window_that_the_run_will_use(steps):
    s = of_length(steps)
    visited = train_gpt.window_steps(s)
    assert [train_gpt.attention_windows(step, s) for step in visited] == STAGES
    assert all(0 <= step <= steps for step in visited)


def test_the_warm_up_of_a_run_too_short_for_a_stage_leaves_it_out():
    """One step and its validation: stages 0 and 1 (of 0 x 3 / 2 and 1 x 3 / 2)."""
    s = of_length(1)
    assert [train_gpt.attention_windows(step, s) for step in train_gpt.window_steps(s)] == STAGES[:2]
