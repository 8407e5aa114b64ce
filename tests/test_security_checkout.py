"""What a checkout, an env.toml that lies somewhere, and other users of this machine may do (SECURITY.md): each test is an
attack. Where it needs another user, one is made of root, as CI is."""

import ast
import contextlib
import json
import os
import resource
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import inside
import pytest
import support
from layout import FLAT, REPO, recipe, write
from support import as_nobody

import launch
import profiles
import screen
import state

YAML = inside.CONFIGS + "/default.yaml"
NEEDED = {
    "local": "", "docker": 'container_image = "i"\n', "lepton": 'node_group = "g"\nresource_shape = "s"\n',
    "slurm": 'account = "a"\npartition = "p"\nremote_job_dir = "/j"\n',
    "dgxcloud": 'base_url = "%s"\nclient_id = "i"\nclient_secret = "of-the-client"\nproject_name = "p"\n'
                'workspace = "/w"\npvcs = [{claimName = "c", path = "/w"}]\ncontainer_image = "i"\n',
}


@pytest.fixture
def server():
    """A host that would like to be sent something."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, dict(self.headers), self.rfile.read(int(self.headers.get("Content-Length") or 0))))
            self.send_error(404)

        do_POST = do_PUT = do_GET

        def log_message(self, *words):
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        Thread(target=listening.serve_forever, daemon=True).start()
        yield SimpleNamespace(url="http://127.0.0.1:%d" % listening.server_port, asked=asked)
        listening.shutdown()


def profile(here, name, executor, text="", **values):
    needed = NEEDED[executor] % values.get("url", "http://127.0.0.1:1") if executor == "dgxcloud" else NEEDED[executor]
    return write(here / "profiles" / (name + ".toml"), 'executor = "%s"\n%s%s' % (executor, needed, text))


def env_of(here, **keys):
    """The config's run.env, as somebody else has written it."""
    write(here / YAML, json.dumps({"run": {"env": keys}}))


# ---------------------------------------------------------------- what a YAML may not set

VALUES = {
    "base_url": "https://evil/api/v1", "kube_apiserver_url": "https://evil", "client_id": "x", "client_secret": "x",
    "project_name": "x", "ca_bundle": "/tmp/evil.pem", "tunnel": "ssh", "host": "evil", "user": "evil", "port": 1,
    "identity": "/tmp/evil", "remote_job_dir": "/evil", "setup_lines": "rm -rf ~", "git_mirrors": {"https://a/": "https://evil/"},
    "secrets": {"MY_DB_PASS": "env"}, "image_pull_secrets": ["x"], "existing_ray_cluster": "evil",
    "custom_spec": {"hostNetwork": True}, "runtime": "evil", "ipc_mode": "host", "lustre_mount": "/:/host",
    "pvcs": [{"claimName": "x", "path": "/x"}], "sbatch": {"uid": "0"}, "srun": {"task-prolog": "/evil"},
    "include": [".env"], "wheels": ["/home/*/private.whl"], "labels": {"a": "b"}, "annotations": {"a": "b"},
    "tolerations": [{"key": "master", "operator": "Exists"}], "host_network": True, "security": {"privileged": True},
    "visibility": "public", "notify": "curl evil", "extended_resources": {"evil.com/host": 1},
}


def test_every_key_that_a_yaml_may_not_set_is_attacked_below():
    assert set(VALUES) == set(profiles.PROFILES_ONLY)
    assert all(isinstance(profiles.KEYS[key].executors, tuple) for key in VALUES)
    said = {key: profiles.KEYS[key].about for key in profiles.KEYS if key not in VALUES}
    assert not [key for key, about in said.items() if "URL" in about or "secret" in about or "certificate" in about]


@pytest.mark.parametrize("key", VALUES)
def test_a_connection_credential_or_host_key_of_a_yaml_is_refused_by_name(here, say, key):
    executor = (profiles.KEYS[key].executors or ("lepton",))[0]
    for name in [key, *(name for name, one in profiles.KEYS.items() if one.alias == key)]:
        env_of(here, **{name: VALUES[key]})
        ssh = key in ("host", "user", "port", "identity")  # of no use without it: NVIDIA's own evals set host
        profile(here, "p", executor, "")
        assert not ssh or say("nano3", "sft", "p", "--dry-run")[0] == 0
        profile(here, "p", executor, 'tunnel = "ssh"\n' * ssh)
        text = (here / "profiles/p.toml").read_text()
        write(here / "profiles/p.toml", "".join(line + "\n" for line in text.splitlines() if not line.startswith(key + " ")))
        outranked = key in profiles.REQUIRED[executor]
        if outranked:  # the profile has it, and wins
            write(here / "profiles/p.toml", text)
        code, out, err = say("nano3", "sft", "p", "--dry-run")
        if outranked:
            assert code == 0 and "evil" not in out
        else:
            assert (code, out) == (2, "")
            assert err.startswith("airlift: run.env of the config sets %s, which only a profile or the command" % name), err
            assert "run.env.%s=" % name in err


