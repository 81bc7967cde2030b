"""A study of many processes: no trial is lost, repeated or left without a reason, whatever happens to those that run them."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from experiments.benchmarks.check_sweep import programs, server
from experiments.sweep.space import distributions
from experiments.sweep.study import ATTEMPTS, Study

SPACE: dict[str, Any] = {
    "model.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "model.width": [8, 16],
    "model.lstm_layers": {"low": 1, "high": 2},
}
SETTINGS = {"space": SPACE, "direction": "max", "sampler_seed": 0, "warmup": 1, "config": "patience: 3\n"}


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a PostgreSQL server that runs for these tests."""
    pytest.importorskip("psycopg")
    if programs() is None:
        pytest.skip("PostgreSQL is not installed: initdb is not found")
    folder = Path("/tmp") / f"ehr-test-{os.getpid()}"  # a folder that another user, as whom the server runs, can reach
    try:
        with server(folder) as url:
            yield url
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["journal", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "journal":
        return str(tmp_path / "study.journal")
    return str(request.getfixturevalue("postgresql"))


@pytest.fixture
def study(storage: str, request: pytest.FixtureRequest) -> Iterator[Callable[[], Study]]:
    """Makes a handle of one and the same study, as another process would hold it."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(Study(request.node.name, storage, SETTINGS))


def eventually(get: Callable[[], Any], seconds: float = 10) -> Any:
    """What ``get`` gives as soon as it gives anything: a server notices within moments, not at once, that a connection is gone."""
    limit = time.monotonic() + seconds
    while not (found := get()) and time.monotonic() < limit:
        time.sleep(0.01)
    assert found
    return found


def claimed(one: Study, total: int) -> optuna.Trial:
    trial = one.claim(total)
    assert trial is not None
    return trial


def die(one: Study) -> None:
    """What the kernel and the server do when a process is killed."""
    one._locks.close()


# ---- the study -------------------------------------------------------------------------------------------------------------


def test_processes_draw_different_trials(study: Callable[[], Study]) -> None:
    handles = [study() for _ in range(4)]
    claimed = [one.claim(6) for one in handles]
    assert [t.number for t in claimed if t] == [0, 1, 2, 3]
    assert len({json.dumps(t.params) for t in claimed if t}) == 4  # although they share one seed
    for t in claimed:
        assert t is not None
        assert (
            1e-4 <= t.params["model.learning_rate"] <= 1e-1
            and t.params["model.width"] in (8, 16)
            and t.params["model.lstm_layers"] in (1, 2)
        )


def test_draws_depend_on_seed_and_number_alone(tmp_path: Path) -> None:
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        one = Study(name, str(tmp_path / f"{name}.journal"), {**SETTINGS, "sampler_seed": seed})
        for _ in range(3):
            trial = claimed(one, 3)
            one.end(trial, TrialState.COMPLETE, 1.0)
        drawn.append([t.params for t in one.trials()])
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_trial_whose_process_died_goes_on_elsewhere(study: Callable[[], Study]) -> None:
    first, second = study(), study()
    one, other = first.claim(2), second.claim(2)
    assert one is not None and other is not None
    first.report(one, 0, 0.5)
    assert second.claim(2) is None  # two in all, and the first is alive
    assert not second.finished(2)
    die(first)
    again = eventually(lambda: second.claim(2))
    assert again.number == one.number and again.params == one.params
    second.report(again, 0, 0.9)  # the epoch is known already
    second.report(again, 1, 0.6)
    assert second.trials()[again.number].intermediate_values == {0: 0.5, 1: 0.6}
    second.end(again, TrialState.COMPLETE, 0.6)
    second.end(other, TrialState.PRUNED)
    assert second.finished(2) and second.claim(2) is None
    assert second.best(second.trials()).number == again.number  # type: ignore[union-attr]


def test_a_process_that_lost_its_connection_gives_its_trial_up(postgresql: str) -> None:
    with Study("lost", postgresql, SETTINGS) as first, Study("lost", postgresql, SETTINGS) as second:
        one = claimed(first, 1)
        die(first)
        other = eventually(lambda: second.claim(1))
        with pytest.raises(Exception, match="closed"):
            first.report(one, 0, 0.5)
        with pytest.raises(Exception, match="closed"):
            first.end(one, TrialState.COMPLETE, 0.5)
        second.end(other, TrialState.COMPLETE, 0.7)
        assert second.trials()[0].value == 0.7


def test_a_trial_that_kills_its_processes_is_given_up(study: Callable[[], Study]) -> None:
    for attempt in range(ATTEMPTS):
        one = study()
        assert eventually(lambda one=one: one.claim(1)).number == 0, attempt
        die(one)
    last = study()
    eventually(lambda: last.claim(1) is None or last.finished(1))
    assert last.trials()[0].state == TrialState.FAIL
    assert f"killed {ATTEMPTS} times in the same epoch" in last.trials()[0].user_attrs["reason"]


def test_progress_and_intention_do_not_count_as_attempts(study: Callable[[], Study]) -> None:
    for epoch in range(2 * ATTEMPTS):
        one = study()
        trial = eventually(lambda one=one: one.claim(1))
        if epoch % 2:
            one.report(trial, epoch, 0.5)
        else:
            one.release_without_penalty(trial)
        die(one)
    assert study().trials()[0].state == TrialState.RUNNING


def test_a_study_with_other_settings_is_refused(
    study: Callable[[], Study], storage: str, request: pytest.FixtureRequest
) -> None:
    study()
    with pytest.raises(ValueError, match=r"begun with another config:\n  --patience: 3 there, 4 here\n"):
        Study(request.node.name, storage, {**SETTINGS, "config": "patience: 4\n"})


def test_settings_that_change_no_result_are_the_same_study(tmp_path: Path) -> None:
    """Also an option that a release adds, and one that is as it is by default."""
    for config in ("seed: 0\n", "seed: 0\nruns: elsewhere\npatience: 10\n", "trainer: {max_epochs: 30}\n"):
        Study("s", str(tmp_path / "study.journal"), {**SETTINGS, "config": config})


def _divided(devices: int, batch: int) -> str:
    data = f"data: {{class_path: EICU, init_args: {{batch_size: {batch}}}}}"
    return f"{data}\ntrainer: {{devices: {devices}}}\n"


def test_the_same_batches_on_other_devices_are_the_same_study(tmp_path: Path) -> None:
    storage = str(tmp_path / "study.journal")
    for devices, batch in ((1, 32), (2, 16), (4, 8)):
        Study("s", storage, {**SETTINGS, "config": _divided(devices, batch)})
    with pytest.raises(
        ValueError, match=r"--trainer.devices: 1 there, 2 here\n.*--data.batch_size times --trainer.devic"
    ):
        Study("s", storage, {**SETTINGS, "config": _divided(2, 32)})
    terms = {**SETTINGS, "space": {"data.batch_size": [8, 16]}}
    Study("drawn", storage, {**terms, "config": _divided(1, 32)})
    with pytest.raises(ValueError, match="the batches that --space names are those of one device"):
        Study("drawn", storage, {**terms, "config": _divided(2, 16)})


# ---- repeated configurations -------------------------------------------------------------------------------------------------

ONE_CHOICE = {**SETTINGS, "space": {"model.width": [8]}}


@pytest.mark.parametrize(
    ("state", "result", "value", "reason"),
    [
        (TrialState.COMPLETE, TrialState.COMPLETE, 0.7, None),
        (TrialState.PRUNED, TrialState.PRUNED, None, "same configuration as trial 0"),
        (TrialState.FAIL, TrialState.PRUNED, None, "same configuration as trial 0"),
        (TrialState.RUNNING, TrialState.PRUNED, None, "same configuration as trial 0"),
    ],
)
def test_a_configuration_is_not_trained_twice(
    state: TrialState, result: TrialState, value: float | None, reason: str | None, tmp_path: Path
) -> None:
    storage = str(tmp_path / "study.journal")
    with Study("s", storage, ONE_CHOICE) as first, Study("s", storage, ONE_CHOICE) as second:
        trial = claimed(first, 4)
        trial.set_user_attr("run", "runs/s/trial-0000")
        if state != TrialState.RUNNING:
            first.end(trial, state, 0.7 if state == TrialState.COMPLETE else None)
        assert second.claim(4) is None  # the other three have ended meanwhile
        others = second.trials()[1:]
        assert [t.state for t in others] == [result] * 3 and [t.value for t in others] == [value] * 3
        assert all(t.user_attrs["repeats"] == 0 and t.user_attrs.get("reason") == reason for t in others)
        assert all(t.user_attrs.get("run") == (value and "runs/s/trial-0000") for t in others)
        assert second.finished(4) == (state != TrialState.RUNNING)


def test_a_repeat_that_lost_its_process_is_not_trained_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = str(tmp_path / "study.journal")
    with Study("s", storage, ONE_CHOICE) as first:
        first.end(claimed(first, 2), TrialState.COMPLETE, 0.7)
        monkeypatch.setattr(first, "_ended_as_repeat", lambda *_: False)  # killed just before it
        claimed(first, 2)
    with Study("s", storage, ONE_CHOICE) as second:
        assert second.claim(2) is None and second.trials()[1].user_attrs["repeats"] == 0


def test_repeats_of_failures_are_no_sign_of_life(tmp_path: Path) -> None:
    space = {"model.width": [1, 2, 3, 4, 5, 6]}
    with (
        Study("s", str(tmp_path / "study.journal"), {**SETTINGS, "space": space}) as one,
        pytest.raises(ValueError, match="the first 5 trials all failed"),
    ):
        while trial := one.claim(200):
            one.end(trial, TrialState.FAIL, reason="no such column")
    assert any("repeats" in t.user_attrs for t in one.trials())


@pytest.mark.parametrize(("direction", "best"), [("max", 0.8), ("min", 0.6)])
def test_infinity_is_never_the_best(direction: str, best: float, tmp_path: Path) -> None:
    one = Study("s", str(tmp_path / "study.journal"), {**SETTINGS, "direction": direction})
    for value in (0.6, float("inf"), 0.8, float("-inf")):
        trial = claimed(one, 4)
        one.report(trial, 0, value)
        one.report(trial, 1, float("nan"))
        one.end(trial, TrialState.COMPLETE, value)
    assert one.best(one.trials()).value == best  # type: ignore[union-attr]
    assert one.trials()[1].intermediate_values == {}


def test_first_trials_that_all_fail_end_the_study(study: Callable[[], Study]) -> None:
    one = study()
    for _ in range(5):
        trial = claimed(one, 40)
        one.end(trial, TrialState.FAIL, reason="no such column")
    with pytest.raises(ValueError, match="the first 5 trials all failed, the last because: no such column"):
        one.claim(40)


def test_pruning_sees_the_epochs_of_other_processes(study: Callable[[], Study]) -> None:
    one, other = study(), study()
    for value in (0.7, 0.8, 0.9, 0.7, 0.8):
        trial = claimed(one, 9)
        for epoch in range(4):
            one.report(trial, epoch, value)
        one.end(trial, TrialState.COMPLETE, value)
    trial = claimed(other, 9)
    other.report(trial, 0, 0.1)  # too early to judge
    with pytest.raises(optuna.TrialPruned):
        other.report(trial, 1, 0.1)


def test_half_a_line_in_the_journal_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    one = Study("s", str(path), SETTINGS)
    trial = claimed(one, 2)
    with path.open("ab") as journal:
        journal.write(b'{"op_code":5,"trial' + b"x" * 10_000)
    one.end(trial, TrialState.COMPLETE, 1.0)
    assert Study("s", str(path), SETTINGS).trials()[0].value == 1.0
    assert all(json.loads(line) for line in path.read_text().splitlines())


# ---- search space ------------------------------------------------------------------------------------------------------------


def test_space() -> None:
    found = distributions(
        {**SPACE, "model.dropout": {"low": 0.0, "high": 0.5, "step": 0.1}, "model.pos_weight": [None, 1]}
    )
    assert found == {
        "model.learning_rate": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
        "model.width": optuna.distributions.CategoricalDistribution([8, 16]),
        "model.lstm_layers": optuna.distributions.IntDistribution(1, 2),
        "model.dropout": optuna.distributions.FloatDistribution(0.0, 0.5, step=0.1),
        "model.pos_weight": optuna.distributions.CategoricalDistribution([None, 1]),
    }
