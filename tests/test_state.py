"""state.py: Airlift's own folder: where it lies, its modes whatever the umask, whose files are believed; locks."""

import os
import stat
import threading
import time

import pytest
import support
from hypothesis import given, settings
from hypothesis import strategies as st

import state
from transport import Refusal


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Airlift's own folder, which is not there yet."""
    monkeypatch.setenv("AIRLIFT_HOME", str(tmp_path / "deep/state"))
    return tmp_path / "deep/state"


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def refused(call, *args):
    with pytest.raises(Refusal) as caught:
        call(*args)
    assert caught.value.code == 2 and caught.value.fix
    return caught.value.what


@pytest.mark.parametrize(("env", "place"), [
    ({"AIRLIFT_HOME": "/a"}, "/a"), ({"AIRLIFT_HOME": "/a", "XDG_STATE_HOME": "/x"}, "/a"),
    ({"AIRLIFT_HOME": "", "XDG_STATE_HOME": "/x"}, "/x/airlift"), ({"XDG_STATE_HOME": ""}, "/h/.local/state/airlift"),
    ({}, "/h/.local/state/airlift")])
def test_where_it_lies(monkeypatch, env, place):
    for name in ("AIRLIFT_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/h"} | env).items():
        monkeypatch.setenv(name, value)
    assert str(state.home()) == place


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(home, umask):
    before = os.umask(umask)
    try:
        state.write(state.folder("runs") / "a.json", b"1")
        with state.lock(state.folder() / "lock"):
            pass
        with state.guarded():
            (home / "theirs").write_text("")
    finally:
        os.umask(before)
    assert {mode(path) for path in (home.parent, home, home / "runs")} == {0o700}
    assert {mode(path) for path in (home / "runs/a.json", home / "lock")} == {0o600}
    assert not mode(home / "theirs") & 0o022
    assert state.read(home / "runs/a.json") == b"1"


def test_a_look_makes_nothing(home):
    assert state.folder("runs", make=False) == home / "runs"
    assert not home.parent.exists()


@pytest.mark.parametrize("place", ["", "runs"])
@pytest.mark.parametrize("open_mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to(home, place, open_mode):
    state.folder("runs")
    (home / place).chmod(open_mode)
    for make in (True, False):
        what = refused(lambda make=make: state.folder("runs", make=make))
        assert what == "%s can be changed by other users (mode %o)" % (home / place, open_mode)
    (home / place).chmod(0o755)  # which may be read
    assert state.folder("runs") == home / "runs"


def test_what_belongs_to_another_user(home):
    support.need(os.geteuid() == 0, "only root can give a file away")
    state.write(state.folder("runs") / "a", b"1")
    os.chown(home / "runs/a", 65534, 65534)
    assert refused(state.read, home / "runs/a") == "%s belongs to another user (uid 65534)" % (home / "runs/a")
    os.chown(home / "runs", 65534, 65534)
    assert refused(state.folder, "runs").endswith("runs belongs to another user (uid 65534)")


@pytest.mark.parametrize("planted", ["link", "dangling", "fifo", "file"])
def test_what_stands_in_the_way(home, tmp_path, planted):
    state.folder()
    way = home / "runs"
    (tmp_path / "elsewhere").mkdir()
    if planted == "fifo":
        os.mkfifo(way)
    elif planted == "file":
        way.touch()
    else:
        way.symlink_to(tmp_path / ("elsewhere" if planted == "link" else "gone"))
    assert refused(state.folder, "runs") == "%s is not what Airlift put there" % way
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "gone").exists()


def test_a_link_to_the_folder_itself_is_the_persons(home, tmp_path, monkeypatch):
    state.folder("runs")
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("AIRLIFT_HOME", str(tmp_path / "link"))
    assert state.folder("runs") == home / "runs"


def test_a_file_in_place_of_ours(home, tmp_path):
    (tmp_path / "secret").write_text("x")
    link, pipe = state.folder() / "link", home / "pipe"
    link.symlink_to(tmp_path / "secret")
    os.mkfifo(pipe, 0o600)
    with pytest.raises(OSError):
        state.read(link)
    assert refused(state.read, pipe) == "%s is not what Airlift put there" % pipe
    state.write(link, b"new")  # which takes the link's place, and leaves alone what it led to
    assert (tmp_path / "secret").read_text() == "x" and state.read(link) == b"new"


@settings(max_examples=20)
@given(st.binary(max_size=200))
def test_a_file_comes_back_whole(home, data):
    state.write(state.folder() / "a", data)
    assert state.read(home / "a") == data and [path.name for path in home.iterdir()] == ["a"]


def test_a_write_that_fails_leaves_nothing(home, monkeypatch):
    state.write(state.folder() / "a", b"old")
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError):
        state.write(home / "a", b"new")
    assert [path.read_bytes() for path in home.iterdir()] == [b"old"]


# ---------------------------------------------------------------- locks


def test_a_lock_is_waited_for_with_a_limit(home, monkeypatch):
    monkeypatch.setattr(state, "LOCKED_S", 0.2)
    path, held, let_go = state.folder() / "lock", threading.Event(), threading.Event()

    def hold():
        with state.lock(path):
            held.set()
            let_go.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(10)
    try:
        begun = time.monotonic()
        assert refused(state.lock(path).__enter__).startswith("another launch has held %s for" % path)
        assert time.monotonic() - begun < 5
    finally:
        let_go.set()
        other.join()
    with state.lock(path):
        pass


def test_a_lock_that_was_prepared(home, tmp_path):
    path = state.folder() / "lock"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        state.lock(path).__enter__()
    assert not (tmp_path / "elsewhere").exists()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises((Refusal, OSError)):
        state.lock(path).__enter__()
    path.unlink()
    path.touch()
    path.chmod(0o666)
    assert "can be changed by other users" in refused(state.lock(path).__enter__)


# ---------------------------------------------------------------- what is not ours


def test_what_has_no_end_is_not_read(tmp_path):
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 10 << 30)
    for name, why in (("zero", "is not a file"), ("pipe", "is not a file"), ("huge", "has more than 4.0 MiB")):
        assert refused(state.require_small, tmp_path / name) == "%s %s" % (tmp_path / name, why)
    (tmp_path / "small").touch()
    for name in ("small", "gone", "."):  # whoever opens it says what is wrong
        state.require_small(tmp_path / name)