@pytest.mark.parametrize("key", ["secrets", "git_mirrors", "custom_spec"])
def test_a_table_of_a_yaml_is_not_merged_under_the_profiles(here, say, key):
    env_of(here, **{key: VALUES[key]})
    profile(here, "p", "lepton", '[%s]\nMINE = "env"\n' % key)
    code, _, err = say("nano3", "sft", "p", "--dry-run")
    assert code == 2 and "sets " + key in err


def test_the_person_may_say_it_on_the_command_line(here, say):
    profile(here, "p", "lepton")
    plan = inside.plan_of(say, "nano3", "sft", "p", "run.env.secrets.MY_DB_PASS=env")
    assert plan["env"]["MY_DB_PASS"].startswith("<unset")
    env_of(here, secrets={"OTHER": "env"})
    assert say("nano3", "sft", "p", "run.env.secrets.MINE=env", "--dry-run")[0] == 2


def test_keys_of_another_executor_and_placeholders_are_passed_over(here, say):
    """NVIDIA's configs for evaluation have them, for what their profile fills in."""
    env_of(here, host="${oc.env:HOSTNAME,localhost}", user="${oc.env:USER}", remote_job_dir="${oc.env:PWD}/x", client_id=None)
    profile(here, "p", "lepton")
    profile(here, "s", "slurm", 'tunnel = "ssh"\nhost = "login"\nuser = "me"\n')
    assert say("nano3", "sft", "p", "--dry-run")[0] == say("nano3", "sft", "s", "--dry-run")[0] == 0


@pytest.mark.parametrize("key", ["kube_apiserver_url", "base_url"])
def test_a_check_sends_no_token_to_the_host_of_a_yaml(here, say, server, key, monkeypatch):
    profile(here, "p", "dgxcloud")
    env_of(here, **{key: server.url})
    code = say("check", "nano3", "sft", "p")[0]
    assert code and server.asked == []


# ---------------------------------------------------------------- what a config may read


@pytest.mark.parametrize("name", ["MY_DB_PASS", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "SSH_PASSPHRASE"])
@pytest.mark.parametrize("how", ["${oc.env:%s}", "${env:%s}", "x${oc.env:%s,}", "${oc.env:GONE,${oc.env:%s}}"])
def test_a_secret_of_the_environment_is_not_given_to_a_config(here, say, monkeypatch, name, how):
    monkeypatch.setenv(name, "hunter2-hunter2")
    for keys in ({"env_vars": {"X": how % name}}, {"container_image": how % name}, {"startup_commands": ["curl " + how % name]}):
        env_of(here, **keys)
        code, out, err = say("nano3", "sft", "local", "--dry-run")
        assert code == 2 and out == "" and "hunter2" not in err
        assert "run.env of the config reads %s, which looks like a secret" % name in err


def test_a_secret_by_its_value_and_other_variables_are_named(here, say, monkeypatch):
    env_of(here, env_vars={"X": "${oc.env:DATABASE_URL}"})
    monkeypatch.setenv("DATABASE_URL", "postgres://me:hunter2-hunter2@db/x")
    assert "reads DATABASE_URL, which looks like a secret" in say("nano3", "sft", "local", "--dry-run")[2]
    monkeypatch.setenv("DATABASE_URL", "postgres://db/x")
    plan = inside.plan_of(say, "nano3", "sft", "local")
    assert plan["env"]["X"] == "postgres://db/x"
    assert "run.env of the config uses the value that DATABASE_URL has here" in plan["notes"]


def test_the_person_may_give_it(here, say, monkeypatch):
    monkeypatch.setenv("MY_DB_PASS", "hunter2-hunter2")
    assert inside.plan_of(say, "nano3", "sft", "local", "run.env.env_vars.X=${oc.env:MY_DB_PASS}")["env"]["X"] == "***"


@pytest.mark.parametrize("text", ["${run.env.client_secret}", "${run.env}", "x ${run.env.client_secret} y", "${run}",
                                  "${run.env.git_mirrors}", "${run.env.setup_lines}", "${run.wandb.api_key}", "${run.wandb}"])
def test_a_config_cannot_read_the_credentials_of_a_profile(here, say, text, monkeypatch):
    """It would carry them to the pod."""
    write(here / YAML, json.dumps({"x": text, "run": {"y": text}}))
    monkeypatch.setenv("NEMOTRON_ENV_FILE", str(write(here / "mine.toml", '[wandb]\napi_key = "of-the-wandb"\nproject = "w"\n')))
    profile(here, "p", "dgxcloud", '[git_mirrors]\n"https://a/" = "https://me:of-the-mirror@b/"\n')
    profile(here, "s", "slurm", 'setup_lines = "export X=of-the-lines"\n')
    monkeypatch.setattr(screen, "hide", lambda text: text)
    for name in ("p", "s"):
        code, out, err = say("nano3", "sft", name, "--json")
        assert code == 0, err
        for word in ("of-the-client", "of-the-mirror", "of-the-lines", "of-the-wandb"):
            assert word not in json.loads(out)["config"]["text"]


