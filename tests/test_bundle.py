"""The bundle: what is refused; and, marked slow, a real one, made twice, and used where there is no network."""

import argparse
import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import layout
import pytest

import bundle
from tests import support
from tests.emulators import no_pods_because
from transport import Refusal


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """Two small lists of what stand for wheels."""
    return support.plant(tmp_path / "wheels", {"launcher/a-1-py3-none-any.whl": b"a", "recipes/b-1-py3-none-any.whl": b"b"})


def made(wheels: Path, out: Path) -> Path:
    done = subprocess.run([sys.executable, "bundle.py", "make", "--wheels", str(wheels), "--out", str(out)],
                          cwd=layout.REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = next(out.glob("airlift-*.tar.gz"))
    assert done.stdout.startswith(hashlib.sha256(found.read_bytes()).hexdigest())
    return found


def unpacked(file: Path, place: Path) -> Path:
    place.mkdir(exist_ok=True)
    subprocess.run(["tar", "-xzf", str(file), "-C", str(place)], check=True)
    return next(place.iterdir())


def test_the_same_inputs_give_the_same_bytes(wheels: Path, tmp_path: Path) -> None:
    first = made(wheels, tmp_path / "one").read_bytes()
    os.utime(wheels / "launcher/a-1-py3-none-any.whl", (1, 1))
    (wheels / "recipes/b-1-py3-none-any.whl").chmod(0o600)
    assert made(wheels, tmp_path / "two").read_bytes() == first
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(first))) as tar:
        infos = tar.getmembers()
    names = [info.name.partition("/")[2] for info in infos]
    assert {(info.mtime, info.uid, info.gid, info.uname, info.mode) for info in infos} == {(0, 0, 0, "", 0o644)}
    assert names == sorted(names) and {"INSTALL", "SHA256SUMS", "launch.py", "profiles/lepton.toml", "how.svg",
                                       "src/starter/sft.py", "wheels/launcher/a-1-py3-none-any.whl"} <= set(names)
    assert not any("__pycache__" in name or name.startswith("tests") for name in names)


