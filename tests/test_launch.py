"""launch.py: words, refusals as text, help, several stages, and where and under what it runs."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inside import CONFIGS, FAMILY, check_shape
from layout import FLAT, REPO, flat_folder, header, launcher, nemotron, recipe, write
from support import python

import backends
import commands
import launch
import runs
import transport

# ---------------------------------------------------------------- refusals: exit code and two lines
REFUSALS = [
    # (words, what, fix)
    ("", "no recipe was named", "python launch.py list shows them; --help shows all commands"),
    ("--json", "no recipe was named", "python launch.py list shows them; --help shows all commands"),
    ("nano3", "a launch needs FAMILY and STAGE", "like: python launch.py nano3 sft local"),
    ("nano3 a=1", "a launch needs FAMILY and STAGE", "like: python launch.py nano3 sft local"),
    ("nano3 sft local more", "unexpected word 'more'",
     "overrides are KEY=VALUE; arguments for the script follow --"),
    ("nano3 sft --nodes 0", "--nodes is 0", "it must be a whole number, 1 or more"),
    ("nano3 sft --nodes -3", "--nodes is -3", "it must be a whole number, 1 or more"),
    ("nano3 sft --nodes two", "--nodes is 'two'", "it must be a whole number, 1 or more"),
    ("nano3 sft --nodes", "--nodes needs a value", "write it after the option, like: --nodes 2, -c default"),
    ("nano3 sft -c", "--config needs a value", "write it after the option, like: --nodes 2, -c default"),
    ("nano3 sft -c -- x", "--config needs a value", "write it after the option, like: --nodes 2, -c default"),
    ("nano3 sft --dry", "there is no option --dry", "did you mean --dry-run?"),
    ("nano3 sft --repo .", "there is no option --repo", "did you mean --repo-root?"),
    ("nano3 sft --lr=1", "there is no option --lr",
     "overrides are KEY=VALUE without dashes; --help shows the options"),
    ("nano3 sft -x", "there is no option -x",
     "overrides are KEY=VALUE without dashes; --help shows the options"),
    ("nano3 sft lokal", "profile 'lokal' does not exist", "did you mean local? (read: ROOT/profiles/*.toml)"),
    ("nano3 sft lokal --dry-run", "profile 'lokal' does not exist", "did you mean local? (read: ROOT/profiles/*.toml)"),
    ("nano sft", "there is no family 'nano'", "did you mean nano3?"),
    ("nano3 stf", "nano3 has no stage 'stf'", "did you mean sft?"),
    ("nano3 data/prep/lr", "nano3 has no stage 'data/prep/lr'", "did you mean data/prep/rl?"),
    ("nano3 /", "nano3 has no stage ''", "did you mean data/prep/rl or rl or sft?"),
    ("nano3 sft -c defualt", "nano3/sft has no config 'defualt' in ROOT/" + CONFIGS, "did you mean default?"),
    ("nano3 sft -c ./x.yaml", "there is no config file ./x.yaml", "give the path of a file, or the name of a config in ROOT/" + CONFIGS),
    ("nano3 sft =1", "the override '=' names no setting", "overrides are KEY=VALUE with dots between names; + before ..."),
    ("nano3 sft a=[", "the override 'a=[' cannot be parsed: ...", "its value is read as YAML; put a text in quotes, ..."),
    ("nano3 sft run=1", "ROOT/" + CONFIGS + "/default.yaml: run is 1, not a table", "fix the config's run section"),
    ("nano3 sft run.env.nodes=two", "nodes is 'two'", "it must be a whole number, 1 or more"),
    ("nano3 sft run.env.startup_commands=ls", "run.env.startup_commands is 'ls'", "it must be a list of strings"),
    ("nano3 sft run.env.run_command={x}", "run.env.run_command is ***", "it must be a string"),
    ("nano3 sft run.env.run_command=go-{x}", "the command 'go-{x}' cannot be filled in: it names {x}",
     "only {script} and {config} are filled in; double other braces"),
    ("nano3 sft run.env.compression=zip", "run.env.compression is 'zip'", "it must be xz or gz"),
    ("nano3 sft run.env.unpack=shred", "run.env.unpack is 'shred'", "it must be local or shared"),
    ("nano3 sft run.env.nodez=2", "there is no key run.env.nodez", "did you mean nodes or ..."),
    ("nano3 sft x+=[5]", "the override 'x+=' names no setting", "overrides are KEY=VALUE with dots between ..."),
    ("nano3 sft run.env.secrets.T=vault:x", "secrets.T is not a reference that local supports", 'write "env" or "login"'),
    ("nano3 sft run.env.secrets.UNSET_HERE=env", "secret UNSET_HERE is not set here",
     "export it, or remove it from [secrets]"),
    ("nano3 sft --repo-root /nonexistent", "there is no recipe under /nonexistent/src/*/recipes or steps",
     "name the source tree with --repo-root"),
    ("nano3 sft --repo-root", "--repo-root needs a value",
     "write it after the option, like: --nodes 2, -c default"),
    ("list nan", "ROOT has no recipe of family nan", "did you mean nano3?"),
    ("list a b", "unexpected word 'b'", "list takes only a family"),
    ("list --repo-root /nonexistent", "/nonexistent has no recipe", "name the source tree with --repo-root"),
    ("list --nodes 2", "list does not take --nodes", "leave it out"),
    ("list -- x", "list does not take --", "leave it out"),
    ("profiles local", "unexpected word 'local'", "profiles takes no words"),
    ("profiles -c x", "profiles does not take --config", "leave it out"),
    ("files nano3", "a launch needs FAMILY and STAGE", "like: python launch.py nano3 sft local"),
    ("files nano3 sft --detach", "files does not take --detach", "leave it out"),
    ("logs", "name one run", "python launch.py status lists them"),
    ("logs a b", "name one run", "python launch.py status lists them"),
    ("logs zzzzzz", "there is no run 'zzzzzz'", "python launch.py status lists them"),
    ("logs ../x", "there is no run '../x'", "python launch.py status lists them"),
    ("cancel", "name one run", "python launch.py status lists them"),
    ("cancel zzzzzz", "there is no run 'zzzzzz'", "python launch.py status lists them"),
    ("cancel zzzzzz --json", "cancel does not take --json", "leave it out"),
    ("diff", "diff takes a run, or two", "python launch.py status lists them"),
    ("diff zzzzzz", "there is no run 'zzzzzz'", "python launch.py status lists them"),
    ("logs zzzzzz --rank x", "--rank is 'x'", "it must be a whole number, 0 or more"),
    ("logs zzzzzz --rank 0 --all-ranks", "--rank and --all-ranks cannot be combined", "leave one out"),
    ("nano3 sft --nodes 2 --rank 2", "there is no rank 2", "the job has ranks 0 to 1"),
    ("nano3 sft --nodes 1 --rank 1", "there is no rank 1", "the job has only rank 0"),
    ("nano3 sft -f", "launch does not take --follow", "leave it out"),
    ("status zzzzzz", "there is no run 'zzzzzz'", "python launch.py status lists them"),
    ("status a b", "name one run", "python launch.py status lists them"),
    ("status --dry-run", "status does not take --dry-run", "leave it out"),
]


@pytest.mark.parametrize(("words", "what", "fix"), REFUSALS, ids=[case[0] for case in REFUSALS])
def test_a_refusal_is_two_lines_and_exit_code_2(say, here, words, what, fix):
    code, out, err = say(*words.split())
    lines = err.splitlines()
    assert code == 2 and out == "" and len(lines) == 2
    for line, want in zip(lines, ("airlift: " + what, fix), strict=True):
        want = want.replace("ROOT", str(here))
        assert line == want or (want.endswith("...") and line.startswith(want[:-3]))
    assert not (here.parent / "home/airlift").exists()  # nothing was started


POOL = st.sampled_from([
    "nano3", "sft", "data/prep/rl", "rl", "local", "lepton", "dgxcloud", "nope", "list", "profiles", "files", "status",
    "logs", "cancel", "launch", "-c", "default", "--config", "--nodes", "2", "0", "--repo-root", ".", "--json",
    "--detach", "--all-ranks", "--", "--debugging", "a=1", "run.env.nodes=3", "run.env=x", "run.env.env_vars={A: 1}",
    "a=${", "=", "", "-", "-1", "a.b"])


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.lists(POOL | st.text(max_size=5).filter(lambda word: "\0" not in word), max_size=7))
def test_any_words_end_in_two_lines_at_most(say, monkeypatch, words):
    monkeypatch.setattr(transport, "compress", lambda data, method: b"x")
    code, _, err = say("--dry-run", *words)
    assert code in (0, 2) and len(err.splitlines()) == (2 if code else 0)
    assert "a bug" not in err


def test_debug_shows_where_a_refusal_comes_from(here, capsys):
    for words in ("nano3 sft lokal --debug", "--debug nano3", "nano3 sft --nodes x --debug"):
        assert launch.main(words.split()) == 2
        err = capsys.readouterr().err
        assert err.startswith("Traceback") and err.splitlines()[-2].startswith("airlift: ")


def test_debug_after_the_dashes_is_the_scripts(say):
    assert say("nano3", "sft", "lokal", "--", "--debug")[0] == 2


@pytest.mark.parametrize(("error", "code", "first"), [
    (KeyboardInterrupt(), 130, "interrupted"), (ZeroDivisionError("x"), 2, "a bug: ZeroDivisionError('x')"),
    (PermissionError(13, "Permission denied", "/root/x"), 2, "/root/x: Permission denied"),
    (transport.Refusal("several\nlines", "to\n do", 5), 5, "several lines")])
def test_no_error_ends_in_a_traceback(say, monkeypatch, capsys, error, code, first):
    def fail(options):
        raise error

    monkeypatch.setitem(launch.COMMANDS, "list", launch.COMMANDS["list"]._replace(function=fail))
    found, out, err = say("list")
    assert (found, out) == (code, "") and len(err.splitlines()) == 2
    assert err.splitlines()[0] == "airlift: " + first
    assert launch.main(["list", "--debug"]) == code and "Traceback" in capsys.readouterr().err


def test_help(here, capsys):
    """The overview fits a screen; of each command everything is told, and nothing of another."""
    assert launch.main(["--help"]) == launch.main(["-h"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 2 * 24 and max(map(len, shown.splitlines())) <= 120
    for name, command in launch.COMMANDS.items():
        assert command.about in shown and (name == "launch" or "  %s" % name in shown)
    for code in "012345":
        assert re.search(r"\b%s [a-z]" % code, shown)
    for name, command in launch.COMMANDS.items():
        assert launch.main([name, "--help"]) == 0
        told = capsys.readouterr().out
        for option, known in launch.OPTIONS.items():
            assert (known.about in told) == (option in command.options + launch.ALWAYS), (name, option)
    assert launch.main(["nano3", "sft", "--help"]) == 0
    assert capsys.readouterr().out == launch.detail("launch")


@pytest.mark.parametrize("name", launch.COMMANDS)
def test_help_of_a_command_is_all_one_needs(say, here, monkeypatch, name):
    """Wherever --help stands and whatever else there is, nothing is done but to tell."""
    monkeypatch.setitem(launch.COMMANDS, name, launch.COMMANDS[name]._replace(function=lambda options: 1 / 0))
    code, told, err = say(name, "--help")
    command = launch.COMMANDS[name]
    usage = "python launch.py %s" % " ".join(filter(None, ["" if name == "launch" else name, command.words, "[options]"]))
    assert (code, err, told.splitlines()[:2]) == (0, "", [usage, command.about])
    assert len(told.splitlines()) <= 24 and max(map(len, told.splitlines())) <= 120
    for words in ([name, "x", "-h"], ["--help", name], [name, "--help", "--json", "--nodes", "0"], ["-h", name, "--", "x"]):
        assert say(*words) == (0, told, "")


def test_broken_files_are_named_with_their_line(say, here):
    write(here / "src/nemotron/recipes/nano3/stage1_sft/train.py", header(launch="mpi"))
    mend = "src/nemotron/recipes/nano3/stage1_sft/train.py:9: launch mode 'mpi' is not known"
    assert say(*FAMILY, "--dry-run") == (
        2, "", "airlift: nano3 has no stage 'sft'\ndid you mean data/prep/rl or rl?; or fix %s\n" % mend)
    code, out, err = say("list")
    assert code == 2 and "data/prep/rl" in out
    assert err == "airlift: %s\nuse one of torchrun, ray, direct, python\n" % mend


# ---------------------------------------------------------------- dry runs


def test_what_does_not_fit_is_told_in_full_and_exits_3(say, here):
    (here / "src/nemotron/kit/noise.txt").write_bytes(os.urandom(1_200_000))
    code, out, err = say(*FAMILY, "lepton", "--json")
    plan = json.loads(out)
    check_shape(plan)
    assert (code, err, plan["payload"]["fits"]) == (3, "", False)
    assert plan["payload"]["object_bytes"] > plan["payload"]["object_limit"]
    code, out, err = say(*FAMILY, "lepton", "--dry-run")
    assert code == 3 and len(err.splitlines()) == 2 and "nothing was submitted" in err.splitlines()[0]
    assert err.startswith("airlift: the payload does not fit: API object needs ")
    assert "the biggest are src/nemotron/kit/noise.txt (1.1 MiB), " in err
    assert "100 %" not in out and "nothing was submitted" in out


def test_one_file_that_is_too_large_is_in_the_json_too(say, here):
    with open(here / "src/nemotron/kit/huge.txt", "wb") as file:
        file.truncate(1 << 30)
    code, out, err = say(*FAMILY, "lepton", "--json")
    assert (code, err, json.loads(out)["payload"]["fits"]) == (3, "", False)
    assert "1073741824  src/nemotron/kit/huge.txt" in say("files", *FAMILY, "lepton")[1]


def test_a_later_stage_that_is_refused_says_how_to_go_on(say, here, monkeypatch):
    recipe(here, "nano3/prep", nodes=1)
    started = []

    def submit(plan, options):
        if started:
            raise transport.Refusal("the platform could not be reached", "look at the network", 5)
        started.append(plan.recipe.name)
        return runs.Run("t23456", plan.recipe.name, "local", "local", 1, "0", ended=["done", ""]), 0.0

    monkeypatch.setattr(launch, "submit", submit)
    monkeypatch.setattr(commands, "follow", lambda run, took: 0)
    code, out, err = say("nano3", "prep,sft", "run.env.nodes=1")
    assert (code, started, len(err.splitlines())) == (5, ["nano3/prep"], 2)
    assert out == "to continue from here: python launch.py nano3 sft local run.env.nodes=1\n"


def test_ctrl_c_in_a_pipeline_says_how_to_go_on_behind_the_job_that_goes_on(say, here, monkeypatch):
    recipe(here, "nano3/prep", nodes=1)
    run = runs.Run("t23456", "nano3/prep", "slurm", "slurm", 1, "0")
    monkeypatch.setattr(launch, "submit", lambda one, options: (run, 0.0))
    monkeypatch.setattr(commands, "follow", lambda run, took: 0)  # as it answers Ctrl-C: the job has not ended
    assert say("nano3", "prep,sft") == (0, "to continue from here: python launch.py nano3 sft local\n", "")


class Chains:
    """A backend whose platform starts a job when the one before it has succeeded."""

    CAN = frozenset({"detach", "chain"})

    def __init__(self, error=None, stuck=()):
        self.error, self.stuck, self.seen, self.cancelled = error, stuck, [], []

    def check(self, job, plan):
        pass

    def submit(self, run, job, plan, attached):
        run.save()
        self.seen.append((run.recipe, run.after, attached))
        if self.error and len(self.seen) == 3:
            raise self.error

    def status(self, run):
        return backends.Status("waiting", "PENDING")

    def cancel(self, run):
        self.cancelled.append(run.recipe)
        if run.recipe in self.stuck:
            raise transport.Refusal("login cannot be reached", "look at the network", 5)
        return "job was cancelled"


STAGES = ["nano3/a", "nano3/b", "nano3/c"]


@pytest.fixture
def chained(say, here, monkeypatch):
    """Launches three stages at once on a Chains: (it, exit code, output, errors)."""

    def launch_them(*words, **options):
        for name in STAGES:
            recipe(here, name, nodes=1)
        made = Chains(**options)
        monkeypatch.setattr(backends, "backend", lambda executor: made)
        return (made, *say("nano3", "a,b,c", *words))

    return launch_them


def test_detached_stages_are_submitted_at_once_each_behind_the_one_before(say, chained):
    made, code, out, err = chained("--detach")
    ids = re.findall(r"logs -f (\w+)", out)
    assert (code, err) == (0, "")
    assert made.seen == list(zip(STAGES, [None, *ids[:2]], [False] * 3, strict=True))
    assert re.findall("^start.*; ", out, re.MULTILINE) == [
        "started; ", *("starts when run %s has succeeded; " % run for run in ids[:2])]
    rows = json.loads(say("status", "--json")[1])
    assert [(row["run"], row["after"]) for row in rows] == [(ids[2], ids[1]), (ids[1], ids[0]), (ids[0], None)]
    assert re.findall(r"PENDING(?:; after (\w+))?$", say("status")[1], re.MULTILINE) == [ids[1], ids[0], ""]
    code, out, err = say("cancel", ids[1])  # what is left after it, the last one first
    assert (code, err, made.cancelled) == (0, "", ["nano3/c", "nano3/b"])
    assert out == "".join("%s, %s on local: job was cancelled\n" % (ids[n], STAGES[n]) for n in (2, 1))


@pytest.mark.parametrize(("error", "code", "left"), [
    (transport.Refusal("no such partition", "name another", 4), 4, STAGES[:2]),
    (transport.Refusal("login did not answer", "try again later", 5), 5, STAGES),  # the job may be there
    (KeyboardInterrupt(), 130, STAGES)])
def test_a_chain_is_submitted_whole_or_not_at_all(chained, error, code, left):
    made, found, out, err = chained("--detach", error=error)
    assert found == code and made.cancelled == left[::-1] and out.count("to follow it") == 2
    assert err.splitlines()[0] == "not all stages could be submitted, so those that were are cancelled:"
    assert err.count("job was cancelled") == len(left) and len(err.splitlines()) == 3 + len(left)


def test_what_of_a_chain_could_not_be_cancelled_is_said(say, chained):
    error = transport.Refusal("no such partition", "name another", 4)
    made, code, _, err = chained("--detach", error=error, stuck=["nano3/b"])
    assert code == 4 and made.cancelled == ["nano3/b", "nano3/a"]
    assert re.search(r"^airlift: run \w+ was not cancelled: login cannot be reached\nlook at the network$", err, re.MULTILINE)
    assert say("cancel", re.search(r"run (\w+) was not", err).group(1))[0] == 5


def test_a_dry_run_says_that_an_executor_has_no_chains(say, here):
    recipe(here, "nano3/prep", nodes=1)
    said = "a launch would be refused: --detach is not possible with several stages on docker"
    assert said in say("nano3", "prep,sft", "docker", "--dry-run", "--detach", "run.env.nodes=1")[1]
    assert said not in say("nano3", "prep,sft", "docker", "--dry-run", "run.env.nodes=1")[1]


# ---------------------------------------------------------------- as a process


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """The flat scripts copied next to a checkout, as a person does it: no virtual environment, no git."""
    return flat_folder(nemotron(tmp_path_factory.mktemp("flat")))


@pytest.fixture
def bare(tmp_path):
    """An environment with hardly anything in it."""
    (tmp_path / "home").mkdir()
    return {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home")}


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts)


def test_a_copied_folder_works_from_any_directory(flat, bare, tmp_path):
    done = launcher(flat, *FAMILY, "lepton", "--dry-run", env=bare, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("nothing was submitted\n")
    link = tmp_path / "link"
    link.symlink_to(flat)
    there = launcher(link, *FAMILY, "lepton", "--json", env=bare, cwd=tmp_path)
    assert there.returncode == 0 and json.loads(there.stdout)["recipe"]["name"] == "nano3/sft"
    assert set(FLAT) < set(os.listdir(flat))


def test_a_dry_run_needs_no_network_and_writes_nothing(flat, bare):
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("needs unshare -rn")
    before = files_below(flat)
    words = [sys.executable, str(flat / "launch.py"), *FAMILY, "--dry-run"]
    for profile in ("local", "docker", "slurm", "lepton", "dgxcloud"):
        done = subprocess.run(["unshare", "-rn", *words, profile], env=bare, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(bare["HOME"]) == []
    assert files_below(flat) == before


OLD = [(2, 7), (3, 6), (3, 7), (3, 8), (3, 9), (3, 10)]


@pytest.mark.parametrize("version", OLD, ids=["%d.%d" % version for version in OLD])
def test_an_old_python_is_told_plainly(flat, bare, version):
    for words in ([], FAMILY, ["--help"], ["nano3", "sft", "--debug"]):
        done = launcher(flat, *words, python=python(*version), env=bare)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines() == [
            "airlift: needs Python 3.11 or later, and this is %d.%d" % version,
            "start it with a newer one, like: python3.11 launch.py ..., or run `make setup`"]


def test_an_old_python_hands_over_to_the_virtual_environment(tmp_path, bare):
    folder = flat_folder(nemotron(tmp_path / "flat"))
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(REPO / ".venv/bin/python")
    if not (REPO / ".venv/bin/python").exists():
        pytest.skip("there is no .venv in this checkout")
    (folder / ".venv/pyvenv.cfg").write_text((REPO / ".venv/pyvenv.cfg").read_text())
    (folder / ".venv/lib").symlink_to(REPO / ".venv/lib")
    done = launcher(folder, *FAMILY, "lepton", "--json", python=python(3, 8), env=bare)
    assert done.returncode == 0 and json.loads(done.stdout)["payload"]["fits"]


def test_another_active_environment_that_lacks_what_is_needed(tmp_path, bare):
    """`make setup` was done: its Python is used, whatever else is active."""
    folder = flat_folder(nemotron(tmp_path / "flat"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "other"], check=True)
    other = str(tmp_path / "other/bin/python")
    done = launcher(folder, *FAMILY, "--dry-run", python=other, env=bare)
    assert done.returncode == 2 and "is not installed for %s" % other in done.stderr
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    site = next((folder / ".venv").glob("lib/python*/site-packages"))
    (site / "those.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    done = launcher(folder, *FAMILY, "--dry-run", python=other, env=bare)
    assert done.returncode == 0, done.stderr


def test_without_omegaconf_two_plain_lines(flat, bare):
    newer = python(3, 12)
    assert subprocess.run([newer, "-c", "import omegaconf"], capture_output=True).returncode, "this one has omegaconf"
    done = launcher(flat, *FAMILY, "--dry-run", python=newer, env=bare)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "airlift: omegaconf, which reads the configs, is not installed for %s" % newer,
        "run `make setup`, or pip install -r requirements.txt with that Python"]
    for words in (["list"], ["profiles"], ["status"]):
        assert launcher(flat, *words, python=newer, env=bare).returncode == 0


def test_a_reader_that_goes_away_is_no_error(flat, bare, tmp_path):
    root = tmp_path / "big"
    for number in range(200):
        recipe(root, "f/s%d" % number, path="src/p/recipes/f/s%d.py" % number, image="x" * 2000)
    for words in (["list", "--repo-root", root], ["list", "--json", "--repo-root", root],
                  ["files", "f", "s1", "--repo-root", root], ["profiles"], ["f", "s1", "--json", "--repo-root", root]):
        process = subprocess.Popen([sys.executable, str(flat / "launch.py"), *map(str, words)], env=bare,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        assert (process.stderr.read(), process.wait(30)) == (b"", 0)
        process.stderr.close()


def test_output_that_cannot_be_written_is_an_error(flat, bare):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(flat / "launch.py"), "list"], env=bare, stdout=full,
                              stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "airlift: No space left on device\ncheck that it exists, its permissions, and the space on disk\n"


def test_any_locale_and_odd_words(flat, bare):
    for locale in ({"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        words = [sys.executable, str(flat / "launch.py"), *FAMILY, "local", "a=é", "--", "ü"]
        done = subprocess.run([*words[:4], "--json", *words[4:]], env=bare | locale, capture_output=True, timeout=60)
        plan = json.loads(done.stdout)
        assert "a: é\n" in plan["config"]["text"] and plan["command"].endswith(" 'ü'")
        done = subprocess.run([*words[:4], "--dry-run", *words[4:]], env=bare | locale, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
        done = subprocess.run([*words[:5], b"a=\xff"], env=bare | locale, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (2, b"airlift: the word 'a=\\udcff' is not UTF-8\nwrite it in UTF-8\n")


def sized(done):
    """What it printed, without sizes: the run's id is a part of what is compressed."""
    return re.sub(r"[\d.]+ KiB", "N", done.stdout)