def test_mounts_of_a_config_are_refused_or_shown(here, say):
    env_of(here, mounts=["/:/host", "${auto_mount:git+https://h/x@main,/x}"])
    profile(here, "d", "docker")
    profile(here, "s", "slurm", 'container_image = "i"\n')
    code, _, err = say("nano3", "sft", "d", "--dry-run")
    assert code == 2 and "run.env of the config mounts /:/host of this machine into the container" in err
    assert inside.plan_of(say, "nano3", "sft", "d", 'run.env.mounts=["/data:/data"]')
    assert "the config, not your profile, mounts /:/host" in inside.plan_of(say, "nano3", "sft", "s")["notes"]


# ---------------------------------------------------------------- files outside of the tree


@pytest.fixture
def private(here):
    return write(here.parent / "home/.config/private.yaml", "password: hunter2-hunter2\n")


@pytest.mark.parametrize("how", ["defaults", "defaults list", "folder", "link", "link to a folder", "default"])
def test_a_config_brings_in_no_file_from_elsewhere(here, say, private, how):
    beside = here / inside.CONFIGS
    up = os.path.relpath(private.parent, beside)
    if how.startswith("defaults"):
        write(here / YAML, "defaults: %s\n" % json.dumps(up + "/private" if how == "defaults" else [up + "/private.yaml"]))
    elif how == "link":
        (here / YAML).unlink()
        (here / YAML).symlink_to(private)
    elif how == "link to a folder":
        shutil.rmtree(beside)
        beside.symlink_to(private.parent)
        private.rename(private.parent / "default.yaml")
    else:
        recipe(here, path="src/nemotron/recipes/nano3/stage1_sft/train.py", **(
            {"config_dir": str(private.parent), "default": "private"} if how == "folder" else
            {"default": os.path.relpath(private, beside)}))
    code, out, err = say("nano3", "sft", "local", "--dry-run")
    assert code == 2 and "hunter2" not in out + err and "lies outside of the source tree" in err, (out, err)


def test_the_persons_own_config_may_lie_anywhere(here, say, private):
    write(private, "plain: hunter2-hunter2\n")
    write(private.parent / "mine.yaml", "defaults: private\n")
    assert "hunter2" in inside.plan_of(say, "nano3", "sft", "local", "-c", private.parent / "mine.yaml")["config"]["text"]


@pytest.mark.parametrize("link", ["src", "src/evil", "src/nemotron/recipes"])
def test_a_folder_that_is_a_link_out_of_the_tree(tmp_path, link):
    """Neither searched, which would take hours, nor sent."""
    root, home = tmp_path / "checkout", tmp_path / "home"
    for name in ("evil", "nemotron"):
        recipe(home, "a/b", path="src/%s/recipes/a/b.py" % name)
    root.mkdir()
    (root / link).parent.mkdir(parents=True, exist_ok=True)
    (root / link).symlink_to(home / link)
    for words in (("list",), ("files", "a", "b"), ("a", "b", "local", "--dry-run")):
        done = started(*words, "--repo-root", root)
        assert done.returncode == 2 and "is a link that leaves the tree" in done.stderr, done.stderr


def started(*words, **more):
    """launch.py as a process of its own, with little memory and time."""
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(pytest.MonkeyPatch.context())
        home.setenv("AIRLIFT_HOME", more.pop("home", "/nowhere/airlift"))
        return subprocess.run([sys.executable, str(REPO / "launch.py"), *map(str, words)], capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=60, preexec_fn=lambda: resource.setrlimit(
                                  resource.RLIMIT_AS, (1 << 30, 1 << 30)), **more)


# ---------------------------------------------------------------- reading ends


def test_list_on_a_hostile_tree_ends(tmp_path, monkeypatch):
    folder = recipe(tmp_path, "good/one").parent
    (folder / "zero.py").symlink_to("/dev/zero")
    (folder / "full.py").symlink_to("/dev/stdin")
    os.mkfifo(folder / "pipe.py")
    (folder / "folder.py").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        monkeypatch.chdir(folder)  # a socket's path must be short
        bound.bind("bound.py")
    with open(folder / "sparse.py", "wb") as file:
        os.truncate(file.fileno(), 10 << 30)
    start = "# /// script\n# [tool.runspec]\n"
    write(folder / "lines.py", start + "#\n" * 130_000)
    write(folder / "starts.py", "# /// script\n" * 90_000 + start)
    write(folder / "dots.py", start + "# %s = 1\n# ///\n" % ".".join("a" * 130_000))
    write(folder / "deep.py", start + "# a = %s\n# ///\n" % ("[" * 100_000))
    (folder / "round").symlink_to("..")
    begun = time.monotonic()
    done = started("list", "--repo-root", tmp_path)
    assert time.monotonic() - begun < 20
    assert done.returncode == 2 and "one" in done.stdout
    assert set(filter(None, (line.partition("airlift: ")[2].rpartition("/")[2].partition(":")[0]
                             for line in done.stderr.splitlines()))) == {"lines.py", "dots.py", "deep.py"}


