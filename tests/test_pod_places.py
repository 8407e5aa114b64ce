"""pod/places.py: where things are, texts that name them, and disks that are full, foreign or not there."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support import SCRIPT, base, failed, job, need, plan, plant, ran, started, tmpfs, until

from pod import failures
from pod.places import Places, quoted

# ---------------------------------------------------------------- places


def places(run_root: str | None = "/ws/fam", tmp: str = "/tmp") -> Places:
    return Places(job(run_root=run_root, tree={"sha256": "d" * 64}), {}, tmp + "/airlift-0/" + "d" * 16)


@pytest.mark.parametrize("text, filled", [
    ("/nemo_run", "ROOT"), ("/nemo_run/", "ROOT/"), ("/nemo_run/code", "WORK"), ("/nemo_run/code/", "WORK/"),
    ("/nemo_run/code/src/x", "CODE/src/x"), ("/nemo_run/code/src", "CODE/src"), ("/nemo_run/code/src2/x", "WORK/src2/x"),
    ("/nemo_run/code/src.bak", "WORK/src.bak"), ("/nemo_run/out/x", "ROOT/out/x"), ("/nemo_run/codes", "ROOT/codes"),
    ("/nemo_run/code.bak", "ROOT/code.bak"), ("/nemo_run/code-1", "ROOT/code-1"),
    ("/nemo_run/code_x/y", "ROOT/code_x/y"),
    ("/nemo_run/codé", "ROOT/codé"), ("/nemo_run/x/code", "ROOT/x/code"),
    ("/nemo_run/code:/nemo_run:/x", "WORK:ROOT:/x"), ("--out=/nemo_run/a,/nemo_run/b", "--out=ROOT/a,ROOT/b"),
    ('x: "/nemo_run/a"', 'x: "ROOT/a"'), ("[/nemo_run/a, '/nemo_run']", "[ROOT/a, 'ROOT']"),
    ("/nemo_runs", "/nemo_runs"), ("/nemo_run2/x", "/nemo_run2/x"), ("/nemo_run.old", "/nemo_run.old"),
    ("/nemo_run-2", "/nemo_run-2"), ("/nemo_runé", "/nemo_runé"), ("/data/nemo_run", "/data/nemo_run"),
    ("/data/nemo_run/code", "/data/nemo_run/code"), ("nemo_run/x", "nemo_run/x"), ("./nemo_run", "./nemo_run"),
    ("../nemo_run/x", "../nemo_run/x"), ("${x}/nemo_run", "${x}/nemo_run"), ("~/nemo_run/x", "~/nemo_run/x"),
    ("$(pwd)/nemo_run", "$(pwd)/nemo_run"), ("x-/nemo_run", "x-/nemo_run"), ("", ""),
    ("file:/nemo_run/code/x", "file:WORK/x"), ("/nemo_run/nemo_run", "ROOT/nemo_run"),
])
def test_places_by_whole_path_components(text: str, filled: str) -> None:
    at = places("/ws/fam")
    words = {"ROOT": "/ws/fam", "CODE": "/tmp/airlift-0/dddddddddddddddd/code", "WORK": "/ws/fam/work"}
    for word, path in words.items():
        filled = filled.replace(word, path)
    assert at.fill(text) == filled


def test_without_a_workspace_it_starts_in_the_code_root() -> None:
    at = places(None)
    assert at.fill("/nemo_run/code:/nemo_run/code/src/x:/nemo_run/y") == "%s:%s/src/x:%s/output/y" % (
        at.code, at.code, at.base)


@pytest.mark.parametrize("root", ["/nemo_run/fam", "/nemo_run/code/fam"])
def test_where_storage_is_mounted_at_nemo_run_a_profiles_paths_are_real(root: str) -> None:
    at = places(root)
    assert at.fill("/nemo_run/hf:/nemo_run:/nemo_run/code/src") == "/nemo_run/hf:/nemo_run:%s/src" % at.code
    assert at.fill('"/nemo_run/hf"', config=True) == '"%s/hf"' % root  # NVIDIA's configs mean the run root


COMPONENT = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=5)


@given(st.lists(COMPONENT, max_size=4), st.sampled_from(["", "code/", "other/"]),
       st.sampled_from(["", " ", ":", ",", '"', "'"]))
def test_places_property(parts: list[str], first: str, before: str) -> None:
    at = places("/w s/fam")
    path = "/nemo_run/" + first + "/".join(parts)
    root = at.work + "/" if path.startswith("/nemo_run/code/") else at.run_root + "/"
    rest = path[len("/nemo_run/code/" if path.startswith("/nemo_run/code/") else "/nemo_run/"):]
    if path == "/nemo_run/code":
        root, rest = at.work, ""
    if path in ("/nemo_run/code/src", "/nemo_run/code/src/"):
        root = at.code + "/"
    assert at.fill(before + path) == before + root + rest


@given(st.text(max_size=60).filter(lambda text: "/nemo_run" not in text))
def test_what_names_no_place_stays(text: str) -> None:
    assert places().fill(text) == text == places().fill(text, config=True)


AWKWARD = ["/w s/a'b", '/w"q', "/w\\back", "/w: colon #hash", "/größe/データ", "/tab\there", "/new\nline",
           "/rocket\U0001f680", "/{}[]&*!|>%@`", "/nel\x85x", "/ls\u2028x", "/del\x7fx", "/bom\ufeffx", "/esc\x1b[0m",
           "/$(id)$$", "/nemo_run", "/nemo_run/code", "/\\1\\g<0>"]


@pytest.mark.parametrize("root", AWKWARD, ids=ascii)
def test_a_config_with_awkward_places_is_still_yaml(root: str) -> None:
    import configs

    value = {"out": "/nemo_run/out", "list": ["/nemo_run", "a:/nemo_run/x y"], "n": 1, "other": "größe: #x",
             "/nemo_run/key": 1}
    filled = places(root).fill(configs.dump(value), config=True)
    assert yaml.safe_load(filled) == {"out": root + "/out", "list": [root, "a:" + root + "/x y"], "n": 1,
                                      "other": "größe: #x", root + "/key": 1}


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20))
def test_any_place_is_quoted_for_yaml(text: str) -> None:
    assert yaml.safe_load('x: "%s"' % quoted("/" + text)) == {"x": "/" + text}


def test_the_config_that_the_recipe_reads(tmp_path: Path) -> None:
    root = str(tmp_path / "work \"space\": #1 \\ ü")
    scratch = tmp_path / "scr 'atch\" $HOME"
    code, out = ran(plan(config='a: "/nemo_run/out"\nb: "/nemo_run/code/src"\n', run_root=root,
                         folders=["/nemo_run/made/for you"],
                         command='cp "$AIRLIFT_CONFIG" "$NEMO_RUN_DIR"/copy; pwd; cat "$AIRLIFT_CODE"/' + SCRIPT),
                         scratch)
    assert code == 0, out.text
    assert yaml.safe_load((Path(root) / "copy").read_text()) == {"a": root + "/out", "b": str(out.code / "src")}
    assert (Path(root) / "made/for you").is_dir()
    assert "\n%s/work\npass\n" % root in out.text


@pytest.mark.parametrize("mount", ["nemo_run", "nemo_run/code"])
def test_a_workspace_that_is_itself_called_nemo_run(tmp_path: Path, mount: str) -> None:
    """NVIDIA's profiles mount their volume at /nemo_run. Such a path, once real, is not filled in again."""
    need(os.geteuid() == 0, "needs a mount namespace")
    (tmp_path / "volume").mkdir()
    whole = plan(run_root="/%s/fam" % mount, config='a: "/nemo_run/x"\n', env={"HF_HOME": "/nemo_run/hf"},
                 command='cat "$AIRLIFT_CONFIG"; echo "models in $HF_HOME"; exit 4')
    script = """
        mount -t tmpfs tmpfs /mnt && mkdir /mnt/up /mnt/work /mnt/root
        mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/up,workdir=/mnt/work /mnt/root || exit 98
        mount --rbind /proc /mnt/root/proc && mount --bind /dev /mnt/root/dev && mkdir -p "/mnt/root/$1" || exit 97
        mount --bind "$2" "/mnt/root/$1" && shift 2 && exec chroot /mnt/root "$@" """
    argv = ["unshare", "-m", "sh", "-c", script, "sh", mount, str(tmp_path / "volume"), *whole.argv]
    code, out = ran(whole, tmp_path / "scratch", argv=argv, env={"TMPDIR": "/%s/tmp" % mount})
    assert code == 4, out.text
    assert 'a: "/%s/fam/x"\n' % mount in out.text and "models in /nemo_run/hf\n" in out.text
    assert "in %s/code\n" % base(Path("/" + mount, "tmp"), whole.digest) in out.text
    logs = tmp_path / "volume/fam/runs/t23456"
    assert sorted(path.name for path in logs.iterdir()) == ["rank-0.exit", "rank-0.log", "run.json"]
    assert sorted(path.name for path in (tmp_path / "volume").iterdir()) == ["fam", "tmp"]
    assert sorted(path.name for path in (tmp_path / "volume/fam").iterdir()) == ["runs", "work"]


