"""Wheels that travel with the tree, and folders of them that pods see."""

import subprocess
import zipfile
from random import Random

import pytest
from cloud import EMULATED, cloud
from layout import flat_folder, launcher, recipe
from test_start import refusal

import wheels
from pod.process import install_commands


def wheel(folder, name="tiny_pkg", version="1.0", body="WORD = 'tiny'\n", needs=()):
    """A pure-Python wheel, made by hand."""
    path = folder / ("%s-%s-py3-none-any.whl" % (name, version))
    folder.mkdir(parents=True, exist_ok=True)
    meta = "%s-%s.dist-info/" % (name, version)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name + "/__init__.py", body)
        file.writestr(meta + "METADATA", "Metadata-Version: 2.1\nName: %s\nVersion: %s\n%s" % (
            name, version, "".join("Requires-Dist: %s\n" % need for need in needs)))
        file.writestr(meta + "WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(meta + "RECORD", "".join("%s,,\n" % name for name in file.namelist()) + meta + "RECORD,,\n")
    return path


def test_what_is_installed_from_what(tmp_path):
    tiny, other = wheel(tmp_path), wheel(tmp_path, "Other.Pkg", "2.1")
    both = {"wheels": [str(tmp_path / "*.whl")]}
    assert wheels.wheels({"pip_extras": ["a", "b>1"]}) == wheels.Wheels((), [], [], ["a", "b>1"])
    assert wheels.wheels(both) == wheels.Wheels((str(other), str(tiny)), ["wheels"], ["other-pkg==2.1", "tiny-pkg==1.0"], [])
    extras = ["Tiny_Pkg[x]>=1", "wandb", "git+https://h/x", "-i", "https://i"]
    found = wheels.wheels(both | {"pip_extras": extras})
    assert found.install == ["other-pkg==2.1", "Tiny_Pkg[x]>=1"] and found.extras == ["wandb", *extras[2:]]
    found = wheels.wheels({"wheels": ["/shared/wheels", str(tiny)], "pip_extras": ["a", "tiny-pkg"]})
    assert found == wheels.Wheels((str(tiny),), ["wheels", "/shared/wheels"], ["a", "tiny-pkg"], [])


@pytest.mark.parametrize(("named", "what"), [
    ("no/*.whl", "wheels names no/*.whl, and there is no such file"), ("house", "neither a wheel nor a folder"),
    ("/shared/w", "nothing says what to install from it"), ("odd.whl", "odd.whl is no wheel"),
    ("text-1.0-py3-none-any.whl", "text-1.0-py3-none-any.whl is no wheel"),
])
def test_what_is_no_wheel(tmp_path, monkeypatch, named, what):
    monkeypatch.chdir(tmp_path)
    for name in ("odd.whl", "text-1.0-py3-none-any.whl"):
        (tmp_path / name).write_text("x")
    assert what in refusal(wheels.wheels, {"wheels": [named]}).what


def test_a_wheel_that_no_job_can_carry(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "MAX_FILE", 100)
    assert "more than a job can carry" in refusal(wheels.wheels, {"wheels": [str(wheel(tmp_path))]}).what


def test_pip_or_uv_installs(tmp_path):
    """pip where the image has it; uv where that is all there is."""
    first, second = install_commands({"install": ["a==1", "b"], "links": ["wheels", "/sh ared"], "pip": ["c"]})
    assert first.endswith("airlift_pip --no-index --find-links \"$AIRLIFT_CODE\"/wheels --find-links '/sh ared' a==1 b")
    assert second.endswith("airlift_pip --find-links \"$AIRLIFT_CODE\"/wheels --find-links '/sh ared' c")
    said = {}
    for name, pip in (("pip", 0), ("uv", 1)):
        tools = tmp_path / name
        tools.mkdir()
        (tools / "python3").write_text('#!/bin/sh\n[ "$3" != --version ] || exit %d\necho python3 "$@"\n' % pip)
        (tools / "uv").write_text('#!/bin/sh\necho uv "$@"\n')
        for tool in ("python3", "uv"):
            (tools / tool).chmod(0o755)
        done = subprocess.run(["/bin/bash", "-c", first], env={"PATH": str(tools), "AIRLIFT_CODE": "/code"}, text=True,
                              capture_output=True)
        said[name] = done.stdout.replace(str(tools), "")
    words = "--no-index --find-links /code/wheels --find-links /sh ared a==1 b\n"
    assert said == {"pip": "python3 -m pip install --quiet " + words,
                    "uv": "uv pip install --quiet --python /python3 " + words}


USES = "import tiny_pkg, os\nprint('has', tiny_pkg.WORD, os.path.exists('wheels'), flush=True)\n"


def test_a_launch_carries_a_wheel(tmp_path):
    folder = flat_folder(tmp_path / "air")
    recipe(folder, "nano3/sft", USES, launch="direct", nodes=1, gpus=0)
    wheel(folder / "wheelhouse")
    site = str(tmp_path / "site")
    (folder / "profiles/here.toml").write_text(
        'executor = "local"\nwheels = ["wheelhouse/*.whl"]\nenv_vars = { PIP_TARGET = "%s", PYTHONPATH = "%s" }\n' % (
            site, site))
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "AIRLIFT_HOME": str(tmp_path / "state")}
    dry = launcher(folder, "nano3", "sft", "here", "--dry-run", env=env)
    assert "wheels that are sent: tiny_pkg-1.0-py3-none-any.whl" in dry.stdout
    listed = launcher(folder, "files", "nano3", "sft", "here", env=env)
    assert "wheels/tiny_pkg-1.0-py3-none-any.whl" in listed.stdout
    done = launcher(folder, "nano3", "sft", "here", env=env)
    assert done.returncode == 0 and "has tiny False" in done.stdout, done.stdout + done.stderr
    wheel(folder / "wheelhouse", needs=["not-there"])
    done = launcher(folder, "nano3", "sft", "here", env=env)
    assert done.returncode == 1 and "exit code 86" in done.stderr and "not-there" in done.stdout, done.stdout


