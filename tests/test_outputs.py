"""common/outputs.py, and with the launcher on this machine: outputs that come home, logs as files, and notify."""

import io
import os
import tarfile

import pytest
from test_local import Place, run_id

from backends.common import outputs
from transport import Refusal


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    yield made
    made.end() if hasattr(made, "end") else None


def test_files_that_fit_are_copied(tmp_path):
    for name in ("a.json", "deep/b.json", "deep/c.txt"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(name)
    assert outputs.copied(tmp_path / "out", "*.json", tmp_path / "home") == ["a.json", "deep/b.json"]
    assert (tmp_path / "home/deep/b.json").read_text() == "deep/b.json"
    assert outputs.copied(tmp_path / "out", "none", tmp_path / "home") == []


def test_what_is_large_is_not_copied(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x" * 100)
    monkeypatch.setattr(outputs, "MOST", 99)
    with pytest.raises(Refusal, match="100 B of at most 99 B"):
        outputs.copied(tmp_path, "*", tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_a_tar_of_anyone_writes_below_its_folder_only(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("./good/a", tarfile.REGTYPE), ("../evil", tarfile.REGTYPE), ("/tmp/evil-4711", tarfile.REGTYPE),
                           ("link", tarfile.SYMTYPE), ("link/through", tarfile.REGTYPE), ("pipe", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/tmp", 1 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"x") if info.size else None)
    assert outputs.unpacked(buffer.getvalue(), tmp_path / "home") == ["good/a", "link/through"]
    assert not (tmp_path / "evil").exists() and not os.path.exists("/tmp/evil-4711")
    assert not (tmp_path / "home/link").is_symlink()
    with pytest.raises(Refusal, match="is no tar"):
        outputs.unpacked(b"x" * 2000, tmp_path / "home")


def test_logs_and_outputs_come_home(place):
    place.recipe("import os, pathlib\nrank = os.environ['NODE_RANK']\nprint('I am', rank)\n"
                 "pathlib.Path(os.environ['NEMO_RUN_DIR'], 'made-%s.json' % rank).write_text(rank)\n")
    run = run_id(place.run().stdout)
    done = place.run("logs", run, "--download", str(place.tmp / "logs"))
    assert done.returncode == 0 and "2 logs in" in done.stdout, done.stderr
    for rank in "01":
        text = (place.tmp / ("logs/rank-%s.log" % rank)).read_text()
        assert "I am " + rank in text and "I am " + "10"[int(rank)] not in text
    done = place.run("fetch", run, str(place.tmp / "home-of-it"), "--outputs", "made-*.json")
    assert done.returncode == 0 and (place.tmp / "home-of-it/made-1.json").read_text() == "1", done.stderr
    assert "no file in" in place.run("fetch", run, str(place.tmp / "x"), "--outputs", "nothing*").stderr


@pytest.mark.parametrize(("body", "state", "code"), [("pass", "done", "0"), ("raise SystemExit(3)", "failed", "3")])
def test_notify_is_run_when_a_followed_launch_has_ended(place, body, state, code):
    place.recipe(body, nodes=1)
    profile = place.folder / "profiles/local.toml"
    profile.write_text('notify = "echo $AIRLIFT_RUN $AIRLIFT_STATE $AIRLIFT_EXIT_CODE $AIRLIFT_OUTPUTS; exit 4"\n'
                       + profile.read_text())
    done = place.run()
    assert "%s %s %s %s" % (run_id(done.stdout), state, code, place.output) in done.stdout
    assert "note: the command of notify failed: it ended with exit code 4" in done.stdout
    assert done.returncode == (0 if state == "done" else 1)
    assert "notify has no effect" in place.run(*("nano3", "sft", "local"), "--detach").stdout