# ---------------------------------------------------------------- disks


def test_a_full_disk(tmp_path: Path) -> None:
    noise = {"src/noise": random.Random(6).randbytes(900_000)}
    with tmpfs(tmp_path / "small", "size=256k") as small:
        code, out = ran(plan(noise, command="echo RECIPE RAN"), small)
        assert code == failures.PLACE
        assert "disk is full" in failed(code, out)
        assert sorted(path.name for path in out.places[0].iterdir()) == ["output"], "what was begun is taken away"


def test_a_disk_with_room_for_the_tree_only(tmp_path: Path) -> None:
    config = "x: %s\n" % random.Random(6).randbytes(60_000).hex()
    with tmpfs(tmp_path / "small", "size=96k") as small:
        code, out = ran(plan(config=config, command="echo RECIPE RAN"), small)
        assert code == failures.PLACE and "disk is full" in failed(code, out)
        assert not (out.code.parent / "config.yaml").exists(), "a config is whole or absent"


def test_a_read_only_place(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "fixed", "ro,size=64k") as fixed:
        code, out = ran(plan(command="echo RECIPE RAN"), fixed)
        assert code == failures.PLACE and failed(code, out).endswith("Read-only file system")
        code, out = ran(plan(command="echo RECIPE RAN", run_root=str(fixed / "ws")), tmp_path / "scratch")
        assert code == failures.PLACE and str(fixed / "ws") in failed(code, out)


