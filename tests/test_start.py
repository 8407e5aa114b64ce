"""The command that starts a recipe, and what uv prepares before it."""

import os
import subprocess
from random import Random

import pytest
import support
from cloud import cloud
from layout import recipe, write

import recipes
import start
from transport import Refusal


def refusal(call, *args, **options):
    with pytest.raises(Refusal) as caught:
        call(*args, **options)
    return caught.value


SETTINGS = {"nodes": 2, "nproc": 4, "rendezvous_timeout": 1800}


@pytest.fixture
def shell(tmp_path):
    """Runs a command as the pod would: in bash, with places that have blanks, and tools that show their words."""
    tools = tmp_path / "tools"
    for tool in ("torchrun", "python", "uv", "my-tool"):
        write(tools / tool, "#!/bin/sh\nprintf '%s\\0' " + tool + ' "$@"\n').chmod(0o755)
    env = {"PATH": "%s:/usr/bin:/bin" % tools, "AIRLIFT_CODE": "/code root", "AIRLIFT_CONFIG": "/a b/config.yaml",
           "NODE_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29400"}

    def run(command):
        done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=20)
        assert done.stderr == ""
        return done.stdout.split("\0")[:-1]

    return run


def made(tmp_path, args=(), settings=None, cluster="", executor="docker", **fields):
    recipe(tmp_path, **fields)
    found = recipes.find(tmp_path, "nano3/sft")
    workdir = {"workdir": found.workdir} if found.workdir else {}
    return start.start(found, SETTINGS | workdir | (settings or {}), list(args), executor, cluster)


SCRIPT = "/code root/src/nemotron/recipes/nano3/sft/train.py"
CONFIG = ["--config", "/a b/config.yaml"]


def test_torchrun(tmp_path, shell):
    command, tool, setup, notes = made(tmp_path)
    assert shell(command) == [
        "torchrun", "--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "4", "--rdzv-backend", "static",
        "--rdzv-endpoint", "host:29400", "--rdzv-conf", "timeout=1800", SCRIPT, *CONFIG]
    assert (tool, setup, notes) == ("torchrun", [], [])


@pytest.mark.parametrize("launch", ["direct", "python", "ray"])
def test_other_modes_start_python(tmp_path, shell, launch):
    command, tool, *_ = made(tmp_path, launch=launch)
    assert shell(command) == ["python", SCRIPT, *CONFIG]
    assert tool == "python"


ARGS = ["a=1", "two words", "it's", '"q"', "$HOME", "`id`", "", "*", "\\", "a\nb", "é", "--flag", ";", "&&"]


@pytest.mark.parametrize("fields", [{}, {"launch": "direct"}, {"cmd": "my-tool {script}"}])
def test_arguments_arrive_as_they_are(tmp_path, shell, fields):
    assert shell(made(tmp_path, ARGS, **fields)[0])[-len(ARGS):] == ARGS


def test_cmd_and_run_command_are_filled_in(tmp_path, shell):
    command, tool, *_ = made(tmp_path, cmd="my-tool {script} --config {config} '{{x}}' ${{HOME:-none}}")
    assert shell(command) == ["my-tool", SCRIPT, *CONFIG, "{x}", "none"]
    assert tool == "my-tool"
    command, tool, *_ = made(tmp_path, cmd="uv run {script}", settings={"run_command": "A=1 my-tool {config}"})
    assert shell(command) == ["my-tool", "/a b/config.yaml"]
    assert tool == ""  # what comes first is not a tool


def test_a_script_with_a_blank_in_its_path(tmp_path, shell):
    recipe(tmp_path, "nano3/sft", path="src/my pkg/recipes/nano3/it's $x.py", launch="direct")
    found = recipes.find(tmp_path, "nano3/sft")
    assert shell(start.start(found, SETTINGS, [], "slurm").command)[1] == "/code root/src/my pkg/recipes/nano3/it's $x.py"


@pytest.mark.parametrize("template", ["{scrpt}", "{}", "{0}", "{script.x}", "{script[0]}", "{script", "}", "{script:d}",
                                      "{script!z}", "{script:{width}}", "${HOME}", "awk '{print}'"])