@pytest.mark.parametrize("harm", ["sparse", "fifo", "zero", "socket", "aliases", "merges", "strings", "references", "deep", "itself"])
def test_a_hostile_config_is_read_to_an_end(tmp_path, monkeypatch, harm):
    folder = recipe(tmp_path, "a/b").parent
    path = folder / "config/default.yaml"
    bomb = ["&n0 [x,x,x,x,x,x,x,x,x,x]", *("&n%d [%s]" % (n, ",".join(["*n%d" % (n - 1)] * 10)) for n in range(1, 10))]
    text = {
        "aliases": "".join("a%d: %s\n" % pair for pair in enumerate(bomb)),
        "merges": "m0: &m0 {a: 1}\n" + "".join("m%d: &m%d {<<: [%s]}\n" % (n, n, ",".join(["*m%d" % (n - 1)] * 10)) for n in range(1, 10)),
        "strings": "a: &a %s\nb: [%s]\n" % ("x" * 900_000, ",".join(["*a"] * 9_000)),
        "references": "run: {a: %s}\nb: '%s'\n" % ("x" * 500_000, "${run.a}" * 50_000),
        "deep": "a: " + "[" * 100_000, "itself": "a: &a [*a]\n",
    }.get(harm)
    path.unlink()
    if text:
        path.write_text(text)
    elif harm == "sparse":
        path.touch()
        os.truncate(path, 10 << 30)
    elif harm == "fifo":
        os.mkfifo(path)
    elif harm == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            monkeypatch.chdir(path.parent)  # a socket's path must be short
            bound.bind(path.name)
    else:
        path.symlink_to("/dev/zero")
    if harm in ("fifo", "zero", "socket"):  # which no config is; a parent is found by its name alone
        write(folder / "config/top.yaml", "defaults: default\n")
    begun = time.monotonic()
    done = started("a", "b", "local", "--dry-run", "--repo-root", tmp_path, *(["-c", "top"] if not text and harm != "sparse" else []))
    assert time.monotonic() - begun < 30
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2 and "a bug" not in done.stderr, done.stderr[:500]


def test_an_ignore_file_without_end(tmp_path):
    recipe(tmp_path, "a/b")
    (tmp_path / ".airliftignore").touch()
    os.truncate(tmp_path / ".airliftignore", 10 << 30)
    assert "has more than 1 MiB" in started("files", "a", "b", "--repo-root", tmp_path).stderr


# ---------------------------------------------------------------- nothing is executed


@pytest.mark.parametrize("words", [["list"], ["files", "nano3", "sft"], ["nano3", "sft", "local", "--dry-run"],
                                   ["nano3", "sft", "local", "--json"], ["check", "nano3", "sft", "local"]])
def test_nothing_of_a_checkout_is_executed(here, tmp_path, words):
    mark = tmp_path / "EXECUTED"
    evil = "open(%r, 'w')\n" % str(mark)
    for name in ("src/nemotron/__init__.py", "src/nemotron/recipes/__init__.py", "conftest.py", "sitecustomize.py", "yaml.py",
                 "omegaconf.py", "src/sitecustomize.py", "src/yaml.py", "profiles/__init__.py", "setup.py", "env.py"):
        write(here / name, evil)
    script = here / "src/nemotron/recipes/nano3/stage1_sft/train.py"
    script.write_text(script.read_text() + evil)
    write(here / YAML, "_target_: os.system\nx: '${eval:1}'\ny: ${oc.env:PWD}\n")
    done = started(*words, "--repo-root", here, cwd=here)
    assert done.returncode in (0, 2) and not mark.exists(), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch %s']", "!!python/name:os.system ''",
                                 "!!python/object/new:os.system ['touch %s']", "!!python/module:os ''"])
def test_tags_of_yaml_make_no_objects(here, say, tmp_path, tag):
    write(here / YAML, "a: %s\n" % (tag % (tmp_path / "EXECUTED") if "%s" in tag else tag))
    assert say("nano3", "sft", "local", "--dry-run")[0] == 2
    assert not (tmp_path / "EXECUTED").exists()


# ---------------------------------------------------------------- an env.toml that merely lies there

EVIL = '[dgxcloud]\nexecutor = "dgxcloud"\nbase_url = "%s"\nclient_id = "i"\nproject_name = "p"\n' \
       'client_secret = "${env:RUNAI_CLIENT_SECRET}"\n[fresh]\nexecutor = "local"\nnodes = 3\n'


@pytest.fixture
def stood_in(here, monkeypatch, server):
    """A folder that is merely stood in, below one with somebody's env.toml."""
    path = write(here.parent / "shared/env.toml", EVIL % server.url)
    (path.parent / "deep").mkdir()
    monkeypatch.chdir(path.parent / "deep")
    monkeypatch.delenv("NEMOTRON_ENV_FILE", raising=False)
    monkeypatch.setenv("RUNAI_CLIENT_SECRET", "hunter2-hunter2")
    return path


def test_it_is_not_used_and_named(here, say, stood_in, server):
    code, out, err = say("check", "dgxcloud")
    assert code and server.asked == [], "no secret was sent"
    assert str(here / "profiles/dgxcloud.toml") in out and str(stood_in) not in out.partition("\n")[0]
    assert say("fresh", "sft", "fresh")[0] == 2
    code, _, err = say("nano3", "sft", "fresh", "--dry-run")
    assert code == 2 and err.endswith("python launch.py allow %s\n" % stood_in)
    assert any(str(stood_in) in note for note in inside.plan_of(say, "nano3", "sft", "local")["notes"])
    assert "fresh" not in [row["name"] for row in json.loads(say("profiles", "--json")[1])]
    assert "note: %s is not used" % stood_in in say("profiles")[1]


