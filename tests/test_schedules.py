"""Learning rate, momentum and windows at their corners."""

from dataclasses import replace

import pytest

import train_gpt

RACE = train_gpt.Settings()  # 1705 steps
WINDOWS = [(384, 128), (896, 384), (1408, 640)]  # 3, 7 and 11 times 128 tokens, and their halves


@pytest.mark.parametrize("step, changes, scale", [
    (937, {}, 1.0),  # 55 % of 1705 steps are 937.75
    (938, {}, 1 - 0.9 * (938 / 1705 - 0.55) / 0.45),
    (1705, {}, 0.1),
    (9, dict(num_iterations=10, cooldown_frac=0.2, final_lr_frac=0.5), 0.75),
    (10, dict(num_iterations=10, cooldown_frac=0.0), 1.0),
    (1, dict(num_iterations=9, cooldown_frac=1.0), 0.9),
])
def test_the_learning_rate_is_constant_and_then_falls_linearly_to_the_last_step(step, changes, scale):
    assert train_gpt.lr_scale(step, replace(RACE, **changes)) == pytest.approx(scale, abs=1e-12)


@pytest.mark.parametrize("step, momentum",
                         [(0, 0.85), (150, 0.9), (299, 0.85 + 0.1 * 299 / 300), (301, 0.95)])
def test_momentum_grows_linearly_over_300_steps_of_a_run_of_any_length(step, momentum):
    for s in (RACE, replace(RACE, num_iterations=40)):
        assert train_gpt.muon_momentum(step, s) == pytest.approx(momentum, abs=1e-12)
    assert train_gpt.muon_momentum(step, replace(RACE, muon_momentum_steps=0)) == 0.95


@pytest.mark.parametrize("step, stage", [(0, 0), (568, 0), (569, 1), (1137, 1), (1138, 2), (1705, 2)])
def test_the_windows_grow_at_each_third_of_the_run(step, stage):
    """1706 steps, with the one that only validates: 568.67 a stage."""
    assert train_gpt.attention_windows(step, RACE) == WINDOWS[stage]


def test_the_window_schedule_and_its_unit_are_settings():
    s = replace(RACE, num_iterations=3, window_schedule="2,5", window_block=10)
    assert [train_gpt.attention_windows(step, s) for step in range(4)] == [(20, 10)] * 2 + [(50, 20)] * 2
