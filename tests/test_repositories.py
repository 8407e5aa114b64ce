"""${auto_mount:…}: how an entry is read, what a pod on a cloud clones for itself, and backends/common/slurm_prepare.py,
by which a Slurm cluster has a commit, or an image, once for all."""

import subprocess
from pathlib import Path

import pytest
from support import need, plan, ran

import jobs
from backends.common import slurm_prepare
from backends.common.ssh import Host
from pod.failures import CLONE
from transport import Refusal


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", "-c", "init.defaultBranch=main", *words],
                          cwd=folder, capture_output=True, text=True)
    need(done.returncode == 0, done.stderr)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Three commits: the first by its SHA alone, the second a tag, the third the tip of main and of feature/y."""
    folder = tmp_path / "srv" / "org" / "lib.git"
    folder.mkdir(parents=True)
    git(folder, "init", "-q", ".")
    for number in ("1", "2", "3"):
        (folder / "version").write_text(number)
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", number)
        if number == "2":
            git(folder, "tag", "-a", "-m", "v2", "v2.0")
    git(folder, "branch", "feature/y")
    return folder


# ---------------------------------------------------------------- how an entry is read


@pytest.mark.parametrize("mount, parsed", [
    ("${auto_mount:git+https://host/org/x.git@main,/opt/x}", ("https://host/org/x.git", "main", "/opt/x")),
    ("${auto_mount:git+ssh://git@host/org/x.git@feat/y,/opt/x}", ("ssh://git@host/org/x.git", "feat/y", "/opt/x")),
    ("${auto_mount:git+file:///srv/x@v1.0,/opt/x}", ("file:///srv/x", "v1.0", "/opt/x")),
    ("${auto_mount:git+https://github.com/org/x.git@main,/opt/x}", ("https://mirror/gh/org/x.git", "main", "/opt/x")),
])
def test_auto_mounts_are_read_and_go_by_way_of_mirrors(mount: str, parsed: tuple[str, str, str]) -> None:
    found = jobs.repository_of(mount, {"https://github.com/": "https://mirror/gh/"})
    assert found and (found.url, found.ref, found.target) == parsed
    assert jobs.repository_of("/lustre:/lustre", {}) is None


def test_an_entry_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(Refusal, match="cannot be parsed"):
        jobs.clones({"mounts": ["${auto_mount:https://host/x@main}"]}, "dgxcloud")


# ---------------------------------------------------------------- in a pod of a cloud


def launched(tmp_path: Path, mount: str, mirrors: dict[str, str], **settings: str) -> tuple[int, str, list[str]]:
    """(exit code, output, notes) of a pod that was planned with one mount."""
    clones, notes = jobs.clones({"mounts": [mount], "git_mirrors": mirrors} | settings, "lepton")
    code, done = ran(plan(clones=clones, command="cat %s/opt/lib*/version" % tmp_path), tmp_path / "scratch")
    return code, done.text, notes


@pytest.mark.parametrize(("ref", "version"), [("main", "3"), ("feature/y", "3"), ("v2.0", "2"), ("SHA", "1")])
def test_branch_tag_and_commit_through_a_mirror(repository: Path, tmp_path: Path, ref: str, version: str) -> None:
    commit = git(repository, "rev-list", "--max-parents=0", "main") if ref == "SHA" else ref
    mirrors = {"https://github.com/": "file://%s/srv/" % tmp_path, "https://github.com/other": "file:///nowhere"}
    mount = "${auto_mount:git+https://github.com/org/lib.git@%s,%s/opt/lib}" % (commit, tmp_path)
    code, text, notes = launched(tmp_path, mount, mirrors)
    assert code == 0, text
    assert version in text.splitlines()[-2] + text.splitlines()[-1]
    head = git(repository, "rev-parse", commit + "^{commit}")
    assert "airlift: %s/opt/lib is %s" % (tmp_path, head) in text
    assert notes == ["each pod clones file://%s/srv/org/lib.git at %s to %s/opt/lib" % (tmp_path, commit, tmp_path)]


def test_the_images_own_copy_is_replaced_whole(repository: Path, tmp_path: Path) -> None:
    old = tmp_path / "opt" / "lib"
    old.mkdir(parents=True)
    (old / "left over").write_text("x")
    code, text, _ = launched(tmp_path, "${auto_mount:git+file://%s@main,%s}" % (repository, old), {})
    assert code == 0, text
    assert not (old / "left over").exists()


@pytest.mark.parametrize("mount", ["file:///nowhere/x.git@main", "file://%s@no-such-branch"])
def test_a_clone_that_fails_ends_the_pod_and_says_both_ways_out(repository: Path, tmp_path: Path, mount: str) -> None:
    source = mount % repository if "%s" in mount else mount
    code, text, _ = launched(tmp_path, "${auto_mount:git+%s,%s/opt/lib}" % (source, tmp_path), {})
    assert code == CLONE == 88
    assert "[git_mirrors]" in text and 'auto_mount = "image"' in text
    assert "Traceback" not in text


def test_image_uses_what_the_image_has(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "opt" / "lib").mkdir(parents=True)
    (tmp_path / "opt" / "lib" / "version").write_text("of the image")
    mount = "${auto_mount:git+https://github.com/org/lib.git@main,%s/opt/lib}" % tmp_path
    code, text, notes = launched(tmp_path, mount, {}, auto_mount="image")
    assert code == 0 and "of the image" in text
    assert notes == ["%s/opt/lib: the copy inside the image is used" % tmp_path]


# ---------------------------------------------------------------- on a cluster


@pytest.mark.parametrize(("ref", "version"), [("main", "3"), ("feature/y", "3"), ("v2.0", "2"), ("SHA", "1")])
def test_a_commit_is_there_once_and_whole(repository: Path, tmp_path: Path, ref: str, version: str) -> None:
    commit = git(repository, "rev-list", "--max-parents=0", "main") if ref == "SHA" else ref
    mount = jobs.AutoMount("file://%s" % repository, commit, "/opt/lib")
    folder = Path(slurm_prepare.clone(Host(), mount, str(tmp_path / "jobs dir")))
    assert folder.name == git(repository, "rev-parse", commit + "^{commit}")
    assert folder.parent == Path(mount.folder(str(tmp_path / "jobs dir")))
    assert (folder / "version").read_text() == version and folder.stat().st_mode & 0o777 == 0o755
    (folder / "mine").write_text("kept")  # a job may read it
    assert slurm_prepare.clone(Host(), mount, str(tmp_path / "jobs dir")) == str(folder)
    assert (folder / "mine").exists() and [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_branch_that_moves_gets_a_folder_of_its_own(repository: Path, tmp_path: Path) -> None:
    mount = jobs.AutoMount("file://%s" % repository, "main", "/opt/lib")
    before = Path(slurm_prepare.clone(Host(), mount, str(tmp_path)))
    (repository / "version").write_text("4")
    git(repository, "commit", "-q", "-a", "-m", "4")
    after = Path(slurm_prepare.clone(Host(), mount, str(tmp_path)))
    assert ((before / "version").read_text(), (after / "version").read_text()) == ("3", "4")
    assert before.parent == after.parent


@pytest.mark.parametrize(("url", "ref", "said"), [
    ("", "no-such", "it has neither a tag nor a branch no-such"), ("", "0" * 40, "cannot get 0000"),
    ("file:///nowhere/x.git", "main", "cannot get main of file:///nowhere/x.git"),
    ("", "main; touch %s/x", "neither a tag nor a branch")])
def test_a_commit_that_cannot_be_had_is_refused_and_leaves_nothing(repository: Path, tmp_path: Path, url: str, ref: str,
                                                                   said: str) -> None:
    ref = ref.replace("%s", str(tmp_path))
    mount = jobs.AutoMount(url or "file://%s" % repository, ref, "/opt/lib")
    with pytest.raises(Refusal) as caught:
        slurm_prepare.clone(Host(), mount, str(tmp_path / "jobs"))
    assert caught.value.code == 4 and said in caught.value.what
    assert not (tmp_path / "x").exists() and not [path for path in (tmp_path / "jobs").rglob("*") if path.is_file()]


@pytest.mark.parametrize(("image", "url"), [
    ("nvcr.io/nvidia/nemo:25.1", "docker://nvcr.io#nvidia/nemo:25.1"), ("ubuntu:22.04", "docker://ubuntu:22.04"),
    ("docker://host:5000/a/b", "docker://host:5000#a/b"), ("docker://me@host#a/b:1", "docker://me@host#a/b:1"),
    ("dockerd://local/image:1", "dockerd://local/image:1"), ("podman://local.example/image", "podman://local.example/image"),
    ("org/name@sha256:" + "0" * 64, "docker://org/name@sha256:" + "0" * 64)])
def test_an_image_is_converted_once_and_again_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image: str,
                                                         url: str) -> None:
    """Each scheme that enroot takes, as enroot wants it; account and partition only where they are set."""
    for name, body in (("srun", 'echo "$*" >>%s/asked; shift 3; while [ "$1" != enroot ]; do shift; done; "$@"' % tmp_path),
                       ("enroot", '[ "$1 $2" = "import -o" ] && echo squashed >"$3"')):
        (tmp_path / name).write_text("#!/bin/sh\n%s\n" % body)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", "%s:/usr/bin:/bin" % tmp_path)
    settings = {"squash_partition": "cpu", "squash_time": "02:00:00"}
    first = slurm_prepare.squashed(Host(), settings, image, str(tmp_path))
    assert Path(first).read_text() == "squashed\n" and slurm_prepare.squashed(Host(), settings, image, str(tmp_path)) == first
    assert slurm_prepare.squashed(Host(), settings | {"fresh_image": True, "account": "a b"}, image, str(tmp_path)) == first
    one, two = (tmp_path / "asked").read_text().splitlines()
    assert one == "-J airlift.squash -N1 -n1 --partition=cpu --time=02:00:00 enroot import -o %s.new %s" % (first, url)
    assert "--account=a b --partition=cpu" in two
