"""How long it takes from the command to an accepted job: Airlift against nemo-run's own path, on the same emulator.

    python benchmarks/submit.py [lepton | dgxcloud] [--rounds 5]        (as root: the emulator's pods are real)

Both ship the recipe nano3/sft and what it imports (all of src/starter is more than nemo-run can carry on Lepton), for
one node, each from a fresh process, as a person would start it. The clock runs from the start of that process until
the platform has accepted the job that trains; "process" is until it has ended. nemo-run's own path is an Experiment
with its LeptonExecutor or DGXCloudExecutor and its GitArchivePackager, run once: it copies the source with helper jobs
(image busybox:1.37.0), and sleeps between two looks at them.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from tests.emulators import LeptonEmulator, RunaiEmulator  # noqa: E402

OURS = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import launch, profiles
profiles.FOLDER = pathlib.Path(sys.argv[2])
sys.exit(launch.main(["nano3", "sft", "emulated", "--repo-root", sys.argv[3], "--nodes", "1", "--detach"]))
"""
THEIRS = {
    "lepton": """
import nemo_run as run
executor = run.LeptonExecutor(
    container_image="python", nemo_run_dir="/shared/nemo", resource_shape="cpu.large", node_group="default-group",
    mounts=[{"path": "/", "mount_path": "/shared", "from": "node-nfs:shared"}], packager=run.GitArchivePackager())
""",
    "dgxcloud": """
import os
import nemo_run as run
executor = run.DGXCloudExecutor(
    base_url=os.environ["RUNAI_BASE_URL"], kube_apiserver_url="", client_id=os.environ["RUNAI_CLIENT_ID"],
    client_secret=os.environ["RUNAI_CLIENT_SECRET"], project_name="team-a", container_image="python",
    pvc_nemo_run_dir="/shared/nemo", packager=run.GitArchivePackager(),
    pvcs=[{"claimName": "workspace", "path": "/shared", "existingPvc": True}])
""",
}
EXPERIMENT = """
script = run.Script(path="src/starter/recipes/nano3/sft/train.py", entrypoint="python")
with run.Experiment("sft", executor=executor, skip_status_at_exit=True, enable_goodbye_message=False) as experiment:
    experiment.add(script, name="sft")
    experiment.run(detach=True)
"""
PROFILES = {
    "lepton": """
executor = "lepton"
node_group = "default-group"
resource_shape = "cpu.large"
container_image = "python"
gpus_per_node = 0
nemo_run_dir = "/shared/airlift"
mounts = [{ path = "/", mount_path = "/shared", from = "node-nfs:shared" }]
""",
    "dgxcloud": """
executor = "dgxcloud"
base_url = "${env:RUNAI_BASE_URL}"
client_id = "${env:RUNAI_CLIENT_ID}"
client_secret = "${env:RUNAI_CLIENT_SECRET}"
project_name = "team-a"
container_image = "python"
gpus_per_node = 0
pvc_nemo_run_dir = "/shared/airlift"
pvcs = [{ claimName = "workspace", path = "/shared", existingPvc = true }]
""",
}


def checkout(place: Path) -> Path:
    """A git repository with the tree that both ship: what the launcher itself finds with scope = "imports"."""
    words = ["files", "nano3", "sft", "local", "run.env.scope=imports", "--repo-root", str(REPO), "--json"]
    said = subprocess.run([sys.executable, REPO / "launch.py", *words], check=True, capture_output=True, text=True)
    for file in json.loads(said.stdout)["files"]:
        (place / file["path"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / file["path"], place / file["path"])
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=b", "-c", "user.email=b@b", "commit", "-qm", "tree"]):
        subprocess.run(["git", *words], cwd=place, check=True)
    return place


def timed(server, argv: list[str], **options) -> tuple[float, float, int]:
    """(seconds to the accepted job, seconds to the end of the process, helper jobs) of one fresh process."""
    before, begin = len(server.everything), time.time()
    done = subprocess.run(argv, capture_output=True, text=True, **options)
    took = time.time() - begin
    if done.returncode:
        sys.exit("it failed:\n" + done.stdout + done.stderr)
    made = server.everything[before:]
    for job in made:
        job.close()
    return made[-1].created - begin, took, len(made) - 1


def measure(kind: str, rounds: int, place: Path) -> None:
    folder = place / "profiles"
    folder.mkdir(parents=True)
    (folder / "emulated.toml").write_text(PROFILES[kind])
    platform = LeptonEmulator if kind == "lepton" else RunaiEmulator
    with platform(place / "platform", grace=0.2, hide=("python", "python3")) as server:  # no training on our cores
        env = dict(os.environ, **server.env(), HOME=str(place), NEMORUN_HOME=str(place / "nemo"),
                   AIRLIFT_HOME=str(place / "airlift"), LEPTON_CACHE_DIR=str(place / "lepton"))
        tree = checkout(place / "tree")
        words = [sys.executable, "-c", OURS, str(REPO), str(folder), str(tree)]
        ours = [timed(server, words, env=env) for _ in range(rounds)]
        accepted, process = (statistics.median(column) for column in list(zip(*ours, strict=True))[:2])
        row = "%-9s %-9s accepted after %7.2f s   process %7.2f s   helper jobs %d"
        print(row % (kind, "Airlift", accepted, process, ours[0][2]), flush=True)
        theirs = timed(server, [sys.executable, "-c", THEIRS[kind] + EXPERIMENT], env=env, cwd=tree)
        print(row % (kind, "nemo-run", *theirs))
        print("%-9s ratio     %.1f" % (kind, theirs[0] / accepted), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("platform", nargs="?", choices=list(PROFILES), help="one of the two (default: both)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for kind in [options.platform] if options.platform else PROFILES:
        with tempfile.TemporaryDirectory(prefix="airlift-benchmark-") as place:
            measure(kind, options.rounds, Path(place))


if __name__ == "__main__":
    main()