def test_a_place_of_somebody_else(tmp_path: Path) -> None:
    need(os.geteuid() == 0 and shutil.which("setpriv"), "needs another user to be")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        argv = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
        whole = plan(command="echo RECIPE RAN")
        seen = subprocess.run([*argv, "/usr/bin/python3", "-c", ""], capture_output=True)
        need(seen.returncode == 0, "no python3 that another user may start: %s" % seen.stderr.decode())
        code, out = ran(whole, Path(name), argv=[*argv, *whole.argv], env={"PATH": "/usr/bin:/bin"})
        assert code == failures.PLACE and failed(code, out).endswith("Permission denied")
        os.chmod(name, 0o1777)
        code, out = ran(whole, Path(name), argv=[*argv, *whole.argv], env={"PATH": "/usr/bin:/bin"})
        assert code == 0
        code, out = ran(plan(command="true", run="t34567"), Path(name))
        assert code == 0, "two users of one machine do not meet"


@pytest.mark.parametrize("where", ["scratch", "top", "run root", "logs", "work"])
def test_a_file_where_a_folder_should_be(tmp_path: Path, where: str) -> None:
    scratch, workspace = tmp_path / "scratch", tmp_path / "ws"
    path = {"scratch": tmp_path / "file/scratch", "top": scratch / ("airlift-%d" % os.geteuid()), "run root": workspace,
            "logs": workspace / "runs", "work": workspace / "work"}[where]
    target = tmp_path / "file" if where == "scratch" else path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("here first")
    env = {"TMPDIR": str(path)} if where == "scratch" else {}
    code, out = ran(plan(run_root=str(workspace), command="echo RECIPE RAN"), scratch, env=env)
    assert code == failures.PLACE, out.text
    failed(code, out)
    assert target.read_text() == "here first"


@pytest.mark.parametrize("what", ["file", "folder", "link", "fifo", "a changed tree", "a tree with a stray module"])
def test_what_a_killed_pod_left_is_not_used(tmp_path: Path, what: str) -> None:
    """It is removed; what is no folder is left alone, and another name is taken."""
    whole = plan({"src/a": b"1"}, command="cat src/a; ls src")
    place = base(tmp_path, whole.digest)
    place.parent.mkdir(mode=0o700)
    if what == "folder":
        plant(place, {"mine.txt": "keep"})
    elif what.startswith("a "):
        plant(place / "code", {"src/a": "2"} if "changed" in what else {"src/a": "1", "src/torch.py": "evil"})
    elif what == "file":
        place.write_text("mine")
    elif what == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to(tmp_path)
    code, out = ran(whole, tmp_path)
    assert code == 0 and "code\n1a\npkg\n" in out.text, out.text
    used = Path(re.findall(r"files in (.*)/code", out.text)[0])
    assert used == (place if place.is_dir() and not place.is_symlink() else place.with_name(place.name + "-1"))


def test_the_same_tree_has_the_same_path_launch_after_launch(tmp_path: Path) -> None:
    """Caches, and names that recipes make of paths, are keyed by it. Two at once do not meet."""
    whole = [plan({"src/a": b"1"}, run=run, command="echo $AIRLIFT_CODE; sleep 30") for run in ("t22222", "t33333")]
    for _ in range(3):
        with started(whole[0], tmp_path) as one:
            one.until(b"\n%s\n" % os.fsencode(one.code))
            with started(whole[1], tmp_path) as two:
                two.until(b"\n%s-1/code\n" % os.fsencode(one.code.parent))
                two.signal(signal.SIGTERM)
            one.signal(signal.SIGTERM)
    other = plan({"src/a": b"2"}, command="true")
    assert ran(other, tmp_path)[1].places == [base(tmp_path, other.digest)], "and nothing piles up"


