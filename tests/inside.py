"""The launcher in this process, in a world of a test's own: what the tests of its modules share."""

import contextlib
import io
import json
import os
import shutil

import pytest
from layout import REPO, header, nemotron, write

import jobs
import launch
import prepare
import profiles
import state
from transport import Refusal

FAMILY = ["nano3", "sft"]
CONFIGS = "src/nemotron/recipes/nano3/stage1_sft/config"


def refusal(call, *args, **kwargs):
    """The Refusal of a call, for bad words, profiles, recipes or configs."""
    with pytest.raises(Refusal) as caught:
        call(*args, **kwargs)
    assert caught.value.code == 2
    return caught.value


def checkout(tmp_path, monkeypatch):
    """A checkout whose folder the launcher takes for its own, with the shipped profiles and an empty HOME."""
    root = nemotron(tmp_path / "checkout")
    shutil.copytree(REPO / "profiles", root / "profiles", ignore=shutil.ignore_patterns("__pycache__"))
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(prepare, "HERE", root)
    monkeypatch.chdir(home)
    monkeypatch.setattr(profiles, "FOLDER", root / "profiles")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("AIRLIFT_HOME", str(home / "airlift"))
    for name in list(os.environ):
        if name.startswith(("LEPTON_", "RUNAI_", "SLURM_")) or name in jobs.TOKENS or jobs.LOOKS_NEEDED.match(name):
            monkeypatch.delenv(name)
    return root


def speaker(capsys):
    """Runs launch.main: (exit code, stdout, stderr)."""

    def run(*words):
        code = launch.main([str(word) for word in words])
        out = capsys.readouterr()
        assert "Traceback" not in out.out + out.err
        return code, out.out, out.err

    return run


def allow(*paths):
    """Those env.tomls were allowed, as `launch.py allow` does it, whatever they hold."""
    state.write(state.folder() / "allowed.json", json.dumps([*profiles.allowed(), *map(str, paths)]).encode())


def plan_of(say, *words):
    """The JSON of a launch that could be."""
    code, out, err = say(*words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


KEYS = {
    "recipe": {"name", "script", "launch", "nodes", "gpus_per_node", "nproc_per_node", "image"},
    "profile": {"name", "executor", "files"}, "config": {"path", "sha256", "bytes", "text"},
    "payload": {"files", "tar_bytes", "encoded_chars", "sha256", "compression", "chunks", "chunk_limit", "env_bytes",
                "env_limit", "object_bytes", "object_limit", "fits"},
}


def check_shape(plan):
    """A plan as JSON has exactly the keys that were promised."""
    assert set(plan) == {*KEYS, "env", "argv", "command", "notes"}
    for name, keys in KEYS.items():
        assert set(plan[name]) == keys
    assert all(isinstance(value, str) for value in plan["env"].values())


# ---------------------------------------------------------------- with an env.toml

PROFILE = """
[mine]
executor = "lepton"
node_group = "g"
resource_shape = "gpu.8xh100-80gb"
container_image = "image:1"
workspace = "/shared"
gpus_per_node = 2
"""


def shown(root, *words, profile="", env=None):
    """What a command says as JSON, in a checkout whose env.toml has the profile `mine`, and `profile` at its end."""
    write(root / "env.toml", PROFILE + profile)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(root)
        patch.setenv("NEMOTRON_ENV_FILE", str(root / "env.toml"))
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        assert launch.main([*map(str, words), "--repo-root", str(root), "--json"]) == 0
    return json.loads(out.getvalue())


def swapped(tmp_path, yaml, body=None):
    """A checkout with a second script beside that of nano3/sft, test_train.py, and a config `test`."""
    root = nemotron(tmp_path)
    folder = root / "src/nemotron/recipes/nano3/stage1_sft"
    other = header("nano3/sft-test", launch="python", nodes=2, gpus=1)
    (folder / "test_train.py").write_text(other if body is None else body)
    write(folder / "config/test.yaml", yaml)
    return root
