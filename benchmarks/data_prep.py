#!/usr/bin/env python3
"""data/prep/rl against the same steps of NVIDIA's super3/data/prep/rl, on one generated file.

    NEMOTRON_ROOT=/path/to/Nemotron python benchmarks/data_prep.py [--mib 512] [--rounds 5] [--workers N]

split   Theirs: the function _create_train_val_splits of their data_prep.py. It reads the shard as text and writes all
        but the last 100 lines, then those; it does not look into a row, hash, or bring anything to the disk.
shard   Theirs: process_jsonl_shard_core, which comes before it in their pipeline: each row from JSON and back to JSON.
        No transform is given to it, so that it has less to do than in their pipeline. It needs fsspec and pydantic.
ours    The recipe as the launcher starts it, timed from the start of its process to its end: start-up and imports,
        JSON check of each row, holdout by hash, both files brought to the disk, SHA-256 and manifest.

Theirs are called in processes of their own and timed without start-up and imports. What their modules import and these
two functions do not use (cosmos_xenna, nemo_runspec, pyarrow, the rest of nemotron) is replaced by empty stand-ins, and
xxhash by one that does nothing, so that no package of theirs is needed.

The rounds alternate, each into a fresh folder, so that all meet the same machine. cpu is user and system time of all
processes: on a machine that is busy otherwise it says more than the clock. The peak of theirs is its process'; of ours,
the sum over all its processes, looked at every 20 ms, with memory that they share counted in each of them.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
RECIPE = HERE / "src/starter/recipes/super3/data_prep_rl/prep.py"

RUN_THEIRS = """
import importlib.abc, importlib.machinery, importlib.util, json, resource, sys, time, types
from pathlib import Path

class StandIn(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda *a: None, "update": lambda *a: None, "hexdigest": lambda *a: ""})

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cosmos_xenna", "nemotron", "nemo_runspec", "pyarrow", "xxhash"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return StandIn(spec.name)
    def exec_module(self, module):
        pass

