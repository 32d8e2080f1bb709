"""The simulated run: schedules that can be worked out by hand, and what holds for all of them."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.planning.schedule import Durations, Layout
from cluster.planning.simulate import simulate
from pipeline.errors import Refusal
from pipeline.segments import cut

# Seconds that do not add up to each other by chance.
LAYER = Durations(
    read=0.5, load=0.1, forward=4.0, collect=3.0, observe=1.0, solve=2.0, propagate=4.0, write=1.5, keep=0.25
)
# the forward of one micro-batch
PASS = Durations(solve=5.0, forward=1.0)


def lay_out(num_layers: int = 8, num_segments: int = 1, num_teams: int = 1, **changes: object) -> Layout:
    values: dict[str, object] = {
        "layers": (LAYER,) * num_layers,
        "segments": tuple(cut(num_layers, num_segments)),
        "num_teams": num_teams,
        "num_shards": 1,
        "num_micro_batches": 4,
        **changes,
    }
    return Layout(**values)  # type: ignore[arg-type]


def dense(num_layers: int, num_teams: int, each: Durations = PASS, num_micro_batches: int = 4) -> Layout:
    return lay_out(
        num_layers,
        num_layers,
        num_teams,
        layers=(replace(each, forward=each.forward * num_micro_batches),) * num_layers,
        is_dense=True,
        num_micro_batches=num_micro_batches,
        keep_entry_every=10**6,
    )


def test_layers_of_one_team_follow_each_other_and_reading_and_writing_go_beside() -> None:
    layout = lay_out(3, keep_entry_every=10**6, before=10.0, enter=1.0, finish=2.0)
    # the first layer is waited for, the others are read ahead; only the last write has nothing to hide behind
    assert simulate(layout).seconds == pytest.approx(10 + 1 + 0.5 + 3 * (0.1 + 3 + 1 + 2) + 2 * 4 + 1.5 + 2)


def test_a_write_that_takes_longer_than_the_pass_is_waited_for() -> None:
    slow = replace(LAYER, write=6.0)
    layout = lay_out(2, layers=(slow, slow), keep_entry_every=10**6)
    assert simulate(layout).seconds == pytest.approx(0.5 + 2 * (0.1 + 3 + 1 + 2 + 6))


@pytest.mark.parametrize(("reads_ahead", "waits"), [(True, 0.0), (False, 3.0)])
def test_the_next_layer_is_read_while_one_is_pruned_or_only_while_it_runs_after_that(
    reads_ahead: bool, waits: float
) -> None:
    slow = replace(LAYER, read=7.0)
    layout = lay_out(2, layers=(slow, slow), keep_entry_every=10**6, reads_ahead=reads_ahead)
    assert simulate(layout).seconds == pytest.approx(7 + 2 * (0.1 + 3 + 1 + 2) + 4 + waits + 1.5)


@pytest.mark.parametrize(("write", "seconds"), [(3.0, 2 * (4 + 5) + 3), (20.0, 4 + 5 + 2 * 20)])
def test_in_a_sweep_a_layer_is_written_beside_the_next_one_at_a_time(write: float, seconds: float) -> None:
    each = replace(PASS, write=write)
    assert simulate(dense(2, 1, each)).seconds == pytest.approx(seconds)
    # teams that share the layers write side by side
    assert simulate(dense(2, 2, each)).seconds == pytest.approx(1 + 4 + 5 + write)


@pytest.mark.parametrize(("enter", "measured"), [(1.0, 2.0), (None, 0.0)])
def test_a_survey_goes_through_all_layers_before_the_first_is_pruned(enter: float | None, measured: float) -> None:
    layout = lay_out(4, 4, num_teams=2, start=3.0, needs_activations=False)
    surveyed = simulate(replace(layout, survey=(measured,) * 4, survey_enter=enter))
    # by one worker, which is started for it; layers are read ahead
    waits = max(0.0, LAYER.read - LAYER.load - measured)
    expected = 3.0 + (enter or 0.0) + 0.5 + 4 * (0.1 + measured) + 3 * (0.5 if measured == 0.0 else waits)
    assert surveyed.seconds - simulate(layout).seconds == pytest.approx(expected)
    assert {span.team for span in surveyed.spans if span.stop <= expected} == {0}


@pytest.mark.parametrize("seed", range(4))
def test_a_survey_goes_on_from_what_was_measured_and_runs_layers_again_for_their_inputs(seed: int) -> None:
    layout = lay_out(1, survey=(5.0,) * 20, layers=(LAYER,) * 20, segments=tuple(cut(20, 20)), needs_activations=False)
    calm, again = (simulate(replace(layout, survey_enter=1.0), rate, seed) for rate in (0.0, 20.0))
    weights = simulate(layout, 20.0, seed)
    for schedule, begins_anew in ((calm, False), (again, True), (weights, False)):
        layers = [span.layer for span in schedule.spans if span.kind == "measuring"]
        whole = [span.layer for span in schedule.spans if span.stop - span.start == pytest.approx(5.0)]
        assert set(whole) == set(range(20)) and (begins_anew or len(whole) == 20)
        entered = sum(span.kind == "entering" for span in schedule.spans)
        assert entered == 0 or layers.count(0) == entered


def test_every_few_layers_an_input_is_kept() -> None:
    spans = simulate(lay_out(8, keep_entry_every=3)).spans
    assert [span.layer for span in spans if span.kind == "keeping"] == [3, 6]


def test_a_wave_of_as_many_teams_as_layers_takes_one_layer_and_a_micro_batch_for_each_other() -> None:
    # layer l begins when layer l - 1 has given its first micro-batch
    assert simulate(dense(5, 5)).seconds == pytest.approx(4 * 1.0 + 4 * 1.0 + 5.0)


def test_two_teams_sweep_while_the_other_solves() -> None:
    # 0: pass 0-4 solve 4-9; 1: pass 1-5 solve 5-10; then layer 2 by team 0 from 9, layer 3 by team 1 from 10
    assert simulate(dense(4, 2)).seconds == pytest.approx(10 + 4 + 5)


@pytest.mark.parametrize(("team_size", "num_ahead"), [(1, 16), (4, 4)])
def test_a_layer_does_not_run_far_ahead_of_the_next(team_size: int, num_ahead: int) -> None:
    # the second layer takes twice as long: the first stands still once 16 micro-batches of all replicas wait
    quick, slow = Durations(forward=100.0), Durations(forward=200.0)
    layout = replace(dense(2, 2, num_micro_batches=100), layers=(quick, slow), team_size=team_size)
    spans = simulate(layout).spans
    first = [span for span in spans if span.layer == 0 and span.kind == "passing on"]
    assert max(span.stop for span in first) == pytest.approx(2 * (100 - num_ahead), abs=2)


def test_shards_of_one_segment_follow_each_other_from_team_to_team() -> None:
    moving = replace(LAYER, move=0.5)
    layout = lay_out(4, num_teams=2, num_shards=2, layers=(moving,) * 4, is_sequential=True, keep_entry_every=10**6)
    alone = simulate(lay_out(4, layers=(moving,) * 4, keep_entry_every=10**6)).seconds
    # the second team reads its first layer when the hidden states have come
    assert simulate(layout).seconds == pytest.approx(alone + 4 * 0.5 + 0.5)


def test_time_is_linear_in_layers() -> None:
    seconds = [simulate(lay_out(num, keep_entry_every=4)).seconds for num in (40, 80, 120)]
    assert seconds[2] - seconds[1] == pytest.approx(seconds[1] - seconds[0])


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))
def test_more_teams_are_never_slower_in_dense(num_layers: int, num_teams: int, num_micro_batches: int) -> None:
    fewer, more = (
        simulate(dense(num_layers, teams, num_micro_batches=num_micro_batches)).seconds
        for teams in (num_teams, num_teams + 1)
    )
    assert more <= fewer + 1e-9


@given(st.integers(0, 50), st.floats(1, 200))
def test_a_failure_never_makes_it_faster(seed: int, failures_per_hour: float) -> None:
    layout = lay_out(8, start=3.0)
    calm = simulate(layout)
    try:
        stormy = simulate(layout, failures_per_hour, seed)
    except Refusal:
        return
    assert stormy.seconds >= calm.seconds and (stormy.num_failures > 0 or stormy.seconds == calm.seconds)


@pytest.mark.parametrize("seed", range(4))
def test_after_a_failure_layers_are_run_again_from_the_last_kept_input_on(seed: int) -> None:
    spans = simulate(lay_out(12, keep_entry_every=4, enter=1.0), failures_per_hour=60, seed=seed).spans
    entered_at = None
    for span in spans:
        entered_at = span.layer if span.kind == "entering" else entered_at
        if span.kind == "replaying":
            assert entered_at is not None and entered_at % 4 == 0 and entered_at <= span.layer < entered_at + 3


def test_teams_are_never_busy_with_two_things_at_once() -> None:
    for layout in (lay_out(8, 4, 3), dense(9, 4), lay_out(8, num_teams=2, num_shards=4, is_sequential=True)):
        spans = simulate(layout, failures_per_hour=40).spans
        for team in {span.team for span in spans}:
            own = sorted((span for span in spans if span.team == team), key=lambda span: span.start)
            assert all(a.stop <= b.start + 1e-9 for a, b in itertools.pairwise(own))


@pytest.mark.parametrize("failures_per_hour", [1e6, 720.0])
def test_workers_that_fail_as_often_as_the_driver_stops_at_get_nowhere_and_it_is_said(failures_per_hour: float) -> None:
    # every 5 seconds, where a layer takes 8
    with pytest.raises(Refusal, match="some fail 3 times in a row before a layer is committed"):
        simulate(lay_out(20), failures_per_hour)


def test_a_thousand_teams_take_seconds() -> None:
    schedule = simulate(dense(1000, 1000, num_micro_batches=16))
    assert schedule.num_teams == 1000 and schedule.seconds == pytest.approx(999 + 16 + 5)
