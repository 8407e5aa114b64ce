"""runs.py: the file of a run."""

import inside
import pytest
from layout import write


@pytest.fixture
def here(tmp_path, monkeypatch):
    return inside.checkout(tmp_path, monkeypatch)


@pytest.fixture
def say(here, capsys):
    return inside.speaker(capsys)


def test_a_broken_run_file_is_named(say, here):
    for number, text in enumerate(["", "[]", "{}", '{"run": 1}', "\xff"]):
        write(here.parent / ("home/airlift/runs/abcde%d.json" % number), text)
        code, _, err = say("status", "abcde%d" % number)
        assert code == 2 and err.startswith("airlift: the file of run abcde%d cannot be read: " % number)
    assert say("status")[0] == 2
