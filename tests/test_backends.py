"""backends/: the contract of an executor, the table of them, and what every one of them is held to."""

import inspect
import typing
from typing import Any

import pytest

import backends
import launch
import profiles
from backends import Status
from runs import Run, load_run
from tests import support
from tests.layout import REPO
from transport import LIMITS, Refusal

FUNCTIONS = ("check", "submit", "follow", "logs", "status", "cancel", "probe", "jobs", "adopt")
EXECUTORS = sorted(backends.BACKENDS)


def test_the_protocol_has_these_functions_and_can() -> None:
    declared = {name for name, value in vars(backends.Backend).items() if inspect.isfunction(value) and name[0] != "_"}
    assert declared == set(FUNCTIONS)
    assert typing.get_type_hints(backends.Backend) == {"CAN": set[str]}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_executor_keeps_the_contract(executor: str, function: str) -> None:
    """The same names in the same order, of the same types, and the same result."""
    module = backends.backend(executor)
    wanted, found = getattr(backends.Backend, function), getattr(module, function)
    assert inspect.isfunction(found) and found.__module__ == backends.BACKENDS[executor]
    parameters = list(inspect.signature(found).parameters.values())
    assert [(one.name, one.kind, one.default) for one in parameters] == [
        (one.name, one.kind, one.default) for one in list(inspect.signature(wanted).parameters.values())[1:]]
    assert typing.get_type_hints(found) == typing.get_type_hints(wanted)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_an_executor_can_is_declared(executor: str) -> None:
    can = backends.backend(executor).CAN
    assert isinstance(can, set) and can <= {"detach", "chain", "ray"}


def test_there_is_a_backend_a_limit_and_a_list_of_keys_for_each() -> None:
    assert set(LIMITS) == set(backends.BACKENDS)
    assert set(profiles.CLOUDS) <= set(LIMITS)
    assert set(profiles.REQUIRED) <= set(LIMITS)


def test_the_folder_holds_the_executors_and_common_only() -> None:
    found = {path.name for path in (REPO / "backends").iterdir() if path.name != "__pycache__"}
    assert found == {"__init__.py", "common"} | {name + ".py" for name in EXECUTORS}
    assert {name: "backends." + name for name in EXECUTORS} == backends.BACKENDS


def test_an_executor_that_there_is_none_for() -> None:
    with pytest.raises(Refusal, match="executor skypilot can only make dry runs") as caught:
        backends.backend("skypilot")
    assert caught.value.code == 2 and all(name in caught.value.fix for name in EXECUTORS)


# ---------------------------------------------------------------- what any of them is held to


class Stub:
    """A backend whose platform says what the test wants."""

    CAN: typing.ClassVar[set[str]] = set()

    def __init__(self, said: Status) -> None:
        self.said, self.asked = said, 0

    def status(self, run: Run) -> Status:
        self.asked += 1
        return self.said


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """Puts a Stub in the place of every backend."""
    monkeypatch.setenv("AIRLIFT_HOME", str(tmp_path))

    def put(said: Status) -> Stub:
        made = Stub(said)
        monkeypatch.setattr(backends, "backend", lambda executor: made)
        return made

    return put


def run_of(**fields: Any) -> Run:
    return Run("t23456", "fam/train", "p", "local", 1, "0" * 64, **fields)


def test_how_a_run_ended_is_remembered_and_not_asked_for_again(stub: Any) -> None:
    made = stub(Status("failed", "Failed", 37))
    run = run_of()
    assert backends.status(run) == backends.status(load_run("t23456")) == Status("failed", "Failed", 37)
    assert made.asked == 1 and load_run("t23456").job_exit_code == 37


@pytest.mark.parametrize("said", [Status("running", "Running"), Status("failed", backends.GONE, gone=True)])
def test_what_is_not_the_end_or_only_concluded_is_asked_for_again(stub: Any, said: Status) -> None:
    made = stub(said)
    run = run_of()
    assert backends.status(run) == backends.status(run) == said
    assert made.asked == 2 and run.ended is None


def test_the_end_is_waited_for_but_not_for_ever(monkeypatch: Any) -> None:
    clock = [0.0]
    states = iter([Status("waiting"), Status("running"), Status("done")])
    monkeypatch.setattr(backends.time, "sleep", lambda seconds: clock.append(clock[-1] + seconds))
    monkeypatch.setattr(backends.time, "monotonic", lambda: clock[-1])
    assert backends.stop_and_wait("job 7", lambda: next(states), list) == "job 7 was cancelled"
    said = backends.stop_and_wait("job 7", lambda: Status("running", "RUNNING"), list)
    assert said == "job 7 was told to stop, and is still RUNNING" and 60 <= clock[-1] <= 63


def test_what_a_backend_cannot_is_refused_in_one_place(stub: Any) -> None:
    from jobs import Job

    stub(Status("done"))
    ray = Job("t23456", "a/b", "local", 2, 0, 1, None, {}, support.job(nodes=2, launch="ray", cluster="pods"), {})
    with pytest.raises(Refusal, match="--detach is not supported by executor local"):
        backends.require(ray, False)
    made = stub(Status("done"))
    made.CAN = {"detach", "ray"}
    backends.require(ray, False)
    with pytest.raises(Refusal, match="--detach is not possible with several stages on local"):
        backends.require(ray, False, True)
    made.CAN.add("chain")
    backends.require(ray, False, True)
    made.CAN = set()
    with pytest.raises(Refusal, match="a Ray recipe on 2 nodes is not supported by executor local"):
        backends.require(ray, True)


def test_a_run_of_an_executor_that_is_gone_is_two_lines(monkeypatch: Any, tmp_path: Any, capsys: Any) -> None:
    monkeypatch.setenv("AIRLIFT_HOME", str(tmp_path))
    run = run_of()
    run.executor = "skypilot"
    run.save()
    assert launch.main(["status", "t23456"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_an_answer_about_another_job_is_none():
    backends.require_about("job", "mine", "mine")
    backends.require_about("job", "mine", None)  # not every installation says it
    with pytest.raises(Refusal) as caught:
        backends.require_about("job", "mine", "yours")
    assert (caught.value.code, caught.value.what) == (5, "the answer about job mine is about another")