def test_a_template_that_cannot_be_filled_in(tmp_path, template):
    found = refusal(made, tmp_path, settings={"run_command": "run " + template})
    assert found.what.startswith("the command %r cannot be filled in: " % ("run " + template))
    assert found.fix == "only {script} and {config} are filled in; double other braces"


# ---------------------------------------------------------------- uv

CMD = "uv run --extra xenna python {script} --config {config}"
ALONE = "uv run --no-project {script} --config {config}"
UV = """#!/bin/sh
echo "$@" >>%s
[ -z "$UV_FAILS" ] || { echo no index >&2; exit 2; }
case $1 in sync|pip) exit ;; esac
while [ "$1" != python ] && [ -n "$1" ] && [ "${1%%.py}" = "$1" ]; do shift; done
[ "$1" = python ] || set -- python "$@"
[ "$2" != -c ] || { echo /uvs/bin; exit; }
exec "$@"
"""


@pytest.fixture
def pod(tmp_path):
    """Runs the setup and the command of a Start in one bash, as a pod does. What it says, and what uv was given."""
    write(tmp_path / "bin/python", "#!/bin/sh\necho STARTED \"$@\" by \"${AIRLIFT_UV_ENV:-$PATH}\"\n").chmod(0o755)
    for name in ("bash", "sh", "mkdir", "ln", "rm", "cp"):
        (tmp_path / "bin" / name).symlink_to("/bin/" + name)

    def run(found, uv=True, fails=False, code=None):
        (tmp_path / "uv.log").unlink(missing_ok=True)
        (tmp_path / "bin/uv").unlink(missing_ok=True)
        if uv:
            write(tmp_path / "bin/uv", UV % (tmp_path / "uv.log")).chmod(0o755)
        (tmp_path / "base").mkdir(exist_ok=True)
        env = {"PATH": str(tmp_path / "bin"), "AIRLIFT_CODE": str(code or tmp_path), "UV_FAILS": "1" * fails,
               "AIRLIFT_CONFIG": str(tmp_path / "base/config.yaml")}
        lines = ["set -eu", *("eval %s || exit 86" % start.shlex.quote(each) for each in found.setup), found.command]
        done = subprocess.run(["/bin/bash", "-c", "\n".join(lines)], env=env, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr
        log = tmp_path / "uv.log"
        given = [line.replace(str(tmp_path), "") for line in log.read_text().splitlines()] if log.exists() else []
        return done.stdout.replace(str(tmp_path), ""), given

    return run


PLACE = "src/nemotron/recipes/nano3/sft/train.py"
WORDS = "/%s --config /base/config.yaml" % PLACE
WITHOUT = "airlift: there is no uv in this pod: plain python starts the recipe\nSTARTED %s x=1 by " % WORDS


def cannot(source):
    return "airlift: uv cannot install %s here, see above: plain python starts the recipe\nSTARTED %s x=1 " % (source, WORDS)


def needs(what, source):
    return ["`%s` needs %s and the network: it starts the recipe where the pod's uv can install all that this names, else "
            "plain python, for which the image must have it" % (what, source)]


def test_uv_run_with_the_project_beside_src(tmp_path, pod):
    write(tmp_path / "pyproject.toml", "[project]\nname = 'x'\n")
    write(tmp_path / "uv.lock", "lock\n")
    found = made(tmp_path, ["x=1"], cmd=CMD)
    assert (found.command, found.tool) == (
        'uv run --extra xenna python "$AIRLIFT_CODE"/%s --config "$AIRLIFT_CONFIG" x=1' % PLACE, "")
    assert found.notes == needs("uv run --extra xenna", "the project in pyproject.toml")
    said, given = pod(found)
    assert said.startswith("STARTED %s x=1 by " % WORDS)
    assert [line.replace(" -c", "").split(" import")[0] for line in given] == [
        "run --extra xenna python", "run --extra xenna python %s x=1" % WORDS]
    project = tmp_path / "base/project"
    assert (project / "pyproject.toml").read_text() == "[project]\nname = 'x'\n" and (project / "src").is_symlink()
    assert (project / "uv.lock").read_text() == "lock\n" and not (project / "uv.lock").is_symlink(), "uv may write it"
    assert pod(found, uv=False) == (WITHOUT + "/bin\n", [])
    said, given = pod(found, fails=True)
    assert said.startswith(cannot("the project in pyproject.toml")) and len(given) == 1
    found = made(tmp_path, ["x=1"], executor="lepton", cmd=CMD)
    assert (found.command, found.tool) == ('python "$AIRLIFT_CODE"/%s --config "$AIRLIFT_CONFIG" x=1' % PLACE, "python")
    assert pod(found)[1][1:] == ["run --extra xenna python %s x=1" % WORDS], "and where it can, uv all the same"
    assert made(tmp_path, executor="lepton", cmd=CMD + " --more").command.endswith(' --config "$AIRLIFT_CONFIG" --more')
    found = made(tmp_path, ["x=1"], executor="lepton", cmd=CMD)
    assert pod(found, uv=False) == (WITHOUT + "/bin\n", [])
    assert pod(found, fails=True)[0].startswith(cannot("the project in pyproject.toml"))


def test_the_pods_of_a_ray_cluster_start_ray_from_what_uv_has_prepared(tmp_path, pod):
    write(tmp_path / "pyproject.toml", "")
    found = made(tmp_path, cmd=CMD, launch="ray", cluster="pods")
    (tmp_path / "uvs/bin").mkdir(parents=True)
    text = UV.replace("/uvs/bin", "%s/uvs/bin" % tmp_path)
    run = found._replace(command='echo "${PATH%%:*}"')
    write(tmp_path / "uv.text", text)
    globals()["UV"], before = text, UV
    try:
        assert pod(run)[0] == "/uvs/bin\n"
    finally:
        globals()["UV"] = before
    made_by_platform = made(tmp_path, cmd=CMD, launch="ray", cluster="platform")
    assert pod(made_by_platform) == ("STARTED %s by /bin\n" % WORDS, [])
    assert made_by_platform.notes == ["`uv run --extra xenna` needs a project and the network, and the nodes of a Ray cluster "
                                      "of the platform have what the image has: plain python starts the recipe"]


def test_uv_run_without_a_project(tmp_path, pod):
    found = made(tmp_path, ["x=1"], cmd=ALONE, dependencies=["pandas>=2", "data-designer[x]"])
    source = "the script's own dependencies (pandas, data-designer)"
    assert found.notes == needs("uv run --no-project", source)
    said, given = pod(found)
    assert said.startswith("STARTED %s x=1 by " % WORDS)
    assert given == ["sync -q --script /" + PLACE, "run --no-project %s x=1" % WORDS]
    assert pod(found, uv=False) == (WITHOUT + "/bin\n", [])
    assert pod(found, fails=True)[0].startswith(cannot(source))
    found = made(tmp_path, ["x=1"], executor="dgxcloud", cmd=ALONE, dependencies=["pandas>=2", "data-designer[x]"])
    assert pod(found)[1] == ["sync -q --script /" + PLACE, "run --no-project %s x=1" % WORDS]
    assert start.project_files(recipes.find(tmp_path, "nano3/sft"), {}, []) == ()


def test_uv_run_with_the_images_project(tmp_path, pod):
    found = made(tmp_path, ["x=1"], cmd="uv run python {script} --config {config}", workdir="/opt/nemo-rl")
    write(tmp_path / "pyproject.toml", "")
    write(tmp_path / "uv.lock", "")
    assert pod(found)[1] == ["run python %s x=1" % WORDS]
    assert pod(found, uv=False) == (WITHOUT + "/bin\n", [])
    assert found.notes == ["`uv run` starts the recipe where the pod has uv, else plain python"]
    assert made(tmp_path, ["x=1"], executor="lepton", cmd="uv run python {script} --config {config}", workdir="/opt") == found
    assert start.project_files(recipes.find(tmp_path, "nano3/sft"), {}, []) == ("pyproject.toml",)


def test_uv_run_where_there_is_no_project(tmp_path, pod):
    found = made(tmp_path, ["x=1"], cmd=CMD)
    assert found.notes == ["`uv run --extra xenna` needs a project and the network, and there is no pyproject.toml beside src: "
                           "plain python starts the recipe"]
    assert pod(found) == ("STARTED %s x=1 by /bin\n" % WORDS, [])
    found = made(tmp_path, ["x=1"], executor="lepton", cmd=CMD)
    assert found.tool == "python" and found.setup == [] and pod(found) == ("STARTED %s x=1 by /bin\n" % WORDS, [])


@pytest.mark.parametrize("launch", ["direct", "torchrun"])
def test_a_stage_with_a_project_of_its_own(tmp_path, pod, launch):
    folder = (tmp_path / PLACE).parent
    write(folder / "pyproject.toml", '[tool.nemotron]\nentry-point = "train.py"\n')
    write(folder / "run_uv.py", "")
    found = made(tmp_path, ["x=1"], launch=launch)
    assert found.tool == ("python" if launch == "direct" else "torchrun")
    assert found.notes == needs("run_uv.py", "the pyproject.toml of its stage")
    if launch == "direct":
        said, given = pod(found)
        assert said.startswith("STARTED %s x=1 by " % WORDS.replace("train.py", "run_uv.py"))
        assert given == ["pip compile -q -o /dev/null /%s/pyproject.toml" % os.path.dirname(PLACE)]
        assert pod(found, uv=False) == (WITHOUT + "/bin\n", [])
        assert pod(found, fails=True)[0].startswith(cannot("the pyproject.toml of its stage"))
    write(folder / "pyproject.toml", '[tool.nemotron]\nentry-point = "other.py"\n')
    assert made(tmp_path, launch=launch).setup == []


def test_this_machine_says_whether_it_has_uv(tmp_path):
    write(tmp_path / "pyproject.toml", "")
    write(tmp_path / "tools/uv", "#!/bin/sh\n").chmod(0o755)
    for own, said in (({"env_vars": {"PATH": "/nowhere"}}, True), ({"env_vars": {"PATH": str(tmp_path / "tools")}}, False),
                      ({"env_vars": {"PATH": "/nowhere"}, "startup_commands": ["pip install uv"]}, False)):
        note = made(tmp_path, executor="local", cmd=CMD, settings=own).notes[0]
        assert note.endswith("; there is no uv on this machine") == said


def test_what_a_person_says_is_run_as_it_is(tmp_path, pod):
    found = made(tmp_path, cmd="ray", settings={"run_command": CMD})
    assert (found.tool, found.setup, found.notes) == ("uv", [], [])


def test_what_ships_of_a_project(tmp_path):
    recipe(tmp_path, cmd=CMD)
    found = recipes.find(tmp_path, "nano3/sft")
    write(tmp_path / "pyproject.toml", '[project]\nreadme = "README.md"\nlicense = { file = "LICENSE" }\n')
    for name in ("README.md", "LICENSE", "uv.lock"):
        write(tmp_path / name, "x")
    whole = ("pyproject.toml", "README.md", "LICENSE", "uv.lock")
    assert start.project_files(found, {}, []) == whole
    assert start.project_files(found, {"run_command": "python {script}"}, []) == ("pyproject.toml",)
    assert start.project_files(found, {"run_command": "python {script}"}, ["uv sync"]) == whole
    write(tmp_path / "pyproject.toml", "no toml")
    assert start.project_files(found, {}, []) == ("pyproject.toml", "uv.lock")


def test_a_lock_that_does_not_fit_stays_here_and_is_named(tmp_path, monkeypatch, capsys):
    for here in cloud("lepton", tmp_path, monkeypatch, capsys):
        here.recipe("", cmd=CMD)
        write(here.root / "pyproject.toml", "[project]\n")
        for size, sent in ((1000, True), (1_300_000, False)):
            write(here.root / "uv.lock", Random(1).randbytes(size).hex())
            dry = here.launch("--dry-run")
            assert ("also sent, as config or command name them: uv.lock" in dry.out) == sent, dry.out
            assert ("uv.lock is too big for this job, so uv finds versions of its own" in dry.out) != sent
            files = here.main("files", "nano3", "sft", "lepton", "--repo-root", here.root).out
            assert "pyproject.toml" in files and ("uv.lock" in files) == sent


def test_a_pod_without_uv_runs_the_recipe_all_the_same(tmp_path):
    """Through the pod itself, whose last exit code is the recipe's."""
    write(tmp_path / "pyproject.toml", "")
    found = made(tmp_path, cmd=CMD)
    plan = support.plan({PLACE: b"raise SystemExit(5)\n"}, script=PLACE, command=found.command, setup=found.setup, tool=found.tool)
    code, out = support.ran(plan, tmp_path / "scratch")
    assert code == 5 and "airlift: there is no uv in this pod: plain python starts the recipe" in out.text
