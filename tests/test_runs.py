"""runs.py: the file of a run, kept and read again, also that of version 1.0; and what a run carries, as SHA-256s."""

import hashlib
import json
import re
import time

import inside
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout import write

import backends
import runs
import state
from runs import Run
from transport import Entry, Refusal, Tree


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Airlift's own state, which is not there yet."""
    monkeypatch.setenv("AIRLIFT_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def run_of(**fields):
    return Run(**{"id": "t23456", "recipe": "nano3/sft", "profile": "p", "executor": "local", "nodes": 2,
                  "sha256": "0" * 64} | fields)


# ---------------------------------------------------------------- kept and read again


def test_what_is_saved_is_read_again(home):
    run = run_of(ranks=[0, 1], retries=2, outputs="/shared/nano3", record={"deep": {"a": [1, "é"]}},
                 origin=runs.Origin(repo_root="/r", env_file="/dev/null", config=None, overrides=["run.env.scope=x"]))
    run.running_since = run.running_since or time.time()
    seen = run.running_since
    run.keep({"job": "7"})
    assert runs.load_run("t23456") == run
    run.running_since = run.running_since or time.time()
    assert (run.running_since, run.starts, run.record) == (seen, 3, {"deep": {"a": [1, "é"]}, "job": "7"})


def test_the_file_is_private_and_whole_at_any_time(home):
    run = run_of(carries={"src/a.py": "0" * 64})
    run.save()
    files = sorted((home / "runs").iterdir())
    assert [path.name for path in files] == ["t23456.files", "t23456.json"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert (home / "runs").stat().st_mode & 0o777 == 0o700
    before = files[1].stat().st_ino
    run.save()
    assert files[1].stat().st_ino != before  # written beside it and renamed


def test_what_a_run_carries_is_kept_in_a_file_beside(home):
    tree = Tree((Entry("src/a.py", b"pass\n"), Entry("src/run.sh", b"echo\n", executable=True),
                 Entry("src/to", b"a.py", link=True)))
    prints = runs.fingerprints(tree)
    assert prints == {"src/a.py": hashlib.sha256(b"pass\n").hexdigest(), "src/to": "-> a.py",
                      "src/run.sh": hashlib.sha256(b"echo\n").hexdigest() + " x"}
    run = run_of(carries=prints)
    run.save()
    assert "src/a.py" not in (home / "runs/t23456.json").read_text()
    run = runs.load_run("t23456")
    assert run.files() == prints
    run.save()  # changes nothing of it
    assert runs.load_run("t23456").files() == prints


@pytest.mark.parametrize("harm", [None, b"", b"not zlib", b"x\x9c\x03\x00\x00\x00\x00\x01"])
def test_what_a_run_carries_may_be_gone(home, harm):
    run = run_of(carries={"src/a.py": "0" * 64})
    run.save()
    path = home / "runs/t23456.files"
    path.unlink() if harm is None else path.write_bytes(harm)
    with pytest.raises(Refusal, match="the list of files of run t23456 cannot be read") as caught:
        run.files()
    assert str(path) in caught.value.what


def test_a_run_that_never_was_is_forgotten_whole(home):
    run = run_of(carries={"src/a.py": "0" * 64})
    run.save()
    run_of(id="other2").save()
    run.forget()
    assert [path.name for path in (home / "runs").iterdir()] == ["other2.json"]
    run.forget()  # again is no error


def test_all_runs_come_newest_first(home):
    assert runs.all_runs() == ([], [])
    for number, name in enumerate(["b23456", "c23456", "a23456"]):
        run_of(id=name, started=100.0 + number).save()
    assert [run.id for run in runs.all_runs()[0]] == ["a23456", "c23456", "b23456"]


@pytest.mark.parametrize("name", ["zzzzzz", "", "../t23456", "t23456.json", "T23456", "t23456\n", "t\0"])
def test_a_run_that_is_not_there(home, name):
    run_of().save()
    with pytest.raises(Refusal, match="there is no run"):
        runs.load_run(name)


def test_ids_begin_with_a_letter_and_are_many():
    made = {runs.new_run_id() for _ in range(500)}
    assert len(made) == 500 and all(re.fullmatch("[a-z][a-z2-9]{5}", one) for one in made)


# ---------------------------------------------------------------- version 1.0

OLD = {  # as version 1.0 wrote it
    "run": "k3f9qa", "recipe": "nano3/sft", "profile": "lepton", "executor": "lepton", "nodes": 2, "sha256": "ab" * 32,
    "started": 1700000000.5, "job_exit_code": None, "ended": None,
    "record": {"ranks": [0, 1], "outputs": "/shared/airlift/nano3", "retries": 3, "running_since": 1700000060.0,
               "again": {"repo_root": "/home/me/Nemotron", "env_file": "/dev/null", "config": "tiny", "overrides": []},
               "name": "nano3-sft-k3f9qa", "url": "https://host/api", "ca_bundle": None}}
RECORD = {"name": "nano3-sft-k3f9qa", "url": "https://host/api", "ca_bundle": None}  # what is the backend's own


def old(home, **changes):
    return write(home / "runs/k3f9qa.json", json.dumps(OLD | changes, indent=1))


def test_a_run_of_version_1_0_is_read_as_one_of_today(home):
    path = old(home)
    run = runs.load_run("k3f9qa")
    assert run == Run("k3f9qa", "nano3/sft", "lepton", "lepton", 2, "ab" * 32, 1700000000.5, 1700000060.0, retries=3,
                      ranks=[0, 1], outputs="/shared/airlift/nano3", origin=OLD["record"]["again"], record=RECORD)
    assert run.starts == 4 and json.loads(path.read_text()) == OLD  # a look changes nothing
    run.save()
    assert "run" not in json.loads(path.read_text()) and runs.load_run("k3f9qa") == run


def test_one_that_never_ran_and_has_no_more_than_it_must(home):
    """What was not in its record is as it is for a run of today."""
    old(home, record={})
    run = runs.load_run("k3f9qa")
    assert (run.ranks, run.outputs, run.retries, run.running_since, run.origin, run.record) == (
        [0], None, 0, None, None, {})


def test_one_that_has_ended_is_shown_without_asking_its_platform(home, capsys):
    old(home, ended=["failed", "Failed"], job_exit_code=37)
    run_of(id="n23456", started=time.time(), ended=["done", "exit code 0"], job_exit_code=0).save()
    assert backends.status(runs.load_run("k3f9qa")) == backends.Status("failed", "Failed", 37)
    code, out, err = inside.speaker(capsys)("status", "--json")
    rows = {row["run"]: (row["state"], row["job_exit_code"]) for row in json.loads(out)}
    assert (code, err, rows) == (0, "", {"k3f9qa": ("failed", 37), "n23456": ("done", 0)})


# ---------------------------------------------------------------- files that cannot be read


def test_a_broken_run_file_is_named(say, here):
    for number, text in enumerate(["", "[]", "{}", '{"run": 1}', "\xff"]):
        write(here.parent / ("home/airlift/runs/abcde%d.json" % number), text)
        code, _, err = say("status", "abcde%d" % number)
        assert code == 2 and err.startswith("airlift: the file of run abcde%d cannot be read: " % number)
    assert say("status")[0] == 2


def test_a_broken_file_does_not_hide_the_others(home, capsys):
    run_of(ended=["done", "exit code 0"], job_exit_code=0).save()
    write(home / "runs/broken.json", "{")
    code, out, err = inside.speaker(capsys)("status")
    assert code == 2 and "t23456  done" in out and len(err.splitlines()) == 2 and "broken" in err


def test_a_file_that_goes_while_it_is_looked_for_or_is_anothers(home, monkeypatch):
    run_of().save()
    run_of(id="other2").save()
    real = state.read

    def read(path):
        if path.name == "other2.json":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(state, "read", read)
    found, problems = runs.all_runs()
    assert [run.id for run in found] == ["t23456"]
    assert [problem.what.split(":")[0] for problem in problems] == ["the file of run other2 cannot be read"]


ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner:
                   st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*OLD, "id", "ranks", "x"]), inner,
                                                                 max_size=4), max_leaves=8)


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(ANY | st.fixed_dictionaries({}, optional=dict.fromkeys((*OLD, "id"), ANY)))
def test_any_json_is_a_run_or_a_refusal(home, value):
    write(home / "runs/any222.json", json.dumps(value))
    found, problems = runs.all_runs()
    assert len(found) + len(problems) == 1
    for problem in problems:
        assert problem.code == 2 and "remove it" in problem.fix