@pytest.mark.parametrize("named", [True, False])
def test_once_allowed_it_is_used_also_after_changes(here, say, stood_in, named):
    code, out, _ = say("allow", *([stood_in] if named else []))
    assert (code, out) == (0, "%s is used from now on; its profiles: dgxcloud, fresh; they replace the shipped dgxcloud\n" % stood_in)
    plan = inside.plan_of(say, "nano3", "sft", "fresh")
    assert plan["recipe"]["nodes"] == 3 and plan["profile"]["files"] == [str(stood_in)]
    write(stood_in, '[fresh]\nexecutor = "local"\nnodes = 4\n[other]\nextends = "local"\n')
    assert inside.plan_of(say, "nano3", "sft", "fresh")["recipe"]["nodes"] == 4
    assert inside.plan_of(say, "nano3", "sft", "other")["profile"]["files"] == [str(stood_in), str(here / "profiles/local.toml")]
    assert "not used" not in say("profiles")[1]


def test_a_word_is_for_one_path(here, say, stood_in, monkeypatch):
    say("allow", stood_in)
    other = here.parent / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    write(other / "env.toml", stood_in.read_text())
    assert say("nano3", "sft", "fresh", "--dry-run")[0] == 2
    (other / "env.toml").unlink()
    (other / "env.toml").symlink_to(stood_in)  # which leads to what was allowed
    assert inside.plan_of(say, "nano3", "sft", "fresh")["profile"]["files"] == [str(stood_in)]
    stood_in.unlink()
    stood_in.symlink_to(write(other / "evil.toml", EVIL % "http://h"))
    assert say("nano3", "sft", "fresh", "--dry-run")[0] == 2


def test_the_variable_is_the_persons_word(here, say, stood_in, monkeypatch):
    monkeypatch.setenv("NEMOTRON_ENV_FILE", str(stood_in))
    assert inside.plan_of(say, "nano3", "sft", "fresh")["profile"]["files"] == [str(stood_in)]