# ---------------------------------------------------------------- where the recipe starts


def test_what_a_recipe_writes_by_a_relative_path_stays(tmp_path: Path) -> None:
    """... and is found by the next launch and the next stage, also when the source has changed meanwhile."""
    root = tmp_path / "ws/fam"
    write = "mkdir -p output && echo 1 >>output/model && cp src/a copy && (cd .. && pwd) && cat src/a output/model; exit 7"
    for number in (b"1", b"2", b"2"):
        whole = plan({"src/a": number}, run_root=str(root), command=write, config='o: "/nemo_run/code/output"\n')
        code, out = ran(whole, tmp_path / "scratch")
        assert code == 7 and "\n%s\n" % root in out.text, out.text
        assert (root / "work/copy").read_bytes() == number, "src/... is this launch's"
        assert yaml.safe_load((out.code.parent / "config.yaml").read_text()) == {"o": str(root / "work/output")}
    assert (root / "work/output/model").read_text() == "1\n1\n1\n"
    assert (root / "work/src").readlink() == out.code / "src" and sorted(os.listdir(root / "work")) == [
        "copy", "output", "src"]


def test_what_ships_beside_src_is_found_where_the_recipe_starts(tmp_path: Path) -> None:
    whole = plan({"data/a b.txt": b"one ", "data/deep/c": b"two "}, run_root=str(tmp_path / "ws"),
                 command='cat "data/a b.txt" data/deep/c "$X"; echo >data/out; exit 3', env={"X": "/nemo_run/code/data/a b.txt"})
    for _ in range(2):
        code, out = ran(whole, tmp_path / "scratch")
        assert code == 3 and "one two one " in out.text, out.text
    assert (tmp_path / "ws/work/data/out").exists() and not (out.code / "data/out").exists()


def test_a_folder_of_somebodys_where_src_should_lead_to_the_tree(tmp_path: Path) -> None:
    plant(tmp_path / "ws/work", {"src/mine": "keep"})
    code, out = ran(plan(run_root=str(tmp_path / "ws"), command="ls src; exit 3"), tmp_path / "scratch")
    assert code == 3 and "src by a relative path is not what was sent" in out.text and "\nmine\n" in out.text


def test_two_runs_at_once_with_other_trees_are_told(tmp_path: Path) -> None:
    root = str(tmp_path / "ws")
    with started(plan({"src/a": b"1"}, run_root=root, command="sleep 30"), tmp_path / "s") as one:
        one.until(b"sha256")
        until(lambda: (tmp_path / "ws/work/src/a").exists())
        code, out = ran(plan({"src/a": b"2"}, run_root=root, command="exit 3"), tmp_path / "s")
        assert code == 3 and "work/src led to another tree, and now leads to this one" in out.text


def test_a_restart_after_death_at_any_time(tmp_path: Path) -> None:
    """SIGKILL while it unpacks; the next start is as the first."""
    files = {"src/p/m%04d.py" % number: b"x" * 50 for number in range(1000)}
    whole = plan(files, command="echo DONE")
    for delay in (0.0, 0.02, 0.05):
        with started(whole, tmp_path) as dying:
            until(lambda: any(tmp_path.glob("airlift-*/*/code*")))
            time.sleep(delay)
            dying.process.kill()
            dying.end()
        code, out = ran(whole, tmp_path)
        assert code == 0 and "DONE" in out.text
        assert len(list((out.code / "src/p").iterdir())) == 1000


def test_pods_that_share_a_scratch_folder(tmp_path: Path) -> None:
    """Two ranks on one machine, as two tasks of a node: each has a tree of its own."""
    files = {"src/p/m%04d.py" % number: b"x" * 50 for number in range(300)}
    whole = plan(files, nodes=4, command="sleep 0.2; exit 1$NODE_RANK", run_root=str(tmp_path / "ws"))
    for attempt in range(2):
        with contextlib.ExitStack() as stack:
            pods = [stack.enter_context(started(whole, tmp_path / str(attempt),
                                                env={"NODE_RANK": str(rank), "MASTER_ADDR": "m"}))
                    for rank in range(4)]
            assert [one.end() for one in pods] == [10, 11, 12, 13], [one.text for one in pods]
        assert [sorted(os.listdir(place))[:2] for place in pods[0].places] == [["code", "config.yaml"]] * 4
        assert [(tmp_path / "ws/runs/t23456" / ("rank-%d.exit" % rank)).read_text() for rank in range(4)] == [
            "10\n", "11\n", "12\n", "13\n"]
