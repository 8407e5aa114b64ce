"""What a real checkout's configs write to lands on the workspace, and the next launch finds it there."""

import os
from pathlib import Path

from layout import flat_folder, launcher, recipe

COUNT = """
import os, sys, yaml
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
for path in (config["save"], config["output_dir"], os.path.join(os.environ["NEMO_RUN_DIR"], "by-variable")):
    os.makedirs(path, exist_ok=True)
    starts = os.path.join(path, "starts")
    with open(starts, "a") as file:
        file.write("start\\n")
    print(os.path.basename(path), "was started", len(open(starts).readlines()), "times")
print("data from", config["blend"], open(config["blend"]).read())
print("kept for the pod:", config["dataset"], config["prepared"], config["run"]["data"])
"""
YAML = """\
run:
  data: nano3-sft-data:latest
save: /nemo_run/nano3-sft-model
output_dir: ${oc.env:PWD}/../output/sft
blend: ${oc.env:PWD}/src/nemotron/recipes/nano3/sft/config/blend.json
dataset: ${art:data,path}
prepared: ${manifest:/data,train}
"""


def test_outputs_survive_the_pod_and_are_found_by_the_next_launch(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "air lift")
    checkout = tmp_path / "checkout"
    script = recipe(checkout, "nano3/sft", body=COUNT, yaml=YAML, launch="direct", nodes=1)
    (script.parent / "config" / "blend.json").write_text("{}")
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home"), "AIRLIFT_HOME": str(tmp_path / "state")}
    for launch in (1, 2):
        done = launcher(folder, "nano3", "sft", "local", "--repo-root", checkout, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        for place in ("nano3-sft-model", "sft", "by-variable"):
            assert "%s was started %d times" % (place, launch) in done.stdout
        assert "kept for the pod: ${art:data,path} ${manifest:/data,train} nano3-sft-data:latest" in done.stdout
        assert "blend.json {}" in done.stdout
    run_root = folder / "output" / "nano3"
    assert sorted(os.listdir(run_root)) == ["by-variable", "nano3-sft-model", "output", "runs", "work"]
    assert len(os.listdir(run_root / "runs")) == 2
