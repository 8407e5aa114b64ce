"""pod/entry.py, and the programs that are shipped: what a pod says and keeps, on every Python. Real processes."""

import ast
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import support
from support import (
    ENDED,
    MARKS,
    PATH,
    SCRIPT,
    failed,
    plan,
    plant,
    pythons,
    ran,
    shape,
    shape_of,
    started,
    tmpfs,
    tree,
)

import transport
from pod import failures
from pod.rank import free_port
from transport import plan_for

ROOT = Path(transport.__file__).parent


# ---------------------------------------------------------------- output and workspace


def test_the_log_equals_the_output(tmp_path: Path) -> None:
    recipe = ("import os, sys\nfor i in range(300):\n    os.write(1 + i % 2, b'%d \\xff\\r' % i * 97)\n"
              "os.write(1, b'no end of line')\nsys.exit(5)")
    whole = plan({SCRIPT: recipe.encode()}, setup=["echo from setup"], command='python "$AIRLIFT_CODE"/' + SCRIPT,
                 run_root=str(tmp_path / "ws"))
    both = b""
    for _ in (1, 2):
        code, out = ran(whole, tmp_path / "scratch", stderr=subprocess.PIPE)
        assert code == 5
        first, _, rest = out.output.partition(b"\n")
        assert first.startswith(b"airlift: rank 0 of 1")
        tail = (ENDED % ("0", 5)).encode()
        assert rest.endswith(b"no end of line\n" + tail)
        logs = tmp_path / "ws/runs/t23456"
        both += rest[:-len(tail)]
        assert (logs / "rank-0.log").read_bytes() == both, "a restart goes on in the same log"
        assert (logs / "rank-0.exit").read_text() == "5\n"
        assert sorted(os.listdir(logs)) == ["rank-0.exit", "rank-0.log", "run.json"]


def test_the_code_of_an_earlier_start_is_gone_while_it_runs_again(tmp_path: Path) -> None:
    whole = plan(run_root=str(tmp_path / "ws"), command='ls "$NEMO_RUN_DIR"/runs/t23456')
    ran(whole, tmp_path / "scratch")
    code, out = ran(whole, tmp_path / "scratch")
    assert code == 0 and "rank-0.log\n" in out.text and "rank-0.exit" not in out.text


def test_output_comes_as_it_is_written(tmp_path: Path) -> None:
    whole = plan(command="printf 'no line'; sleep 30", run_root=str(tmp_path / "ws"))
    with started(whole, tmp_path / "scratch") as running:
        running.until(b"no line", 5)
        assert running.signal(signal.SIGTERM) == 143


def test_a_full_disk_under_the_log_does_not_end_the_recipe(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "ws", "size=64k") as workspace:
        code, out = ran(plan(command="head -c 300000 /dev/zero | tr '\\0' x; echo THE END; exit 5",
                             run_root=str(workspace)),
                        tmp_path / "scratch")
        assert code == 5, out.text[-500:]
        assert "THE END" in out.text and out.text.count("x" * 1000) >= 290
        assert len(re.findall("airlift: the log .* ends here: No space left on device", out.text)) == 1
        assert out.text.endswith(ENDED % ("0", 5)) and "Traceback" not in out.text


def test_a_log_that_cannot_be_opened_does_not_end_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "ws/runs/t23456/rank-0.log").mkdir(parents=True)
    (tmp_path / "ws/runs/t23456/rank-0.exit").mkdir(parents=True)
    code, out = ran(plan(command="echo OUT; exit 5", run_root=str(tmp_path / "ws")), tmp_path / "scratch")
    assert code == 5 and "OUT" in out.text and "cannot be kept" in out.text and "Traceback" not in out.text


@pytest.mark.parametrize("workspace", [False, True])
def test_nobody_reads_the_output(tmp_path: Path, workspace: bool) -> None:
    """The other end of standard output is closed: the recipe goes on, and its code comes back."""
    recipe = b"import os, sys\ntry:\n    os.write(1, b'x' * 300000)\nexcept BrokenPipeError:\n    pass\nsys.exit(5)"
    whole = plan({SCRIPT: recipe}, command='python "$AIRLIFT_CODE"/' + SCRIPT,
                 run_root=str(tmp_path / "ws") if workspace else None)
    read, write = os.pipe()
    with started(whole, tmp_path / "scratch", stdout=write) as running:
        os.close(write)
        os.close(read)
        assert running.process.wait(20) == 5
    if workspace:
        assert (tmp_path / "ws/runs/t23456/rank-0.log").stat().st_size == 300_000
        assert (tmp_path / "ws/runs/t23456/rank-0.exit").read_text() == "5\n"