def test_what_was_changed_on_the_way_is_refused_by_name(wheels: Path, tmp_path: Path) -> None:
    file = made(wheels, tmp_path / "out")
    changes = {
        "1 not as packed: backends/lepton.py": lambda place: (place / "backends/lepton.py").open("a").write("#"),
        "1 missing: wheels/recipes/b-1-py3-none-any.whl": lambda place: (
            place / "wheels/recipes/b-1-py3-none-any.whl").unlink(),
        "1 not of this bundle: wheels/launcher/evil.whl": lambda place: (
            place / "wheels/launcher/evil.whl").write_text("x"),
        "SHA256SUMS is missing": lambda place: (place / "SHA256SUMS").unlink()}
    for number, (said, change) in enumerate(changes.items()):
        place = unpacked(file, tmp_path / str(number))
        assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=place).returncode == 0
        bundle.verify(place)
        change(place)
        done = subprocess.run([sys.executable, "bundle.py", "install"], cwd=place, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("airlift: " + said), done.stderr
        assert len(done.stderr.splitlines()) == 2 and not (place / ".venv").exists()


def test_a_bundle_for_another_python_is_refused(wheels: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run([sys.executable, "bundle.py", "make", "--wheels", str(wheels), "--out", str(out), "--python", "3.14"],
                   cwd=layout.REPO, check=True, capture_output=True)
    place = unpacked(next(out.iterdir()), tmp_path / "there")
    assert "python3.14 -m venv .venv" in (place / "INSTALL").read_text()
    done = subprocess.run([sys.executable, "bundle.py", "install"], cwd=place, capture_output=True, text=True)
    assert done.returncode == 2 and "the bundle is for Python 3.14 on linux" in done.stderr


def pins(python: str | None, platform: str | None = None) -> dict[str, str]:
    """What a bundle for that Python needs, all lists together: name -> version."""
    target = argparse.Namespace(python=python, platform=platform)
    lines = [line.split()[0] for name in bundle.LISTS.values()
             for line in bundle.needed((layout.REPO / name).read_text(), target).splitlines() if line[0] != "#"]
    found = dict(line.split("==") for line in lines)
    assert all(found[name] == version for name, version in (line.split("==") for line in lines))
    return found


def test_a_list_for_another_python_has_what_that_one_asks_for() -> None:
    here, there = pins(None), pins("3.13", "aarch64")
    assert pins("%d.%d" % sys.version_info[:2]) == here and set(here) <= set(there)
    assert (pins("3.11")["numpy"], there["numpy"]) == ("2.4.6", "2.5.5") and "colorama" not in there
    assert "hf-xet" in there and "hf-xet" not in pins(None, "riscv64")


def test_no_credential_goes_into_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "checkout"
    for name in (*bundle.FILES, *bundle.FOLDERS):
        source = layout.REPO / name
        place.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, place / name)
    monkeypatch.setattr(bundle, "HERE", place)
    assert len(dict(bundle.scripts())) > 40
    (place / "profiles/mine.toml").write_text('executor = "lepton"\n[env_vars]\nHF_TOKEN = "hf_%s"\n' % ("a1" * 17))
    with pytest.raises(Refusal, match=r"profiles/mine\.toml contains what looks like a credential"):
        list(bundle.scripts())


# ---------------------------------------------------------------- a real one

slow = pytest.mark.slow
# The word of the other side: a namespace whose only network is its own loopback, and a HOME with nothing in it.
INSIDE = """\
set -e
ip link set lo up
cd "$PLACE"
tar -xzf "$BUNDLE"
cd airlift-*
! timeout 5 python3 -c 'import socket; socket.create_connection(("192.0.2.1", 80), 3)' 2>/dev/null
sed -n '/^or by hand/,/^Then/s/^    //p' INSTALL | grep -v requirements-torch >../by-hand
[ "$(wc -l <../by-hand)" -eq 3 ]
PATH=$(dirname $PYTHON):$PATH sh -e ../by-hand
python3 launch.py list | grep nano3
rm -r .venv
make install PYTHON=$PYTHON
for profile in $(python3 launch.py profiles | cut -d" " -f1); do
  python3 launch.py nano3 sft $profile --dry-run
done
python3 launch.py check local
python3 launch.py nano3 sft local train.steps=10
"""
LEPTON = """\
(cd "$REPO" && exec "$TESTS" -m tests.emulators lepton >"$PLACE/emulator" 2>&1) &
emulator=$!
trap 'kill $emulator; wait $emulator' EXIT
until grep -q Ctrl-C "$PLACE/emulator"; do sleep 0.1; done
eval "$(grep ^export "$PLACE/emulator")"
export LEPTON_NODE_GROUP=default-group LEPTON_STORAGE=node-nfs:shared
python3 launch.py check lepton
python3 launch.py nano3 sft lepton run.env.gpus_per_node=0 train.steps=10
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle with torch, made from the package index that this machine has."""
    out = tmp_path_factory.mktemp("bundle")
    done = subprocess.run([sys.executable, "bundle.py", "make", "--torch", "--out", str(out)], cwd=layout.REPO,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    yield next(out.iterdir())
    shutil.rmtree(out)


@slow
def test_one_for_another_python(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "bundle.py", "make", "--python", "3.13", "--out", str(tmp_path)],
                          cwd=layout.REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheels = {path.name for path in unpacked(next(tmp_path.iterdir()), tmp_path / "there").glob("wheels/*/*.whl")}
    have = {tuple(re.sub("[-_.]+", "-", part.lower()) for part in name.split("-")[:2]) for name in wheels}
    wanted = {tuple(re.sub("[-_.]+", "-", part.lower()) for part in pin) for pin in pins("3.13").items()
              if pin[0] != "torch"}
    assert have == wanted
    assert any("-cp313-cp313-" in name for name in wheels)
    assert all(re.search("-cp313-cp313-|-cp3[0-9]+-abi3-|py3-none-", name) for name in wheels), sorted(wheels)


@slow
def test_it_works_where_there_is_no_network(real: Path, tmp_path: Path) -> None:
    """By INSTALL's three lines, all but torch; then by make install."""
    support.need(os.geteuid() == 0 and shutil.which("ip"), "a network namespace needs root and iproute2")
    support.need(not no_pods_because(), str(no_pods_because()))
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(tmp_path / "home"), "BUNDLE": str(real),
           "PLACE": str(tmp_path / "place"), "LANG": "C.UTF-8", "REPO": str(layout.REPO), "TESTS": sys.executable,
           "PYTHON": str(Path(sys.base_prefix, "bin/python%d.%d" % sys.version_info[:2]))}
    for name in ("home", "place"):
        (tmp_path / name).mkdir()
    done = subprocess.run(["unshare", "-n", "bash", "-c", INSIDE + LEPTON], env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("nothing was submitted") == len(list((layout.REPO / "profiles").glob("*.toml")))
    assert len(re.findall(r"^done in ", done.stdout, re.MULTILINE)) == 2  # here, and on the emulated Lepton
    assert len(re.findall(r"^\[\d\] airlift: rank \d of 2, sha256", done.stdout, re.MULTILINE)) == 2
    assert "ok       credentials" in done.stdout
    shutil.rmtree(tmp_path / "place")


# ---------------------------------------------------------------- the lightest form


def test_a_copied_handful_beside_a_checkout_says_what_it_lacks(tmp_path: Path) -> None:
    """What the README says to copy, and a Python without our libraries."""
    folder = layout.flat_folder(tmp_path / "checkout")
    assert sorted(path.name for path in folder.iterdir()) == sorted(layout.FLAT)
    layout.nemotron(folder)
    site = tmp_path / "site"
    for name in ("omegaconf", "yaml", "antlr4"):
        for path in Path(bundle.__file__).parent.glob(".venv/lib/python3.*/site-packages/%s*" % name):
            (site / path.name).parent.mkdir(exist_ok=True)
            os.symlink(path, site / path.name)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(site), "DOCKER_HOST": "unix:///x",
           "LEPTON_NODE_GROUP": "g", "LEPTON_STORAGE": "node-nfs:s"}
    python = Path(sys.base_prefix, "bin/python%d.%d" % sys.version_info[:2])
    if subprocess.run([python, "-c", "import leptonai"], capture_output=True, env=env).returncode == 0:
        pytest.fail("this Python has the SDKs: the test needs one without")

    def said(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([python, str(folder / "launch.py"), *words], env=env, capture_output=True, text=True)

    for profile in ("local", "docker", "lepton", "dgxcloud", "slurm"):
        done = said("nano3", "sft", profile, "--dry-run")
        assert done.returncode == 0, done.stderr
    done = said("nano3", "sft", "lepton")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2, done.stderr
    assert "a library cannot be imported by %s: No module" % python in done.stderr and "pip install" in done.stderr
    checked = said("check", "lepton")
    assert checked.returncode != 0 and re.search("failure  leptonai +is not installed", checked.stdout)
