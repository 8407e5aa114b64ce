"""Every refusal, in one place: bad input -> exit code and two lines, as text. Nothing is ever submitted."""

import os
import random
import re
import shutil
import socket
import stat
import sys
import tempfile
from pathlib import Path

import inside
import pytest
import support
from cloud import EMULATED, cloud
from layout import recipe, write

import jobs
import launch
import prepare
import profiles
import runs
import transport
from backends.common import http
from pod import failures

RECIPE = "src/pkg/recipes/nano3/sft"


def put(place, path, what):
    """One file of a case; some words stand for things that are no plain text."""
    target = Path(os.fsdecode(os.fsencode(place) + b"/" + path.encode("utf-8", "surrogateescape")))
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(what, str) and what.startswith("-> "):
        target.symlink_to(what[3:])
    elif what == "FIFO":
        os.mkfifo(target)
    elif what == "DEVICE":
        os.mknod(target, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    elif what == "SOCKET":
        short = tempfile.mktemp(dir="/tmp")  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(short)
        shutil.move(short, target)
    elif what == "SPARSE":
        with open(target, "wb") as file:
            file.truncate(transport.MAX_FILE + 1)
    elif isinstance(what, str) and what.startswith("NOISE "):
        target.write_bytes(random.Random(7).randbytes(int(what[6:])))
    else:
        target.write_bytes(what if isinstance(what, bytes) else what.encode())


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A checkout with the recipes nano3/sft and nano3/rl and the profile local, which the launcher takes for its own;
    a state folder beside it."""
    root = tmp_path / "checkout"
    recipe(root, "nano3/sft", path=RECIPE + "/train.py", nodes=1, gpus=0)
    recipe(root, "nano3/rl", path="src/pkg/recipes/nano3/rl/train.py", launch="ray", nodes=1, gpus=0)
    write(root / "profiles/local.toml", 'executor = "local"\ngpus_per_node = 0\n')
    monkeypatch.setattr(prepare, "HERE", root)
    monkeypatch.chdir(root)
    monkeypatch.setattr(profiles, "FOLDER", root / "profiles")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AIRLIFT_HOME", str(root / "home"))
    monkeypatch.chdir(root)
    for name in list(os.environ):
        if name.startswith(("LEPTON_", "RUNAI_", "SLURM_", "NEMOTRON_")) or name in (*jobs.TOKENS, "GONE", "T"):
            monkeypatch.delenv(name)
    return root


def meddle(monkeypatch, root, path, what):
    """A file that changes, or goes, just when it is packed."""
    real_fstat, real_lstat, target = os.fstat, os.lstat, str(root / path)

    def fstat(number):
        if what == "CHANGES" and os.readlink("/proc/self/fd/%d" % number) == target:
            with open(target, "a") as file:
                file.write("x")
        return real_fstat(number)

    def lstat(path, **options):
        if what == "VANISHES" and path == target and sys._getframe(1).f_globals["__name__"] == "transport":
            raise FileNotFoundError(2, "No such file or directory", target)
        return real_lstat(path, **options)

    monkeypatch.setattr(transport.os, "fstat", fstat)
    monkeypatch.setattr(transport.os, "lstat", lstat)


def lay_out(monkeypatch, root, files):
    for path, what in files.items():
        if path.startswith("$"):
            monkeypatch.setenv(path[1:], what.replace("ROOT", str(root)))
            continue
        put(root, path, "x" if what in ("CHANGES", "VANISHES") else what)
        if path == E:
            inside.allow(root / path)
        if what in ("CHANGES", "VANISHES"):
            meddle(monkeypatch, root, path, what)


S = RECIPE
P, E, Y, H = "profiles/p.toml", "env.toml", S + "/config/default.yaml", S + "/train.py"
LOCAL, LEPTON = 'executor = "local"\n', 'executor = "lepton"\nnode_group = "g"\nresource_shape = "s"\n'
SLURM = 'executor = "slurm"\naccount = "a"\npartition = "p"\nremote_job_dir = "/j"\n'
DOCKER = 'executor = "docker"\ncontainer_image = "i"\n'
RUN, GO = "nano3 sft p --dry-run", "nano3 sft p"
N = ("[tool.runspec]", 'name = "nano3/sft"')
FAKE = {"hf": "hf_" + "Ab1" * 12, "github": "ghp_" + "a1B2" * 9, "nvidia": "nvapi-" + "a1-_" * 13, "aws": "AKIA" + "Q7" * 8,
        "pem": "-----BEGIN RSA PRIVATE KEY-----\n" + "Ab1+" * 16, "json": '{"key": "-----BEGIN PRIVATE KEY-----\\n' + "Ab1+" * 16}


def hd(*lines):
    return "".join("# %s\n" % line for line in ["/// script", *lines, "///"])


# (files of the case, words, exit code, what is wrong, what to do). ROOT is the checkout, ... anything; $NAME among the
# files is a variable of the environment.
CASES = [
    # command line
    ({}, "", 2, "no recipe was named", "python launch.py list shows them; --help shows all commands"),
    ({}, "nano3", 2, "a launch needs FAMILY and STAGE", "like: python launch.py nano3 sft local"),
    ({}, "nano3 sft local more", 2,
     "unexpected word 'more'",
     "overrides are KEY=VALUE; arguments for the script follow --"),
    ({}, "nano3 sft --nodes 0", 2, "--nodes is 0", "it must be a whole number, 1 or more"),
    ({}, "nano3 sft --nodes two", 2, "--nodes is 'two'", "it must be a whole number, 1 or more"),
    ({}, "nano3 sft --nodes", 2, "--nodes needs a value", "write it after the option, like: --nodes 2, -c default"),
    ({}, "nano3 sft -c", 2, "--config needs a value", "write it after the option, like: --nodes 2, -c default"),
    ({}, "nano3 sft --dry", 2, "there is no option --dry", "did you mean --dry-run?"),
    ({}, "nano3 sft --lr=1", 2,
     "there is no option --lr",
     "overrides are KEY=VALUE without dashes; --help shows the options"),
    ({}, "nano3 stf", 2, "nano3 has no stage 'stf'", "did you mean sft?"),
    ({}, "nano sft", 2, "there is no family 'nano'", "did you mean nano3?"),
    ({}, "nano3 sft lokal", 2, "profile 'lokal' does not exist", "did you mean local? (read: ROOT/profiles/*.toml)"),
    ({}, "nano3 sft,stf --dry-run", 2, "nano3 has no stage 'stf'", "did you mean sft?"),
    ({}, "nano3 sft,,sft --dry-run", 2, "nano3 has no stage ''", "did you mean rl or sft?"),
    ({}, "nano3 sft,sft --detach", 2,
     "--detach is not possible with several stages on local: the launcher has to start the next one",
     "leave --detach out, or launch the stages one by one"),
    ({}, "nano3 sft -c defualt", 2,
     "nano3/sft has no config 'defualt' in ROOT/src/pkg/recipes/nano3/sft/config",
     "did you mean default?"),
    ({}, "nano3 sft -c ./x.yaml", 2,
     "there is no config file ./x.yaml",
     "give the path of a file, or the name of a config in ROOT/src/pkg/recipes/nano3/sft/config"),
    ({}, "nano3 sft a=\udcff", 2, "the word 'a=\\udcff' is not UTF-8", "write it in UTF-8"),
    ({}, "nano3 sft --repo-root /nonexistent", 2,
     "there is no recipe under /nonexistent/src/*/recipes or steps",
     "name the source tree with --repo-root"),
    ({}, "list nan", 2, "ROOT has no recipe of family nan", "did you mean nano3?"),
    ({}, "list --nodes 2", 2, "list does not take --nodes", "leave it out"),
    ({}, "list a b", 2, "unexpected word 'b'", "list takes only a family"),
    ({}, "profiles x", 2, "unexpected word 'x'", "profiles takes no words"),
    ({}, "files nano3 sft,sft", 2, "files takes one stage at a time", "name one of sft, sft"),
    ({}, "status zzzzzz", 2, "there is no run 'zzzzzz'", "python launch.py status lists them"),
    ({}, "status a b", 2, "name one run", "python launch.py status lists them"),
    ({}, "logs", 2, "name one run", "python launch.py status lists them"),
    ({}, "logs ../x", 2, "there is no run '../x'", "python launch.py status lists them"),
    ({}, "cancel zzzzzz", 2, "there is no run 'zzzzzz'", "python launch.py status lists them"),
    ({"home/runs/abcdef.json": "{"}, "status abcdef", 2,
     "the file of run abcdef cannot be read: ROOT/home/runs/abcdef.json",
     "remove it"),
    ({P: "executor = 'docker'\ngpus_per_node = 0"}, "nano3 rl p --nodes 2", 2,
     "a Ray recipe on 2 nodes is not supported by executor docker",
     "use --nodes 1, or another executor"),
    ({}, "nano3 sft local --all", 2, "there is no option --all", "did you mean --all-ranks?"),
    # profile
    ({P: ""}, RUN, 2, "profile p has no executor", "add executor = one of local, docker, lepton, dgxcloud, slurm"),
    ({P: "executor = 'lepten'"}, RUN, 2, "profile p: executor 'lepten' is not known", "did you mean lepton?"),
    ({P: "executor = "}, RUN, 2,
     "ROOT/profiles/p.toml is not TOML: Invalid value (at end of document)",
     "fix the file"),
    ({P: b"executor = '\xff'"}, RUN, 2, "ROOT/profiles/p.toml is not TOML: it is not UTF-8", "save it as UTF-8"),
    ({P: "extends = 'p'"}, RUN, 2, "profiles extend each other in a cycle: p -> p", "remove one extends"),
    ({P: "extends = 'lokal'"}, RUN, 2, "profile p extends 'lokal', which does not exist", "did you mean local? (read: ...)"),
    ({P: "extends = 3"}, RUN, 2, "ROOT/profiles/p.toml: extends is 3", 'write extends = "name"'),
    ({P: LOCAL + "env_var = {}"}, RUN, 2, "profile p: there is no key 'env_var'", "did you mean env_vars?"),
    ({P: LOCAL + "nodes = '2'"}, RUN, 2, "profile p: nodes is '2'", "it must be a whole number, 1 or more"),
    ({P: LOCAL + "gpus_per_node = -1"}, RUN, 2,
     "profile p: gpus_per_node is -1",
     'it must be a whole number, 0 or more, or "gpu"'),
    ({P: LOCAL + "startup_commands = 'ls'"}, RUN, 2,
     "profile p: startup_commands is 'ls'",
     "it must be a list of strings"),
    ({P: LOCAL + "env_vars = {'A B' = 'hush'}"}, RUN, 2,
     "profile p: env_vars is ***",
     "it must be a table of variables; see A B: a name may have letters, digits and _; a value must be a string, "
     "number, true or false, and without NUL"),
    ({P: LOCAL + "compression = 'zip'"}, RUN, 2, "profile p: compression is 'zip'", "it must be xz or gz"),
    ({P: LOCAL + "node_group = 'g'"}, RUN, 2,
     "profile p: node_group is not for executor local",
     "it is for lepton; remove it"),
    ({P: DOCKER + "container = 'j'"}, RUN, 2,
     "profile p: container_image is set twice, once as an alias",
     "keep one of them"),
    ({P: "executor = 'slurm'\nremote_job_dir = '~'"}, RUN, 2,
     "the workspace is '~'", "it must be an absolute path, as the pod sees it"),
    ({P: SLURM + "launcher = 'torchrun'"}, RUN, 2,
     "profile p: launcher is not supported",
     "the recipe's header says how it is launched; remove it"),
    ({P: SLURM + "build_time = '1'"}, RUN, 2,
     "profile p: build_time is not supported",
     "images are used as they are, and never built; remove it"),
    ({P: LOCAL + "stages = 3"}, RUN, 2, "profile p: stages is 3", "write tables like [stages.rl]"),
    ({P: LOCAL + "[stages.sft]\nnode = 3"}, RUN, 2,
     "profile p, stages.sft: there is no key 'node'",
     "did you mean nodes or ..."),
    ({P: LOCAL + "[stages.data.prep]\nnodes = 3"}, RUN, 2,
     "profile p: stages.data has no key 'prep'",
     'for stages below it write [stages."data/prep"]'),
    ({P: LOCAL + "[stages.sft]\nexecutor = 'docker'"}, RUN, 2,
     "profile p: stages.sft sets executor",
     "set it at the top of the profile"),
    ({P: LOCAL + "run_dir = '${env:GONE}'"}, GO, 2,
     "profile p reads GONE, which is not set",
     "export it, or write the value into ROOT/profiles/p.toml"),
    ({P: "executor = 'dgxcloud'\nclient_secret = 12345"}, RUN, 2,
     "profile p: client_secret is ***",
     "it must be a string"),
    ({P: LOCAL + "[secrets]\nT = 'hf_x'"}, RUN, 2, "secrets.T is not a reference that local supports", 'write "env" or "login"'),
    ({P: LEPTON + "[secrets]\nT = 'vault:x'"}, RUN, 2,
     "secrets.T is not a reference that lepton supports",
     'write "env" or "login", or "lepton:name" for a secret of the workspace'),
    ({P: LOCAL + "[secrets]\nT = 'env'"}, GO, 2,
     "secret T is not set here",
     "export it, or remove it from [secrets]"),
    ({P: LEPTON + "workspace = 'out'"}, RUN, 2,
     "the workspace is 'out'",
     "it must be an absolute path, as the pod sees it"),
    ({P: DOCKER + "unpack = 'shared'"}, RUN, 2,
     'unpack = "shared" needs a workspace that all pods see',
     "set workspace in the profile, or remove unpack"),
    ({P: LEPTON + "mounts = ['/a:/b']"}, RUN, 2,
     "the mount /a:/b is not possible on lepton",
     "write a table with path, mount_path and from"),
    ({P: DOCKER + "mounts = ['${auto_mount:x}']"}, RUN, 2,
     "the mount ${auto_mount:x} cannot be parsed",
     "write ${auto_mount:git+https://host/path.git@ref,/target}"),
    ({P: "executor = 'kubeflow'"}, RUN, 2,
     "profile p: executor kubeflow is not supported",
     "use one of local, docker, lepton, dgxcloud, slurm"),
    ({P: LOCAL + "chunk_bytes = 9"}, RUN, 2, "chunk_bytes is 9", "set it to 1024 or more"),
    ({P: LOCAL + "run_command = 'go {x}'"}, RUN, 2,
     "the command 'go {x}' cannot be filled in: it names {x}",
     "only {script} and {config} are filled in; double other braces"),
    # env.toml
    ({"$NEMOTRON_ENV_FILE": "/nowhere/env.toml"}, RUN, 2,
     "NEMOTRON_ENV_FILE names /nowhere/env.toml, which does not exist",
     "correct it, or unset it"),
    ({E: "[p"}, RUN, 2,
     "ROOT/env.toml is not TOML: Expected ']' at the end of a table declaration (at end of document)",
     "fix the file"),
    ({E: "nodes = 1"}, RUN, 2, "ROOT/env.toml: the key nodes is in no section", "move it below the [name] of a profile"),
    ({E: "[q]\n" + LOCAL}, RUN, 2, "profile 'p' does not exist", "did you mean local or q? (read: ROOT/profiles/*.toml, ROOT/env.toml)"),
    ({E: "[p]\nextends = 'wandb'\n[wandb]\n"}, RUN, 2,
     "profile p extends 'wandb', which does not exist",
     "did you mean local or p? (read: ...)"),
    ({E: "[wandb]\nproject = '${oc.env:GONE}'"}, "nano3 sft local", 2,
     "[wandb] of ROOT/env.toml reads GONE, which is not set",
     "export it, or write the value there"),
    ({E: "[p]\n" + LOCAL + "packager = 'git'"}, RUN, 2,
     "profile p: packager is not supported",
     "Airlift packs the tree itself; exclude and scope say what is sent"),
    ({E: "[artifacts]\nroot = '/a'", Y: "artifacts: x"}, "nano3 sft local --dry-run", 2,
     "ROOT/src/pkg/recipes/nano3/sft/config/default.yaml: artifacts is 'x', not a table",
     "fix the config's artifacts section"),
    # header
    ({H: hd("[tool.runspec]", 'name = "nano3/sft')}, "list", 2,
     "src/pkg/recipes/nano3/sft/train.py:3: the runspec header is not TOML: Illegal character '\\n'",
     "fix the block between `# /// script` and `# ///`"),
    ({H: "# /// script\n# [tool.runspec]\n# name = 'nano3/sft'\n"}, "list", 2,
     "src/pkg/recipes/nano3/sft/train.py:1: the runspec header does not end",
     "end it with a line `# ///`; each line of it begins with #"),
    ({H: hd("[tool.runspec]", 'nmae = "nano3/sft"')}, "list", 2,
     "src/pkg/recipes/nano3/sft/train.py:3: the header has an unknown field 'nmae'",
     "did you mean name or image?"),
    ({H: hd("[tool.runspec]", 'name = "sft"')}, "list", 2,
     "src/pkg/recipes/nano3/sft/train.py:3: the header's name is 'sft'",
     'it must be like "family/stage"'),
    ({H: hd(*N, "[tool.runspec.run]", 'launch = "mpi"')}, "list", 2,
     "src/pkg/recipes/nano3/sft/train.py:5: launch mode 'mpi' is not known",
     "use one of torchrun, ray, direct, python"),
    ({H: hd(*N, "[tool.runspec.run]", 'launch = "mpi"')}, "nano3 sft --dry-run", 2,
     "nano3 has no stage 'sft'",
     "did you mean rl?; or fix src/pkg/recipes/nano3/sft/train.py:5: launch mode 'mpi' is not known"),
    ({H: hd(*N, "[tool.runspec.resources]", 'nodes = "2"')}, "list", 2,
     "src/pkg/recipes/nano3/sft/train.py:5: the header's nodes is '2'",
     "it must be a whole number"),
    ({H: hd(*N, "[tool.runspec.resources]", 'nodes = 0')}, "list", 2,
     "src/pkg/recipes/nano3/sft/train.py:5: resources are {'nodes': 0}",
     'nodes must be 1 or more, gpus_per_node 0 or more or "gpu"'),
    ({H: hd(*N, "[tool.runspec.env]", 'A = [1]')}, "list", 2,
     "src/pkg/recipes/nano3/sft/train.py:5: the header's env.A is [1]",
     "a name may have letters, digits and _; a value must be a string, number, true or false, and without NUL"),
    ({H: hd(*N, "[tool.runspec.run]", 'cmd = "go {nowhere}"')}, "nano3 sft --dry-run", 2,
     "the command 'go {nowhere}' cannot be filled in: it names {nowhere}",
     "only {script} and {config} are filled in; double other braces"),
    ({S + "/other.py": hd(*N)}, "nano3 sft --dry-run", 2,
     "two scripts are named nano3/sft: src/pkg/recipes/nano3/sft/other.py and src/pkg/recipes/nano3/sft/train.py",
     "rename one of them"),
    ({H: hd(*N, "[tool.runspec.config]", 'dir = "./nowhere"')}, "nano3 sft --dry-run", 2,
     "nano3/sft has no config 'default' in ROOT/src/pkg/recipes/nano3/sft/nowhere",
     "create one there"),
    # config
    ({Y: "a: ["}, "nano3 sft --dry-run", 2,
     "ROOT/src/pkg/recipes/nano3/sft/config/default.yaml is not a config: line 2: did not find expected node content",
     "fix the YAML"),
    ({Y: "- 1"}, "nano3 sft --dry-run", 2,
     "ROOT/src/pkg/recipes/nano3/sft/config/default.yaml is not a config: it is a list, not a table of settings",
     "fix the YAML"),
    ({Y: b"\xff"}, "nano3 sft --dry-run", 2,
     "ROOT/src/pkg/recipes/nano3/sft/config/default.yaml is not a config: it is not UTF-8",
     "save it as UTF-8"),
    ({Y: "defaults: default"}, "nano3 sft --dry-run", 2,
     "the defaults: of configs form a cycle: default.yaml -> default.yaml",
     "remove one of them from the defaults: that names it"),
    ({Y: "defaults: [gone]"}, "nano3 sft --dry-run", 2,
     "ROOT/src/pkg/recipes/nano3/sft/config/gone.yaml is named in defaults: of "
     "ROOT/src/pkg/recipes/nano3/sft/config/default.yaml, but does not exist",
     "fix the defaults:"),
    ({Y: "defaults: [b]\na: [1]", S + "/config/b.yaml": "a: {x: 1}"}, "nano3 sft --dry-run", 2,
     "ROOT/src/pkg/recipes/nano3/sft/config/default.yaml cannot be merged with its defaults: Cannot "
     "merge incompatible container types",
     "a table cannot replace a list, nor a list a table"),
    ({Y: "run: [1]"}, "nano3 sft --dry-run", 2,
     "ROOT/src/pkg/recipes/nano3/sft/config/default.yaml: run is [1], not a table",
     "fix the config's run section"),
    ({Y: "run: {env: {nodes: two}}"}, "nano3 sft --dry-run", 2,
     "nodes is 'two'",
     "it must be a whole number, 1 or more"),
    ({Y: "run: {env: {mounts: 3}}"}, "nano3 sft --dry-run", 2,
     "run.env.mounts is 3",
     "it must be a list of strings or tables"),
    ({Y: "run: {env: {env_vars: {A: [1]}}}"}, "nano3 sft --dry-run", 2,
     "run.env.env_vars is ***",
     "it must be a table of variables; see A: a name may have letters, digits and _; a value must be a string, "
     "number, true or false, and without NUL"),
    ({}, "nano3 sft =1", 2, "the override '=' names no setting",
     "overrides are KEY=VALUE with dots between names; + before a key says that it is new, and none can be removed with ~"),
    ({}, "nano3 sft a=[", 2,
     "the override 'a=[' cannot be parsed: line 1: expected the node content, but found '<stream end>'",
     "its value is read as YAML; put a text in quotes, like: 'key=\"[text\"'"),
    ({}, "nano3 sft run.env.run_command={x} --dry-run", 2, "run.env.run_command is ***", "it must be a string"),
    ({E: "[wandb]\nproject = 'p'"}, "nano3 sft run.wandb=x --dry-run", 2,
     "ROOT/src/pkg/recipes/nano3/sft/config/default.yaml: run.wandb is 'x', not a table",
     "fix the config's run section"),
    ({Y: "a: ${"}, "nano3 sft --dry-run", 2,
     "ROOT/src/pkg/recipes/nano3/sft/config/default.yaml is not a config: a has a ${ that cannot be "
     "parsed; write a literal one as \\${",
     "fix the YAML"),
    # tree
    ({"src/pkg/out": "-> /etc/hostname"}, "nano3 sft --dry-run", 2,
     "src/pkg/out is a link that leaves the tree: it points to /etc/hostname",
     "put a copy in its place, or name it in exclude"),
    ({"src/pkg/up": "-> ../../env"}, "nano3 sft --dry-run", 2,
     "src/pkg/up is a link that leaves the tree: it points to ../../env",
     "put a copy in its place, or name it in exclude"),
    ({"src/pkg/gone": "-> nothing.py"}, "nano3 sft --dry-run", 2,
     "src/pkg/gone is a link to src/pkg/nothing.py, which does not ship",
     "put a copy in its place, or name it in exclude"),
    ({"src/pkg/me": "-> me"}, "nano3 sft --dry-run", 2,
     "src/pkg/me is a link to itself, which does not ship",
     "put a copy in its place, or name it in exclude"),
    ({"src/pkg/w.pt": "x", "src/pkg/link": "-> w.pt"}, "nano3 sft --dry-run", 2,
     "src/pkg/link is a link to src/pkg/w.pt, which does not ship",
     "put a copy in its place, or name it in exclude"),
    ({"src/pkg/caf\udce9.py": "x"}, "nano3 sft --dry-run", 2,
     "a name in src/pkg is not UTF-8: 'caf\\udce9.py'",
     "rename it, or exclude its folder"),
    ({"src/pkg/big.py": "SPARSE"}, "nano3 sft --dry-run", 3,
     "the payload does not fit: one file needs 67,108,865 of 67,108,864 bytes; nothing was submitted",
     "leave files out with exclude or .airliftignore; the biggest are src/pkg/big.py (64.0 MiB), ..."),
    ({"src/pkg/" + "d" * 200 + "/" + "e" * 200 + "/" + "f" * 200 + "/" + "g" * 200 + "/" + "h" * 250 + ".py": "x"},
     "nano3 sft --dry-run", 2,
     "src/pkg/dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd... is a path of "
     "more than 1024 bytes",
     "rename its folders"),
    ({".airliftignore": b"\xff"}, "nano3 sft --dry-run", 2,
     "ROOT/.airliftignore cannot be read: it is not UTF-8",
     "save it as UTF-8"),
    ({".airliftignore": "train.py"}, "nano3 sft --dry-run", 2,
     "src/pkg/recipes/nano3/sft/train.py is the recipe, but it would not ship: excluded by train.py",
     "take the pattern out of exclude, or name the recipe in include"),
    *[({"src/pkg/%s.py" % name: "\nkey = '%s'" % token}, "nano3 sft --dry-run", 2,
       "src/pkg/%s.py:2: what looks like a credential, and without the module the job would break" % name,
       "take it out; or name the file in exclude, or, if it is none, in include of your profile")
      for name, token in FAKE.items()],
    ({P: LOCAL + "exclude = ['src/pkg/recipes']"}, RUN, 2,
     "src/pkg/recipes/nano3/sft/train.py is the recipe, but it would not ship: excluded by src/pkg/recipes",
     "take the pattern out of exclude, or name the recipe in include"),
    ({"src/pkg/busy.py": "CHANGES"}, "nano3 sft --dry-run", 2,
     "ROOT/src/pkg/busy.py changed while it was packed",
     "wait until it is written, then launch again"),
    ({"src/pkg/gone.py": "VANISHES"}, "nano3 sft --dry-run", 2,
     "ROOT/src/pkg/gone.py cannot be read: No such file or directory",
     "make it readable, or name it in exclude"),
    # payload
    ({"src/pkg/noise.dat": "NOISE 2500000"}, "nano3 sft --dry-run", 3,
     "the payload does not fit: environment needs ... of 1,966,080 bytes; nothing was submitted",
     "leave files out with exclude or .airliftignore; the biggest are src/pkg/noise.dat (2.4 MiB), ..."),
    ({"src/pkg/noise.dat": "NOISE 1400000", P: LEPTON}, RUN, 3,
     "the payload does not fit: API object needs ... of 1,572,864 bytes; nothing was submitted",
     "leave files out with exclude or .airliftignore; the biggest are src/pkg/noise.dat (1.3 MiB), ..."),
    ({P: LOCAL + "[env_vars]\nA = '%s'" % ("x" * 140000)}, RUN, 3,
     "the payload does not fit: one string needs 140,003 of 131,072 bytes; nothing was submitted",
     "shorten the longest variable, or lower chunk_bytes"),
    ({P: LOCAL + "chunk_bytes = 200000", "src/pkg/noise.dat": "NOISE 200000"}, RUN, 3,
     "the payload does not fit: one string needs 200,019 of 131,072 bytes; nothing was submitted",
     "shorten the longest variable, or lower chunk_bytes"),
    ({P: LOCAL + "startup_commands = [\"a\\u0000\"]"}, RUN, 2,
     "a command holds a NUL or what is not UTF-8",
     "take that character out"),
]

# Platforms that need not be there to refuse: nothing answers, or nothing is asked.
L = LEPTON + 'container_image = "i"\ngpus_per_node = 1\n'
D = ('executor = "dgxcloud"\nbase_url = "http://127.0.0.1:9/api/v1"\nclient_id = "i"\nclient_secret = "hush-4711"\n'
     'project_name = "p"\ncontainer_image = "i"\ngpus_per_node = 1\n')
HERE = {"$LEPTON_WORKSPACE_ID": "w", "$LEPTON_WORKSPACE_TOKEN": "hush-4711",
        "$LEPTON_WORKSPACE_URL": "http://127.0.0.1:9/api"}
WITHOUT = [
    ({P: SLURM.replace("/j", "/my jobs")}, GO, 2,
     "remote_job_dir is '/my jobs', which nemo-run passes to shells without quotes",
     "use a path of letters, digits and . _ - + = @ / that begins with / or ~/"),
    ({P: SLURM + 'tunnel = "ssh"'}, GO, 2,
     'tunnel is "ssh", but the profile has no host',
     'set host, or tunnel = "local" on the cluster itself'),
    ({P: SLURM + 'tunnel = "ssh"\nhost = "h"\nuser = "u"\nidentity = "/nowhere/key"'}, GO, 2,
     "there is no key file /nowhere/key", "correct identity in the profile, or remove it"),
    ({P: SLURM + 'mounts = ["/data"]'}, GO, 2,
     "the mount '/data' cannot be parsed",
     'write "SRC:DST" or "SRC:DST:FLAGS", with absolute paths on the cluster and in the container'),
    ({P: SLURM + 'mounts = ["${auto_mount:git+https://h/x@main,/x}"]'}, GO, 2,
     "${auto_mount:git+https://h/x@main,/x} needs a container to be mounted into",
     "set container_image in the profile"),
    ({P: SLURM, "bin/sh": "-> /bin/sh", "bin/dd": "-> /bin/dd", "$PATH": "ROOT/bin"}, GO, 4,
     "this machine: cannot use /j: there is no sbatch: this is not a login node, or sbatch is not in the PATH of ssh sessions",
     "fix what it names, then launch again"),
    ({P: SLURM + 'tunnel = "ssh"\nhost = "127.0.0.1"\nuser = "u"\nport = 1'}, GO, 5,
     "u@127.0.0.1:1 cannot be reached: ssh: connect to host 127.0.0.1 port 1: Connection refused",
     "check host, port and the network"),
    ({P: DOCKER + "nodes = 2"}, GO, 2,
     "Docker starts one container on this machine, and the job has 2 nodes",
     "set nodes = 1 in the profile, or use --nodes 1"),
    ({P: 'executor = "docker"'}, GO, 2,
     "the job has no image", "set container_image in the profile, or image in the recipe's header"),
    ({P: DOCKER + 'mounts = ["/data"]'}, GO, 2,
     "the mount '/data' cannot be parsed", 'write "SRC:DST" or "SRC:DST:ro", where DST is an absolute path'),
    ({P: DOCKER + 'mounts = ["$GONE/x:/x"]'}, GO, 2,
     "the mount '$GONE/x:/x' reads GONE, which is not set", "export it, or write the path"),
    ({P: DOCKER, "$DOCKER_HOST": "unix:///nowhere/socket"}, GO, 5,
     "Docker cannot be reached at unix:///nowhere/socket", "start it, or set DOCKER_HOST"),
    ({P: L}, GO, 4,
     "there are no Lepton credentials here",
     "export LEPTON_WORKSPACE_ID and LEPTON_WORKSPACE_TOKEN, or run `lep login`"),
    ({P: L} | HERE, GO, 5,
     "Lepton at http://127.0.0.1:9/api cannot be reached", "check the address, the proxy variables and the network"),
    ({P: L.replace('"i"', '""')} | HERE, GO, 2,
     "the job has no image", "set container_image in the profile, or image in the recipe's header"),
    ({P: L + 'ca_bundle = "/nowhere/ca.pem"'} | HERE, GO, 2,
     "ca_bundle /nowhere/ca.pem does not exist", "name the PEM file of your certificate authority"),
    ({P: L + '[[mounts]]\npath = "/"\nmount_path = "/x"'} | HERE, GO, 2,
     "a mount lacks from: {'path': '/', 'mount_path': '/x'}",
     'like: { path = "/", mount_path = "/shared", from = "node-nfs:my-storage" }'),
    ({P: L + '[secrets]\nLEPTON_X = "lepton:x"'} | HERE, GO, 2,
     "Lepton reserves the variable LEPTON_X", "use another name in [secrets]"),
    ({P: D}, GO, 5,
     "run:AI at http://127.0.0.1:9/api/v1 cannot be reached",
     "check the address, the proxy variables and the network"),
    ({P: D + 'pvcs = [{claimName = "c"}]'}, GO, 2,
     "a pvc lacks path: {'existingPvc': True, 'claimName': 'c'}",
     'like: { claimName = "data", path = "/data", existingPvc = true }'),
    ({P: D + 'workspace = "/w"'}, GO, 2,
     "the workspace /w is on none of the pvcs", "add the claim that holds it, or change the workspace"),
    ({P: D.replace("= 1", '= "gpu"')}, GO, 2,
     'gpus_per_node is "gpu"', "run:AI needs a number; set gpus_per_node in the profile"),
    ({P: D + 'distributed_framework = "MPI"\nnodes = 2'}, GO, 2,
     "distributed_framework is 'MPI'", "only PyTorch tells each pod its rank; remove the key"),
]


def same(line, want, root):
    """Whether a line is the one that is wanted."""
    return re.fullmatch(".*".join(map(re.escape, want.replace("ROOT", str(root)).split("..."))), line)


def check(err, what, fix, root):
    """Two lines, exactly those."""
    assert "Traceback" not in err and "a bug" not in err, err
    lines = err.splitlines()
    assert len(lines) == 2 and err.endswith("\n"), err
    assert same(lines[0], "airlift: " + what, root), lines[0]
    assert same(lines[1], fix, root), lines[1]


def name_of(case):
    files = " ".join("%s %s" % (path[-12:], str(what)[-34:]) for path, what in case[0].items())
    return ascii("%s %s" % (case[1], files))[1:-1]


@pytest.mark.parametrize(("files", "words", "code", "what", "fix"), [*CASES, *WITHOUT],
                         ids=map(name_of, CASES + WITHOUT))
def test_a_refusal(place, monkeypatch, capsys, files, words, code, what, fix):
    monkeypatch.setattr(http, "BACKOFF_S", 0.001)
    lay_out(monkeypatch, place, files)
    before = sorted(place.glob("home/runs/*"))
    assert launch.main(words.split()) == code
    said = capsys.readouterr()
    check(said.err, what, fix, place)
    if words == "list":  # it shows what it can
        assert said.out.startswith("nano3\n  rl ") and "sft" not in said.out
    elif words == GO and (code > 3 or "ca_bundle" in what):  # a platform was about to be asked
        assert re.match(r"nano3/sft on p: ", said.out) and "started" not in said.out
    else:
        assert said.out == "" or (code == 3 and said.out.startswith("nano3/sft on "))
    for hidden in ("hush", "12345", "hf_a"):
        assert hidden not in said.out + said.err
    assert sorted(place.glob("home/runs/*")) == before  # no run was begun
    assert not (place / "home/local").exists()


def test_there_are_as_many_as_was_promised():
    assert len(CASES) + len(WITHOUT) + len(PLATFORM) + len(POD) >= 150


# ---------------------------------------------------------------- platforms that say no


def env(name, value):
    return lambda here: here.monkeypatch.setenv(name, value)


def profile(text="", **changes):
    return lambda here: here.profile(text, **changes)


def fault(kind, **options):
    return lambda here: here.server.fault(kind, **({"times": 99} | options))


TOKEN, SECRET = "LEPTON_WORKSPACE_TOKEN", "RUNAI_CLIENT_SECRET"
CREATES = "/(jobs|trainings)$"
# (platform, what is done to it or to the profile, exit code, what is wrong, what to do)
PLATFORM = [
    ("lepton", env(TOKEN, "hush"), 4,
     "Lepton: cannot list the node groups: HTTP 401: invalid or expired token",
     "renew LEPTON_WORKSPACE_TOKEN, or run `lep login` again"),
    ("lepton", lambda here: here.monkeypatch.delenv(TOKEN), 4,
     "there are no Lepton credentials here",
     "export LEPTON_WORKSPACE_ID and LEPTON_WORKSPACE_TOKEN, or run `lep login`"),
    ("lepton", lambda here: here.monkeypatch.setenv(TOKEN, here.server.foreign_token), 4,
     "Lepton: cannot list the node groups: HTTP 403: the token has no access to workspace ws0",
     "the credentials are valid; request the permission or quota, or change what it names in the profile"),
    ("lepton", profile(node_group="defualt-group"), 4,
     "Lepton has no node group 'defualt-group'", "this workspace has default-group; set node_group in the profile"),
    ("lepton", profile(resource_shape="eight"), 4,
     'Lepton: cannot create job nano3-sft-...: HTTP 400: unknown resource_shape "eight"',
     "change what it names in the profile, then launch again"),
    ("lepton", profile(mounts=[{"path": "/", "mount_path": "/shared", "from": "node-nfs:nowhere"}]), 4,
     'Lepton: cannot create job nano3-sft-...: HTTP 400: mounts[0]: unknown volume "node-nfs:nowhere"',
     "change what it names in the profile, then launch again"),
    ("lepton", profile("[secrets]\nT = 'lepton:nowhere'\n"), 4,
     'Lepton: cannot create job nano3-sft-...: HTTP 400: secret "nowhere" not found',
     "change what it names in the profile, then launch again"),
    ("lepton", profile(custom_spec={"nonsense": 1}), 2,
     "a Lepton job has no field nonsense",
     "remove it from custom_spec, security or mounts; the fields are resource_shape, affinity, ..."),
    ("lepton", profile(custom_spec={"completions": 3}), 2,
     "custom_spec sets completions, which Airlift sets itself", "remove it"),
    ("lepton", lambda here: here.server.missing_images.add("registry.test/nemo:1"), 4,
     "the image cannot be pulled: ImagePullBackOff, ErrImagePull",
     "correct container_image or the pull secrets; end the job with: python launch.py cancel ..."),
    ("lepton", fault("status", status=500), 5,
     "Lepton: cannot list the node groups: HTTP 500: injected by the test",
     "the platform has a problem of its own; try again later"),
    ("lepton", fault("status", status=429, retry_after=0.01), 5,
     "Lepton: cannot list the node groups: HTTP 429: injected by the test",
     "the platform has a problem of its own; try again later"),
    ("lepton", fault("drop"), 5,
     "Lepton at URL cannot be reached", "check the address, the proxy variables and the network"),
    ("lepton", fault("hang"), 5,
     "Lepton at URL did not answer in time", "check the address, the proxy variables and the network"),
    ("lepton", fault("status", status=403, method="POST", path=CREATES, message="over quota"), 4,
     "Lepton: cannot create job nano3-sft-...: HTTP 403: over quota",
     "the credentials are valid; request the permission or quota, or change what it names in the profile"),
    ("lepton", fault("drop", method="POST", path=CREATES), 5,
     "Lepton at URL cannot be reached",
     "the request may have arrived: look for nano3-sft-... in the console before you launch again"),
    ("dgxcloud", env(SECRET, "hush"), 4,
     "run:AI: cannot get a token for client_id airlift-test: HTTP 401: Unauthorized: wrong secret, or no "
     'service account "airlift-test"',
     "check client_id and client_secret of this profile"),
    ("dgxcloud", lambda here: here.monkeypatch.delenv(SECRET), 2,
     "profile dgxcloud reads RUNAI_CLIENT_SECRET, which is not set",
     "export it, or write the value into .../profiles/dgxcloud.toml"),
    ("dgxcloud", env("RUNAI_CLIENT_ID", "nobody"), 4,
     "run:AI: cannot get a token for client_id nobody: HTTP 401: Unauthorized: wrong secret, or no service"
     ' account "nobody"',
     "check client_id and client_secret of this profile"),
    ("dgxcloud", profile(project_name="team-z"), 4,
     "run:AI has no project 'team-z' that this client may see",
     "it sees team-a, team-without-quota; set project_name in the profile"),
    ("dgxcloud", profile(project_name="team-without-quota"), 4,
     'run:AI: cannot create workload nano3-sft-...: HTTP 403: project "team-without-quota" has a quota of '
     "0 GPUs; the workload asks for 1",
     "the credentials are valid; request the permission or quota, or change what it names in the profile"),
    ("dgxcloud", profile(pvcs=[{"claimName": "gone", "path": "/shared", "existingPvc": True}]), 4,
     'run:AI: cannot create workload nano3-sft-...: HTTP 400: spec.storage.pvc[0]: PVC "gone" does not exist',
     "change what it names in the profile, then launch again"),
    ("dgxcloud", profile("[secrets]\nT = 'runai:no/where'\n"), 4,
     "run:AI: cannot create workload nano3-sft-...: HTTP 400: environmentVariables[...].userCredential: no"
     " credential {'name': 'no', 'key': 'where'}",
     "change what it names in the profile, then launch again"),
    ("dgxcloud", profile(custom_spec={"args": "x"}), 2,
     "custom_spec sets args, which Airlift sets itself", "remove it"),
    ("dgxcloud", lambda here: here.server.missing_images.add("registry.test/nemo:1"), 4,
     'the image cannot be pulled: ImagePullBackOff: Back-off pulling image "registry.test/nemo:1"; '
     'ErrImagePull: Failed to pull image "registry.test/nemo:1": not found',
     "correct container_image or the pull secrets; end the job with: python launch.py cancel ..."),
    ("dgxcloud", fault("status", status=503), 5,
     "run:AI: cannot get a token for client_id airlift-test: HTTP 503: injected by the test",
     "the platform has a problem of its own; try again later"),
    ("dgxcloud", fault("status", status=500, path="/projects"), 5,
     "run:AI: cannot list the projects: HTTP 500: injected by the test",
     "the platform has a problem of its own; try again later"),
    ("dgxcloud", fault("reset"), 5,
     "run:AI at URL cannot be reached", "check the address, the proxy variables and the network"),
    ("dgxcloud", fault("hang"), 5,
     "run:AI at URL did not answer in time", "check the address, the proxy variables and the network"),
    ("dgxcloud", fault("drop", method="POST", path=CREATES), 5,
     "run:AI at URL/workloads/trainings cannot be reached",
     "the request may have arrived: look for nano3-sft-... in the console before you launch again"),
]


@EMULATED
@pytest.mark.parametrize(("kind", "harm", "code", "what", "fix"), PLATFORM,
                         ids=["%s-%s" % (case[0], case[3][:50]) for case in PLATFORM])
def test_a_platform_that_says_no(tmp_path, monkeypatch, capsys, kind, harm, code, what, fix):
    monkeypatch.setattr(http, "BACKOFF_S", 0.001)
    monkeypatch.setattr(http, "READ_S", 0.2)
    for here in cloud(kind, tmp_path, monkeypatch, capsys):
        harm(here)
        result = here.launch()
        assert result.code == code, result.err
        check(result.err.replace(here.server.url, "URL"), what, fix, "")
        assert result.out.startswith("nano3/sft on %s: " % kind) or (code == 2 and result.out == "")
        assert "hush" not in result.out + result.err
        pulled = "cannot be pulled" in what  # known only once the job is there
        asked_for_it = pulled or "create" in what or "in the console" in fix  # and the platform refused it
        assert bool(here.posts) == asked_for_it and bool(here.jobs) == pulled
        assert bool(runs.all_runs()[0]) == pulled or code == 5


# ---------------------------------------------------------------- pods


def whole(*files, **changes):
    return lambda place: (support.plan(dict(files), **changes), {})


def without(name, **changes):
    """The plan of a small job, with a variable taken out of a pod's environment or changed."""
    return lambda place: (support.plan(**{key: value for key, value in changes.items() if key != "value"}),
                          {name: changes.get("value")})


def streamed(name, data, **changes):
    return lambda place: (support.plan(**changes), dict(transport.stream(name, data, 1024)))


def hiding(module, compression):
    def make(place):
        support.plant(place / "lib", {module + ".py": "raise ImportError('built without it')\n"})
        plan = transport.plan_for("local", support.tree(), support.job(), compression=compression)
        return plan, {"PYTHONPATH": str(place / "lib")}
    return make


def taken(place):
    (place / ("airlift-%d" % os.geteuid())).write_text("somebody's")
    return support.plan(), {}


def bare(place):
    (place / "bin").mkdir()
    (place / "bin/python3").symlink_to(sys.executable)
    return support.plan(), {"PATH": str(place / "bin")}


def lost(place):
    plan = support.plan(unpack="shared", shared=str(place / "shared"), keep=5, patience=1, nodes=2)
    return plan, {"NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1"}


def cloned(place):
    return support.plan(clones=[{"url": "file:///nowhere", "ref": "main", "target": str(place / "x")}]), {}


def alone(place):
    plan = support.plan(launch="ray", nodes=2, cluster="pods", patience=1)
    return plan, {"NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


# (what makes the plan and the pod's environment, exit code, rank, what was seen). What is wrong and what to do about it
# are those of pod/failures.py.
POD = [
    (without("AIRLIFT_POD_0000"), 80, "unknown", ""),
    (without("AIRLIFT_POD_CHUNKS"), 80, "?", "AIRLIFT_POD_CHUNKS is ''"),
    (without("AIRLIFT_NODES"), 81, "?", "AIRLIFT_NODES is ''"),
    (without("AIRLIFT_TREE_0000"), 81, "0", "of 1 chunks of TREE, AIRLIFT_TREE_0000 is missing"),
    (without("AIRLIFT_JOB_0007", value="x"), 81, "0", "of 1 chunks of JOB, AIRLIFT_JOB_0007 is one too many"),
    (without("AIRLIFT_JOB_0000", value="x"), 81, "0", "the chunks of JOB do not have the digest that was sent"),
    (streamed("JOB", b"no zlib"), 81, "0", "the job's description cannot be read: ..."),
    (whole(nodes=2), 82, "?", "no variable of this platform and no hostname tells which of 2 pods this is"),
    (without("NODE_RANK", value="one"), 82, "?", "NODE_RANK is 'one', not a number"),
    (without("NODE_RANK", value="3", nodes=2), 82, "?", "NODE_RANK says rank 3, but the job has 2"),
    (lambda place: (support.plan(nodes=2), {"NODE_RANK": "1", "RANK": "0"}), 82, "?",
     "sources disagree: NODE_RANK says 1, RANK says 0"),
    (without("NODE_RANK", value="1", nodes=2), 82, "1", "nothing tells where rank 0 is: set MASTER_ADDR"),
    (taken, 83, "0", "ROOT/airlift-%d is no folder: remove it, or name another place" % os.geteuid()),
    (without("TMPDIR", value="/proc/nowhere"), 83, "0", "/proc/nowhere...: No such file or directory"),
    (whole(run_root="/dev/null/x"), 83, "0", "/dev/null...: Not a directory"),
    (lost, 84, "1", "rank 0 has said nothing after 1 s in ROOT/shared"),
    (streamed("TREE", b"no xz"), 85, "0", "this Python cannot unpack xz: ..."),
    (hiding("lzma", "xz"), 85, "0", "this Python has no xz: built without it"),
    (hiding("gzip", "gz"), 85, "0", "this Python has no gz: built without it"),
    (whole(setup=["true", "false"]), 86, "0", "see the lines above"),
    (whole(tool="nowhere"), 87, "0", "see the lines above"),
    (whole(workdir="/no/where"), 87, "0", "there is no folder /no/where, where the recipe is to be started"),
    (bare, 87, "0", "there is no bash in this image"),
    (cloned, 88, "0", "see the lines above"),
    (alone, 90, "1", "rank 0 did not answer at 127.0.0.1:1 within 1 s: Connection refused"),
]


@pytest.mark.parametrize(("make", "code", "rank", "seen"), POD, ids=["%d-%s" % (case[1], case[3][:40]) for case in POD])
def test_a_pod_that_refuses(tmp_path, make, code, rank, seen):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    plan, env = make(scratch)
    found, out = support.ran(plan, scratch, env=env)
    lines = out.text.splitlines()
    assert found == code, out.text
    assert "Traceback" not in out.text
    if seen == "":  # the bootstrap's own words: the program has not arrived
        assert lines == ["airlift: " + failures.FAILURES[code][0], "airlift: rank unknown ended with exit code %d" % code]
        return
    what, fix = failures.FAILURES[code]
    assert lines[-2:] == ["airlift: what to do: " + fix, "airlift: rank %s ended with exit code %d" % (rank, code)]
    assert same(lines[-3], "airlift: rank %s: %s: %s" % (rank, what, seen), scratch), lines[-3]


def test_every_code_of_a_pod_is_in_the_list():
    assert {case[1] for case in POD} == set(failures.FAILURES) - {
        failures.INTERNAL, failures.LOST}  # nothing known provokes the one; the other takes a real cluster: test_ray.py


# ---------------------------------------------------------------- what is left out, and said

NOTES = [
    ({"src/pkg/.env": "A=1", "src/pkg/id_ed25519": "x", "src/pkg/.aws/config": "x", "src/pkg/env.toml": "x"},
     "left out, as they look like credentials: src/pkg/.aws, src/pkg/.env, src/pkg/env.toml, src/pkg/id_ed25519"),
    *[({"src/pkg/%s.txt" % name: "key = '%s'" % token}, "left out, as they look like credentials: src/pkg/%s.txt" % name)
      for name, token in FAKE.items()],
    *[({"src/pkg/odd": kind}, "left out, neither a file, a folder nor a link: 1, like src/pkg/odd")
      for kind in ("FIFO", "SOCKET", "DEVICE")],
    ({Y: "blend: data/b.json", "data/b.json": "{}"}, "also sent, as config or command name them: data/b.json"),
    ({Y: "blend: data/b.parquet", "data/b.parquet": "x"}, "left out, data or model file: 1, like data/b.parquet"),
    ({Y: "blend: ./data", "data/b.json": "x"}, "left out, outside of src, and no file of up to 1.0 MiB: 1, like data"),
    ({"src/pkg/a.safetensors": "x", "src/pkg/b.parquet": "x"},
     "left out, data or model file: 2, like src/pkg/a.safetensors"),
    ({"src/pkg/notes.txt": "x", ".airliftignore": "notes.txt"},
     "left out, excluded by notes.txt: 1, like src/pkg/notes.txt"),
    ({"$HF_TOKEN": "hush-4711"}, "HF_TOKEN is set here but not sent; add it to [secrets] to send it"),
    ({P: LOCAL + "[secrets]\nT = 'env'", "$T": "hush-4711"}, "T is sent by value, in the job's environment"),
    ({P: LOCAL + "[env_vars]\nHF_TOKEN = 'hush-4711'"},
     "HF_TOKEN is sent as a plain variable; in [secrets] it would stay out of files and records"),
    ({P: DOCKER}, "no workspace is set: what the job writes stays in the pod and is lost with it"),
    ({Y: "run: {env: {mystery: 1}}"}, "run.env has mystery, which Airlift does not use"),
    ({Y: "a: ${run.nowhere}"}, "the config refers to ${run.nowhere}, which is not set anywhere"),
    ({E: "[p]\n" + LOCAL + "build_time = '1'"},
     "profile p: build_time has no effect: images are used as they are, and never built"),
]


@pytest.mark.parametrize(("files", "note"), NOTES, ids=[case[1][:60] for case in NOTES])
def test_what_is_said_aloud(place, monkeypatch, capsys, files, note):
    lay_out(monkeypatch, place, {P: LOCAL} | files)
    assert launch.main(RUN.split()) == 0
    said = capsys.readouterr()
    assert "  note     %s\n" % note in said.out and said.err == ""
    for hidden in ("hush", *(token[10:] for token in FAKE.values())):
        assert hidden not in said.out


def test_twenty_thousand_files(place, capsys):
    for number in range(20_000):
        if number % 200 == 0:
            (place / ("src/many/d%03d" % (number // 200))).mkdir(parents=True)
        (place / ("src/many/d%03d/f%05d.py" % (number // 200, number))).touch()
    code = launch.main(["nano3", "sft", "--dry-run"])
    said = capsys.readouterr()
    assert (code, said.err) == (0, "") and "  ships    20004 files, " in said.out