def test_a_torchrun_job_with_several_ranks_reports_each(tmp_path: Path) -> None:
    whole = plan(nodes=3, command="exit $NODE_RANK", run_root=str(tmp_path / "ws"))
    for rank in range(3):
        code, out = ran(whole, tmp_path / str(rank), env={"NODE_RANK": str(rank), "MASTER_ADDR": "m"})
        assert code == rank and out.text.startswith("airlift: rank %d of 3, sha256 %s" % (rank, whole.digest))


# ---------------------------------------------------------------- Pythons

NEWER = {"graphlib", "zoneinfo", "tomllib", "compression", "annotationlib"}  # in the standard library only after 3.8


FILES = sorted((ROOT / "pod").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_pod_is_written_for_python_3_8(path: Path) -> None:
    source = path.read_text()
    module = ast.parse(source, feature_version=(3, 8))
    ast.parse(source, feature_version=(3, 7))
    module.body = [node for node in module.body if not isinstance(node, ast.ClassDef) or node.name != "Spread"]
    # Spread talks to the image's Ray, in a process of its own; nothing else does.
    imported = {alias.name.split(".")[0] for node in ast.walk(module) if isinstance(node, ast.Import)
                for alias in node.names}
    imported |= {str(node.module).split(".")[0] for node in ast.walk(module) if isinstance(node, ast.ImportFrom)}
    assert imported <= (sys.stdlib_module_names - NEWER) | {"pod"}
    newer = {"removeprefix", "removesuffix", "waitstatus_to_exitcode", "pidfd_open", "is_relative_to", "randbytes",
             "file_digest",
             "add_note", "process_group", "pairwise", "bit_count"}
    used = {node.attr for node in ast.walk(module) if isinstance(node, ast.Attribute)}
    assert not used & newer
    assert not [node for node in ast.walk(module)
                if type(node).__name__ in ("Match", "NamedExpr")], "3.7 must be able to read it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_go_one_way(path: Path) -> None:
    """At the top those before it; only entry has the optional ones, each in the function that needs it."""
    module = ast.parse(path.read_text())
    top = {node.module for node in module.body if isinstance(node, ast.ImportFrom) and node.module.startswith("pod")}
    before = transport.PARTS[: transport.PARTS.index(path.stem)] if path.stem in transport.PARTS else ()
    optional = {"shared", "ray_nodes", "ray_cluster"}
    assert top <= {"pod." + part for part in before if part not in optional}
    inner = {name for node in ast.walk(module) if isinstance(node, ast.ImportFrom) and node not in module.body
             and str(node.module).startswith("pod")
             for name in ([str(node.module)] if node.module != "pod" else ["pod." + alias.name for alias in node.names])}
    allowed = {"entry": {"pod." + part for part in optional}, "__main__": {"pod.entry"}}
    assert inner == allowed.get(path.stem, set())


def with_python(place: Path, version: tuple[int, int]) -> dict[str, str]:
    """An image whose python3 is of that version."""
    (place / "bin").mkdir()
    (place / "bin/python3").write_text('#!/bin/sh\nexec %s "$@"\n' % pythons()[version])
    (place / "bin/python3").chmod(0o755)
    return {"PATH": str(place / "bin") + os.pathsep + PATH}


@pytest.mark.parametrize("version", [version for version in pythons() if version[0] == 3],
                         ids=lambda version: "%d.%d" % version)
def test_every_python_of_this_machine(tmp_path: Path, version: tuple[int, int]) -> None:
    env = with_python(tmp_path, version)
    files = {"src/größe.txt": b"x", SCRIPT: b"import sys; sys.exit(9)"}
    whole = plan(files, command='python3 "$AIRLIFT_CODE"/' + SCRIPT, run_root=str(tmp_path / "ws"),
                 config='a: "/nemo_run/x"\n')
    code, out = ran(whole, tmp_path / "scratch", env=env)
    if version < (3, 7):  # it cannot even read the program
        assert (code, out.text) == (failures.PYTHON, "airlift: the python3 of this image is too old\n"
                                                "airlift: rank unknown ended with exit code 85\n")
        return
    if version == (3, 7):
        assert code == failures.PYTHON and failed(code, out, "?") == "python3 is 3.7; 3.8 is the oldest that works"
        return
    assert code == 9, out.text
    assert shape(out.code) == shape_of(tree(files))
    for change, expect in (({"AIRLIFT_POD_0000": None}, failures.POD), ({"TMPDIR": "/dev/null"}, failures.PLACE)):
        code, out = ran(whole, tmp_path / "scratch", env=env | change)
        assert code == expect
        failed(code, out)
    with started(plan(command="sh -c 'echo READY; exec sleep 30'"), tmp_path / "other", env=env) as running:
        running.until(b"READY\n")
        assert running.signal(signal.SIGTERM) == 143 and not running.alive()


@pytest.mark.parametrize("description", [{"nodes": 1}, {"nodes": 1, "run": "t23456"}])
def test_a_description_without_the_rest(tmp_path: Path, description: dict[str, Any]) -> None:
    code, out = ran(plan_for("local", tree(), description), tmp_path)
    assert code == failures.PAYLOAD
    failed(code, out)


@pytest.mark.parametrize("text", ["", "[1]", "3", "null", '"text"', "[" * 100_000])
def test_a_file_that_is_no_manifest(tmp_path: Path, text: str) -> None:
    whole = plan(command="echo RECIPE RAN")
    (tmp_path / "airlift.json").write_text(text)
    (tmp_path / "pod.py").write_bytes(whole.program)
    digest = hashlib.sha256(text.encode()).hexdigest()
    argv = [sys.executable, str(tmp_path / "pod.py"), str(tmp_path / "airlift.json"), digest]
    code, out = ran(whole, tmp_path / "scratch", argv=argv)
    assert code == failures.PAYLOAD
    failed(code, out, "?")


def test_a_file_of_chunks_brings_no_other_variable(tmp_path: Path) -> None:
    whole = plan(command='echo "<$OTHER>"')
    (tmp_path / "chunks.json").write_text(json.dumps(whole.env | {"OTHER": "foreign"}))
    argv = [*whole.argv, "", str(tmp_path / "chunks.json")]
    code, out = ran(whole, tmp_path / "scratch", argv=argv, env=dict.fromkeys(name for name in whole.env if "_TREE_" in name))
    assert code == 0 and "<>" in out.text


def test_pod_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    """-S and -I: no site-packages, no PYTHON* variables."""
    whole = plan()
    code, out = ran(whole, tmp_path, argv=[whole.argv[0], "-I", "-S", *whole.argv[1:]])
    assert code == 0, out.text


def test_an_error_of_our_own_is_said_with_its_traceback(tmp_path: Path) -> None:
    """Its frames name the files and lines of the repository."""
    plant(tmp_path / "lib", {"ctypes.py": "raise RuntimeError('nobody expects this')\n"})
    code, out = ran(plan(command="echo RECIPE RAN"), tmp_path / "scratch", env={"PYTHONPATH": str(tmp_path / "lib")})
    assert code == failures.INTERNAL and "RECIPE RAN" not in out.text
    assert "Traceback" in out.text and "nobody expects this" in out.text
    assert out.text.endswith("airlift: rank 0: the pod program itself failed\n" + ENDED % ("0", 89))
    frames = re.findall(r'File "(pod/\w+\.py)", line (\d+), in (\w+)', out.text)
    assert [(file, name) for file, _, name in frames] == [
        ("pod/entry.py", "main"), ("pod/entry.py", "run"), ("pod/entry.py", "start"), ("pod/process.py", "run"),
        ("pod/process.py", "become_subreaper")]
    calls = ["pod.run(", "start(", "child.run(", "become_subreaper()", "import ctypes"]
    for (file, line, _), words in zip(frames, calls, strict=True):
        assert words in (ROOT / file).read_text().splitlines()[int(line) - 1]


def test_each_failure_has_its_sentences() -> None:
    assert {failures.POD, failures.PAYLOAD, failures.RANK, failures.PLACE, failures.PYTHON, failures.SETUP, failures.TOOL,
            failures.INTERNAL} <= set(failures.FAILURES)
    assert all(80 <= code <= 91 and what and fix and "\n" not in what + fix for code,
               (what, fix) in failures.FAILURES.items())
    assert len({what for what, _ in failures.FAILURES.values()}) == len(failures.FAILURES)


# ---------------------------------------------------------------- each program on the oldest Python

OLDEST = min((version for version in pythons() if version >= (3, 8)), default=sys.version_info[:2])
RAY = r"""
class Done:
    def __init__(self, function): self.function = function
    def options(self, **options): return self
    def remote(self, *words): return self.function(*words)
def init(**options): pass
def put(value): return value
def get(answer, timeout=None): return answer
def remote(function): return Done(function)
def nodes(): return [{"NodeID": "a", "NodeManagerAddress": "10.0.0.1", "Alive": True}]
class get_runtime_context:
    def get_node_id(self): return "a"
"""


def test_a_torchrun_job_carries_no_ray_and_no_shared_unpack() -> None:
    whole = plan(launch="torchrun", nodes=2)
    for word in (b"class SharedTree", b"class RayNode", b"class Spread", b"import ray\n"):
        assert word not in whole.program
        assert word in b"".join(path.read_bytes() for path in FILES)


@pytest.mark.parametrize("version", sorted({OLDEST, sys.version_info[:2]}), ids=str)
@pytest.mark.parametrize("kind", ["torchrun", "shared", "pods", "platform"])
def test_each_program_runs_to_its_end(tmp_path: Path, kind: str, version: tuple[int, int]) -> None:
    """Also on the oldest Python, with a stand-in for Ray."""
    env = with_python(tmp_path, version) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    plant(tmp_path, {"lib/ray/__init__.py": RAY, "lib/ray/util/__init__.py": "",
                     "lib/ray/util/scheduling_strategies.py": "def NodeAffinitySchedulingStrategy(*a, **k): pass\n",
                     "bin/ray": "#!/bin/sh\n", "bin/torchrun": "#!/bin/sh\nexit 5\n"})
    for name in ("ray", "torchrun"):
        (tmp_path / "bin" / name).chmod(0o755)
    run = "k%05d" % (os.getpid() % 100_000)
    changes: dict[str, Any] = {
        "torchrun": {"launch": "torchrun", "nodes": 2, "command": "torchrun", "tool": "torchrun"},
        "shared": {"nodes": 2, "unpack": "shared", "shared": str(tmp_path / "shared"), "keep": 1, "patience": 20},
        "pods": {"launch": "ray", "nodes": 2, "cluster": "pods", "patience": 20},
        "platform": {"launch": "ray", "nodes": 1, "cluster": "platform", "patience": 20}}[kind]
    whole = plan(**{"run": run, "command": "exit 5"} | changes)
    if kind == "platform":
        place = support.base(Path("/tmp"), whole.digest)
        try:
            code, out = ran(whole, tmp_path / "0", env=env | {"PYTHONPATH": str(tmp_path / "lib")},
                            argv=[*whole.argv, "driver"])
        finally:
            shutil.rmtree(place, ignore_errors=True)
        assert code == 5 and "airlift: node 10.0.0.1 has sha256 %s in %s" % (whole.digest, place) in out.text
        return
    with started(whole, tmp_path / "0", env=env | {"NODE_RANK": "0"}) as one, started(
            whole, tmp_path / "1", env=env | {"NODE_RANK": "1"}) as two:
        assert (one.end(), two.end()) == (5, 5), one.text + two.text
    assert ("a Ray cluster of 2 nodes is up" in one.text) == (kind == "pods")


@pytest.mark.parametrize("changes, part", [
    ({"unpack": "shared", "shared": "/s", "keep": 1, "patience": 1}, "pod.shared"),
    ({"launch": "ray", "nodes": 2, "cluster": "pods", "patience": 1}, "ray_nodes"),
])
def test_a_program_that_lacks_a_part_says_which(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    whole = plan(command="echo RECIPE RAN", **changes)
    program = transport.stream("POD", zlib.compress(transport.pod_program({})), 98_304)
    code, out = ran(whole, tmp_path, env=program | {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"})
    assert code == failures.INTERNAL and "RECIPE RAN" not in out.text
    assert re.search("(ModuleNotFoundError: No module named|ImportError: cannot import name) '%s'" % part, out.text)
    assert out.text.endswith("airlift: rank 0: the pod program itself failed\n" + ENDED % ("0", 89))


def test_the_tests_leave_nothing_behind() -> None:
    environs = b""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            environs += path.read_bytes()
    assert not [mark for mark in MARKS if mark.encode() in environs]