what, root, shard, folder = sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
folder.mkdir()
sys.meta_path.insert(0, Finder())
if what == "split":
    path = root / "src/nemotron/recipes/super3/stage2_rl/data_prep.py"
    spec = importlib.util.spec_from_file_location("their_data_prep", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["their_data_prep"] = module
    spec.loader.exec_module(module)
    def work():
        module._create_train_val_splits({"train": shard}, folder, val_holdout=100)
else:
    sys.meta_path.append(sys.meta_path.pop(0))  # first what is there
    for name in ("nemotron", "nemotron.data_prep", *("nemotron.data_prep." + n for n in ("core", "utils", "formats"))):
        package = sys.modules[name] = types.ModuleType(name)  # without what its __init__ imports
        package.__path__ = [str(root / "src" / name.replace(".", "/"))]
    from fsspec.implementations.local import LocalFileSystem
    from nemotron.data_prep.config import FileInfo
    from nemotron.data_prep.core.jsonl_shard_core import process_jsonl_shard_core
    size = Path(shard).stat().st_size
    def work():
        result = process_jsonl_shard_core(
            shard_index=0, files=[FileInfo(path=shard, local_path=shard, size=size)], output_dir=str(folder / "o"),
            receipts_dir=str(folder / "r"), output_fs=LocalFileSystem(), text_field="text", transform=None,
            compression="none", max_rows=None, skip_receipt=True)
        assert result["stats"]["num_records"], result
before = resource.getrusage(resource.RUSAGE_SELF)
began = time.perf_counter()
work()
seconds = time.perf_counter() - began
after = resource.getrusage(resource.RUSAGE_SELF)
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps([seconds, cpu, after.ru_maxrss * 1024]))
"""


def generate(path: Path, size: int) -> int:
    """Rows like those of the blend: a question of a few hundred words, twice, with escapes, and what goes with it."""
    dice = random.Random(1)
    words = ["let", "$x$", "be", "a", "positive", "integer", "such", "that", "\\frac{1}{2}", "of", "the", "sum", "is",
             "prime", ";", "find", "where", "modulo", "theorem"]
    written = rows = 0
    with path.open("w") as file:
        while written < size:
            text = " ".join(dice.choices(words, k=dice.randint(60, 300)))
            text = text[:80] + "\n\n" + text[80:]
            prompt = {"input": [{"role": "user", "content": "Solve it.\n\n" + text + "\n"}]}
            row = {"id": rows, "dataset": "math", "question": text, "expected_answer": str(dice.randint(0, 999)),
                   "responses_create_params": prompt, "pass_rate": dice.random(), "agent_ref": {"name": "math"}}
            written += file.write(json.dumps(row) + "\n")
            rows += 1
    return rows


def theirs(what: str, root: Path, shard: Path, folder: Path) -> tuple[float, float, int]:
    command = [sys.executable, "-c", RUN_THEIRS, what, str(root), str(shard), str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("their %s step ended with exit code %d" % (what, done.returncode))
    seconds, cpu, peak = json.loads(done.stdout)
    return seconds, cpu, peak


def ours(shard: Path, folder: Path, workers: int | None) -> tuple[float, float, int]:
    folder.mkdir()
    (folder / "blend.json").write_text(json.dumps({"datasets": [{"name": "math", "path": str(shard)}]}))
    (folder / "config.yaml").write_text("output: %s/out\nblend: %s/blend.json\nholdout: 100\n" % (folder, folder))
    command = [sys.executable, str(RECIPE), "--config", str(folder / "config.yaml")]
    command += ["workers=%d" % workers] if workers else []
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE / "src")}
    before = os.times()
    began = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_rss(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    after = os.times()
    if process.returncode:
        raise SystemExit("our data prep ended with exit code %d" % process.returncode)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, cpu, peak


def tree_rss(pid: int) -> int:
    """Resident bytes of a process and its children."""
    total = 0
    try:
        total = int(Path("/proc/%d/statm" % pid).read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        for child in Path("/proc/%d/task/%d/children" % (pid, pid)).read_text().split():
            total += tree_rss(int(child))
    except (OSError, IndexError):
        pass  # it has just ended
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, help="processes of ours; by default the cores of this machine")
    options = parser.parse_args()
    root = Path(os.environ.get("NEMOTRON_ROOT", ""))
    if not (root / "src/nemotron/recipes/super3/stage2_rl/data_prep.py").is_file():
        raise SystemExit("set NEMOTRON_ROOT to a checkout of NVIDIA's Nemotron; it is %s" % (root or "not set"))
    with tempfile.TemporaryDirectory() as name:
        measure(root, Path(name), options)


def measure(root: Path, place: Path, options: argparse.Namespace) -> None:
    shard = place / "shard.jsonl"
    rows = generate(shard, options.mib << 20)
    mib = shard.stat().st_size / 2**20
    print("%d rows, %.0f MiB, %d cores, load %.1f" % (rows, mib, len(os.sched_getaffinity(0)), os.getloadavg()[0]))
    runs: dict[str, Any] = {
        "split": lambda folder: theirs("split", root, shard, folder),
        "shard": lambda folder: theirs("shard", root, shard, folder),
        "ours": lambda folder: ours(shard, folder, options.workers),
    }
    found: dict[str, list[tuple[float, float, int]]] = {who: [] for who in runs}
    for number in range(options.rounds):
        for who, run in runs.items():
            found[who].append(run(place / "run"))
            shutil.rmtree(place / "run")
            seconds, cpu, peak = found[who][-1]
            print("round %d  %-5s  %5.2f s  %5.2f s cpu  %5.0f MiB" % (number + 1, who, seconds, cpu, peak / 2**20),
                  flush=True)
    middle = {who: [statistics.median(run[i] for run in each) for i in (0, 1)] for who, each in found.items()}
    peak = {who: max(run[2] for run in each) / 2**20 for who, each in found.items()}
    for who, (seconds, cpu) in middle.items():
        print("%-5s  median %.2f s (%.0f MiB/s), %.2f s cpu, peak %.0f MiB" % (
            who, seconds, mib / seconds, cpu, peak[who]))
    for label, steps in (("their split alone", ["split"]), ("their shard and split", ["shard", "split"])):
        ratios = [sum(middle[step][i] for step in steps) / middle["ours"][i] for i in (0, 1)]
        print("%-22s %.1f times our time, %.1f times our cpu" % (label + ":", *ratios))
    print("memory: ours is 1/%.0f of their split's" % (peak["split"] / peak["ours"]))


if __name__ == "__main__":
    main()