@EMULATED
@pytest.mark.parametrize("where", ["sent", "on storage"])
def test_a_pod_without_a_network_installs_a_wheel(where, tmp_path, monkeypatch, capsys):
    for here in cloud("lepton", tmp_path, monkeypatch, capsys):
        house = tmp_path / "house" if where == "sent" else here.volume / "house"
        wheel(house)
        here.recipe("import socket\nassert socket.socket().connect_ex(('192.0.2.1', 80))\n" + USES)
        named = {"wheels": [str(house / "*.whl")]} if where == "sent" else {
            "wheels": ["/shared/house"], "pip_extras": ["tiny-pkg"]}
        here.profile(env_vars={"PIP_TARGET": "/tmp/site", "PYTHONPATH": "/tmp/site"}, **named)
        result = here.launch()
        assert result.code == 0 and "has tiny False" in result.out, result.out + result.err


def test_the_wheels_count_in_the_budget(tmp_path, monkeypatch, capsys):
    for here in cloud("lepton", tmp_path, monkeypatch, capsys):
        wheel(tmp_path / "house", body="x = %r\n" % Random(1).randbytes(1_300_000))
        here.profile(wheels=[str(tmp_path / "house/*.whl")])
        result = here.launch()
        assert result.code == 3 and "wheels/tiny_pkg-1.0-py3-none-any.whl" in result.err and here.posts == []


def test_a_checkout_cannot_name_wheels(tmp_path):
    folder = flat_folder(tmp_path / "air")
    recipe(folder, "nano3/sft", USES, launch="direct", nodes=1, gpus=0, yaml="run: {env: {wheels: [/tmp/*.whl]}}\n")
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "AIRLIFT_HOME": str(tmp_path / "state")}
    done = launcher(folder, "nano3", "sft", "local", "--dry-run", env=env)
    assert done.returncode == 2 and "run.env of the config sets wheels, which only a profile or the command line may" in done.stderr