def test_what_cannot_be_allowed(here, say, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert say("allow")[2].startswith("airlift: no env.toml is found upwards from here\n")
    assert say("allow", tmp_path / "gone")[2].startswith("airlift: there is no file ")
    assert say("allow", write(tmp_path / "bad", "x ="))[2].startswith("airlift: %s is not TOML" % (tmp_path / "bad"))
    assert not list(here.parent.glob("home/airlift/*"))


def test_each_file_of_a_profile_is_named_whole(here, say):
    profile(here, "p", "local", "")
    write(here / "profiles/q.toml", 'extends = "p"\n')
    whole = "%s, %s" % (here / "profiles/q.toml", here / "profiles/p.toml")
    recipe(here, "nano3/quick", "print(1)", launch="direct", nodes=1, gpus=0)
    assert "  profile  %s\n" % whole in say("nano3", "quick", "q", "--dry-run")[1]
    assert "q, executor local, from %s\n" % whole in say("check", "q")[1]
    assert inside.plan_of(say, "nano3", "quick", "q")["profile"]["files"] == whole.split(", ")
    code, out, err = say("nano3", "quick", "q")
    assert code == 0 and out.splitlines()[1] == "profile from " + whole, out + err


# ---------------------------------------------------------------- what reaches the terminal

ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e\r"


def raw(text):
    return [c for c in text if not c.isprintable() and c != "\n"]


def test_no_name_of_a_checkout_reaches_the_terminal_raw(here, say, monkeypatch):
    folder = "src/nemotron/recipes/nano3/%s" % ESCAPE
    recipe(here, "nano3/evil", "", path=folder + "/train%s.py" % ESCAPE, image="i" + ESCAPE, launch="direct", nodes=1, gpus=0,
           yaml=json.dumps({"run": {"env": {"env_vars": {"X": ESCAPE}, "bad" + ESCAPE: 1}}}))
    write(here / folder / ("data%s.json" % ESCAPE), "{}")
    write(here / folder / (".env." + ESCAPE), "x")
    write(here / folder / ("broken%s.py" % ESCAPE), "# /// script\n# [tool.runspec]\n# x%s = 1\n" % ESCAPE)
    env_toml = write(here / ("p%s.toml" % ESCAPE), '["p%s"]\nexecutor = "local"\nextends = "gone"\n' % ESCAPE.encode("unicode_escape").decode()
                     .replace("\\x", "\\u00"))
    monkeypatch.setenv("NEMOTRON_ENV_FILE", str(env_toml))
    monkeypatch.chdir(here)
    for words in (["list"], ["profiles"], ["files", "nano3", "evil"], ["nano3", "evil", "local", "--dry-run"],
                  ["check", "nano3", "evil", "local"], ["allow", env_toml], ["nano3", "evil", "p" + ESCAPE, "--dry-run"],
                  ["nano3", "evil", "local", "-c", "x" + ESCAPE, "--dry-run"], ["list", "no" + ESCAPE],
                  ["nano3", "evil", "local", "--dry-run", "--debug", "-c", "x" + ESCAPE]):
        code = launch.main([*map(str, words), *([] if words[0] in ("profiles", "allow") else ["--repo-root", str(here)])])
        out, err = say.__closure__[0].cell_contents.readouterr()
        assert not raw(out + err), (words, out + err)
        assert code == 0 or err


def test_nor_does_that_of_a_run(here, say):
    name = "src/nemotron/recipes/nano3/stage1_sft/data%s.json" % ESCAPE
    recipe(here, "nano3/quick", "print(1)", path="src/nemotron/recipes/nano3/stage1_sft/quick.py", launch="direct", nodes=1, gpus=0)
    code, out, err = say("nano3", "quick", "local", "--repo-root", here)
    assert code == 0, err
    write(here / name, "{}")
    code, out, err = say("diff", out.split("run ")[1].split("\n")[0])
    assert code == 0 and "\\x1b" in out and not raw(out + err)


# ---------------------------------------------------------------- other users of this machine


@pytest.fixture
def anyone(tmp_path):
    """A place that another user reaches."""
    support.need(os.geteuid() == 0, "only root can become another user")
    place = Path("/tmp/airlift-attack-%d" % os.getpid())
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    yield place
    shutil.rmtree(place)


PLANTED = {"id": "t23456", "recipe": "a/b", "profile": "p", "executor": "slurm", "nodes": 1, "sha256": "0" * 64, "started": 1.0,
           "record": {"host": {"name": "", "user": "", "port": None, "identity": None}, "name": "x", "folder": "/x",
                      "secrets": False, "job": "1; touch %s"}}


@pytest.mark.parametrize("umask", [0o000, 0o002])
def test_another_user_plants_no_run(anyone, say, here, monkeypatch, umask):
    """It would have been a command of ours, run by `status`."""
    monkeypatch.setenv("AIRLIFT_HOME", str(anyone / "state"))
    recipe(here, "nano3/quick", "print(1)", launch="direct", nodes=1, gpus=0)
    before = os.umask(umask)
    try:
        assert say("nano3", "quick", "local", "--repo-root", here)[0] == 0
    finally:
        os.umask(before)
    text = json.dumps(PLANTED).replace("%s", str(anyone / "OWNED"))
    assert "PermissionError" in as_nobody(lambda: (anyone / "state/runs/t23456.json").write_text(text)), "it is no folder of theirs"
    assert {stat.S_IMODE(path.lstat().st_mode) & 0o077 for path in [anyone / "state", *(anyone / "state").rglob("*")]} == {0}


def test_a_state_that_another_user_has_prepared_is_not_believed(anyone, say, monkeypatch):
    text = json.dumps(PLANTED).replace("%s", str(anyone / "OWNED"))
    monkeypatch.setenv("AIRLIFT_HOME", str(anyone / "theirs"))
    assert as_nobody(lambda: write(anyone / "theirs/runs/t23456.json", text)) == ""
    for words in (["status"], ["status", "t23456"], ["logs", "t23456"], ["cancel", "t23456"], ["profiles"]):
        code, _, err = say(*words)
        assert code == 2 or words == ["profiles"]
        assert "belongs to another user" in err or words == ["profiles"]
    monkeypatch.setenv("AIRLIFT_HOME", str(anyone / "ours"))
    state.folder("runs")
    (anyone / "ours").chmod(0o711)
    (anyone / "ours/runs").chmod(0o777)
    assert as_nobody(lambda: write(anyone / "ours/runs/t23456.json", text)) == ""
    assert "can be changed by other users" in say("status", "t23456")[2]
    (anyone / "ours/runs").chmod(0o700)  # the person has put it right, and their file is still there
    assert "belongs to another user" in say("status", "t23456")[2]
    assert not (anyone / "OWNED").exists()


def test_nor_is_their_list_of_allowed_files(anyone, say, here, stood_in, monkeypatch):
    monkeypatch.setenv("AIRLIFT_HOME", str(anyone / "state"))
    assert as_nobody(lambda: write(anyone / "state/allowed.json", json.dumps([str(stood_in)]))) == ""
    code, _, err = say("nano3", "sft", "local", "--dry-run")
    assert code == 2 and "belongs to another user" in err


SBATCH = "#!/bin/sh\numask >%s/umask\nls -lR %s >%s/listed\necho 4711\n"


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_a_password_in_setup_lines_lies_in_no_file_that_others_read(anyone, here, monkeypatch, umask):
    """Its batch script is written by nemo-run, with the umask's mode. sbatch gets the person's own umask."""
    tools, base = anyone / "bin", anyone / "jobs"
    write(tools / "sbatch", SBATCH % (anyone, base, anyone)).chmod(0o755)
    for name in ("sacct", "scontrol", "squeue"):
        write(tools / name, "#!/bin/sh\nexit 0\n").chmod(0o755)
    text = 'executor = "slurm"\naccount = "a"\npartition = "p"\nremote_job_dir = "%s"\nsetup_lines = "export X=${env:MY_DB_PASS}"\n'
    env = os.environ | {"MY_DB_PASS": "hunter2-hunter2", "NEMOTRON_ENV_FILE": str(write(here / "e.toml", "[s]\n" + text % base)),
                        "PATH": "%s:%s" % (tools, os.environ["PATH"]), "NEMORUN_HOME": str(anyone / "nemo"),
                        "AIRLIFT_HOME": str(anyone / "state"), "HOME": str(anyone / "home")}
    recipe(here, "nano3/quick", "print(1)", launch="direct", nodes=1, gpus=0)
    done = subprocess.run([sys.executable, str(REPO / "launch.py"), "nano3", "quick", "s", "--detach", "--repo-root", str(here)],
                          env=env, capture_output=True, text=True, preexec_fn=lambda: os.umask(umask))
    assert done.returncode == 0, done.stderr
    assert int((anyone / "umask").read_text(), 8) == umask
    holding = [path for path in anyone.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert holding, "the batch script has it"

    def read():
        for path in holding:
            with contextlib.suppress(PermissionError):
                path.read_bytes()
                os._exit(7)

    assert as_nobody(read) == ""
    assert stat.S_IMODE((anyone / "nemo").stat().st_mode) == 0o700
    assert stat.S_IMODE((anyone / "nemo/.airlift.lock").stat().st_mode) == 0o600
    assert not [path for path in (anyone / "nemo").rglob("*") if path.lstat().st_mode & 0o022]
    (anyone / "nemo").chmod(0o777)  # what nemo-run would make objects of
    done = subprocess.run([sys.executable, str(REPO / "launch.py"), "nano3", "quick", "s", "--detach", "--repo-root", str(here)],
                          env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "nemo can be changed by other users" in done.stderr


# ---------------------------------------------------------------- secrets on the screen


@pytest.mark.parametrize("url", [
    "postgres://me:hunter2@db/x", "redis://:hunter2@h:6379/0", "ssh://hunter2@h/x", "svn+ssh://me:hunter2@h", "ftp://me:hun@hunter2@h",
    "https://me:hun/hunter2@h/x", "mongodb+srv://me:a/b@c/hunter2@h/x?y=1", "HTTPS://ME:hunter2@H", "s3://key:a+/hunter2=@bucket"])
def test_who_logs_in_is_hidden_in_every_url(url):
    for text in (url, "see <%s>, or" % url, json.dumps({"a": [url]}), "A=%s B=2" % url):
        assert "hunter2" not in screen.hide(text) and "***@" in screen.hide(text)


@pytest.mark.parametrize("text", ["git+https://github.com/NVIDIA/Megatron-LM.git@main,/opt/x", "https://h:8443/p@ref", "me@host: x://y",
                                  '{"a": "https://h/x", "b": "me@h"}'])
def test_what_is_no_login_stays(text):
    assert screen.hide(text) == text


KEY = "-----BEGIN KEY-----\nMIIEowIBAAKCAQEA7\n  hunter2\"hunter2\\é\n-----END KEY-----"


@pytest.mark.parametrize("how", [str, lambda v: v.splitlines()[1], lambda v: v.splitlines()[2].strip(), json.dumps, lambda v: json.dumps(v, ensure_ascii=False),
                                 lambda v: json.dumps(v.splitlines()), lambda v: json.dumps({"x": json.dumps(v)}), repr, shlex.quote])
def test_a_value_of_several_lines_is_hidden_in_each_form(monkeypatch, how):
    monkeypatch.setenv("SSH_PRIVATE_KEY", KEY)
    said = screen.hide("a %s b" % how(KEY))
    assert "MIIEow" not in said and "hunter2" not in said, said


def test_hiding_takes_little_time(monkeypatch):
    """A server's answer may have megabytes, and is hidden before it is cut."""
    begun = time.monotonic()
    for text in ("://a:" * 400_000, "a" * 2_000_000, "://" + "x" * 2_000_000, "://a:b" * 300_000 + "@"):
        screen.hide(text)
    assert time.monotonic() - begun < 30


# ---------------------------------------------------------------- shells


# Where text for a shell is made of values that are not quoted there, and why that is right as it is.
UNQUOTED = {
    ("backends.common.ssh", "run"): "passes on the script that it is given",
    ("backends.common.nemo", "run"): "nemo-run's own commands",
    ("backends.slurm", "bring"): "words that are quoted, and a number",
    ("commands", "notify"): "the person's own command, of their profile",
    ("backends.slurm", "_folders"): "remote_job_dir: require_plain",
    ("backends.slurm", "submit"): "remote_job_dir: require_plain",
    ("backends.slurm", "probe"): "remote_job_dir: require_plain",
    ("backends.slurm", "accepted"): "words that are quoted",
    ("backends.slurm", "sbatch"): "folders below remote_job_dir; a name of letters, digits and -",
    ("backends.common.slurm_prepare", "squashed"): "remote_job_dir: require_plain; a key of letters, digits and ._-",
    ("backends.common.slurm_watch", "job_id"): "a name that is quoted",
    ("backends.common.slurm_watch", "codes"): "words that are quoted",
    ("backends.common.slurm_watch", "print_grown"): "words that are quoted, and numbers",
    ("backends.common.slurm_watch", "print_batch_log"): "words that are quoted",
    ("backends.common.slurm_watch", "final"): "forget(), which quotes",
    ("backends.common.lepton_ray", "stage"): "a folder named by the run's id",
}
QUOTED = ("shlex.quote", "shlex.join", "int", "len")


class Shells(ast.NodeVisitor):
    """Finds the functions of a module that give a shell text with values in it that are not quoted on the spot."""

    def __init__(self, module):
        self.module, self.where, self.found = module, [], set()
        self.known = [{}]

    def visit_FunctionDef(self, node):
        self.where.append(node.name)
        self.known.append({target.id: one.value for one in ast.walk(node) if isinstance(one, ast.Assign)
                           for target in one.targets if isinstance(target, ast.Name)})
        self.generic_visit(node)
        self.where.pop()
        self.known.pop()

    def safe(self, node, depth=0):
        if depth > 20:
            return False
        if isinstance(node, (ast.Constant, ast.Slice)) or node is None:
            return True
        if isinstance(node, ast.Name):
            value = next((known[node.id] for known in reversed(self.known) if node.id in known), None)
            return value is not None and self.safe(value, depth + 1)
        if isinstance(node, ast.BinOp):
            return self.safe(node.left, depth + 1) and self.safe(node.right, depth + 1)
        if isinstance(node, (ast.Tuple, ast.List)):
            return all(self.safe(item, depth + 1) for item in node.elts)
        if isinstance(node, ast.Dict):
            return all(self.safe(item, depth + 1) for item in node.values)
        if isinstance(node, ast.DictComp):
            return self.safe(node.value, depth + 1)
        if isinstance(node, ast.IfExp):
            return self.safe(node.body, depth + 1) and self.safe(node.orelse, depth + 1)
        if isinstance(node, ast.JoinedStr):
            return all(self.safe(getattr(part, "value", part), depth + 1) for part in node.values)
        if isinstance(node, ast.Call):
            return ast.unparse(node.func) in QUOTED or "map(shlex.quote" in ast.unparse(node)
        return False

    def texts(self, node):
        """The arguments of a call that a shell will read."""
        name = ast.unparse(node.func)
        words = [*node.args, *(word.value for word in node.keywords)]
        if any(word.arg == "shell" and ast.unparse(word.value) != "False" for word in node.keywords):
            yield node.args[0]
        if name in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"):
            yield node.args[0]
        if name.rpartition(".")[2] in ("run", "output") and name.rpartition(".")[0].endswith(("host", "Host()", "Session(Host())")):
            yield node.args[0]
        for word in words:
            for part in ast.walk(word):
                if isinstance(part, ast.List):
                    plain = [item.value if isinstance(item, ast.Constant) else None for item in part.elts]
                    if "-c" in plain and {"sh", "bash", "/bin/sh", "/bin/bash"} & set(plain[:plain.index("-c")]):
                        yield from part.elts[plain.index("-c") + 1:][:1]
                if isinstance(part, ast.Dict):
                    yield from (value for key, value in zip(part.keys, part.values, strict=True)
                                if isinstance(key, ast.Constant) and key.value == "entrypoint")

    def visit_Call(self, node):
        for text in self.texts(node):
            if not self.safe(text):
                self.found.add((self.module, self.where[-1] if self.where else "*"))
        self.generic_visit(node)


def unquoted(source, module="m"):
    tree = ast.parse(source)
    shells = Shells(module)
    shells.known[0] = {target.id: one.value for one in tree.body if isinstance(one, ast.Assign) for target in one.targets
                       if isinstance(target, ast.Name)}
    shells.visit(tree)
    return shells.found


@pytest.mark.parametrize(("line", "bad"), [
    ("os.system('rm ' + x)", True), ("subprocess.run('ls %s' % x, shell=True)", True), ("subprocess.run(x, shell=True)", True),
    ("subprocess.run(['bash', '-c', f'ls {x}'])", True), ("subprocess.Popen(['sh', '-e', '-c', 'ls {}'.format(x)])", True),
    ("host.output('ls %s' % x, 'look')", True), ("self.host.run(T % {'a': x})", True), ("ask({'entrypoint': 'a ' + x})", True),
    ("host.output('ls %s' % shlex.quote(x), 'look')", False), ("host.run(T % {'a': shlex.quote(x), 'b': 5})", False),
    ("subprocess.run(['bash', '-c', 'ls'])", False), ("subprocess.run(['ls', x])", False), ("host.run('ls ' + ' '.join(map(shlex.quote, x)))", False),
])
def test_the_search_for_unquoted_text_finds_it(line, bad):
    assert bool(unquoted("T = 'x %%(a)s'\ndef f(x, host):\n    %s\n" % line)) == bad


def test_no_string_of_ours_reaches_a_shell_unquoted():
    files = [REPO / name for name in FLAT if name.endswith(".py")]
    files += [path for folder in ("backends", "pod", "profiles") for path in (REPO / folder).rglob("*.py")]
    found = set()
    for path in files:
        found |= unquoted(path.read_text(), ".".join(path.relative_to(REPO).with_suffix("").parts))
    assert found - set(UNQUOTED) == set()