def test_slow_imports_are_told_where_that_is_asked_for(flat, bare):
    quiet = launcher(flat, *FAMILY, "--dry-run", env=bare)
    for words, env in ((["--verbose"], {}), ([], {"AIRLIFT_DEBUG": "1"})):
        told = launcher(flat, *FAMILY, "--dry-run", *words, env=bare | env)
        assert (told.returncode, quiet.stderr) == (0, "") and sized(told) == sized(quiet)
        assert re.fullmatch(r"(\S{8} import omegaconf\n\S{8} import omegaconf: \d+\.\d\d s\n)+", told.stderr)
    assert "import omegaconf" not in launcher(flat, *FAMILY, "--dry-run", "--", "--verbose", env=bare).stderr


def test_ctrl_c_while_it_packs(flat, bare, tmp_path):
    root = nemotron(tmp_path / "slow")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # reading it blocks
    write(tmp_path / "lib/omegaconf.py", "open(%r).read()\n" % str(pipe))
    process = subprocess.Popen([sys.executable, str(flat / "launch.py"), *FAMILY, "--repo-root", str(root), "--dry-run"],
                               env=bare | {"PYTHONPATH": str(tmp_path / "lib")}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    writer, deadline = -1, time.monotonic() + 30
    while writer < 0:
        assert process.poll() is None and time.monotonic() < deadline
        with contextlib.suppress(OSError):  # nobody reads it yet
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    os.close(writer)
    assert (process.returncode, out) == (130, "")
    assert err == "airlift: interrupted\npython launch.py status shows what was started\n"
