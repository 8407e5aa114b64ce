"""What the batch script of a Slurm job says: sbatch's and srun's options, and the lines before the user's own."""

import re
from typing import Any

from backends.common.slurm_watch import forget
from transport import Refusal

# Options that Airlift sets, and the key or the reason for each.
OWN_OPTIONS = {
    **{name: "use the key " + name.replace("-", "_") for name in (
        "account", "partition", "nodes", "time", "mem", "exclusive", "cpus-per-task", "gpus-per-node",
        "container-image")},
    **dict.fromkeys(("ntasks", "ntasks-per-node", "array"), "each node runs one pod; use nproc_per_node"),
    **dict.fromkeys(("requeue", "no-requeue"), "use the key retries"), "signal": "use the key grace",
    **dict.fromkeys(("export", "export-file", "get-user-env"), "use env_vars or setup_lines"),
    **dict.fromkeys(("dependency", "kill-on-invalid-dep"), "launch the stages together, like data/prep/sft,sft"),
    **dict.fromkeys(("container-mounts", "container-workdir"), "use mounts or workdir"),
    **dict.fromkeys(("job-name", "output", "error", "open-mode", "chdir", "wrap", "wait", "parsable", "test-only",
                     "input", "kill-on-bad-exit", "het-group", "quiet", "help", "version"), "Airlift sets it itself"),
}


def require_options(settings: dict[str, Any]) -> None:
    """Raises Refusal for an option in [sbatch] or [srun] that Airlift sets, or that cannot be written."""
    for table in ("sbatch", "srun"):
        for name, value in (settings.get(table) or {}).items():
            if name.replace("_", "-") in OWN_OPTIONS:
                raise Refusal("%s.%s is set by Airlift" % (table, name), OWN_OPTIONS[name.replace("_", "-")])
            values = value if isinstance(value, list) else [value]
            if not re.fullmatch(r"[a-z][a-z0-9_-]+", name) or not values or any(
                    not isinstance(one, (str, int, float)) or "\n" in str(one) for one in values):
                raise Refusal("%s.%s = %r is no option of %s" % (table, name, value, table),
                              'write its long name without dashes in front, like qos = "high"; true for one alone')


def given(table: dict[str, Any]) -> dict[str, Any]:
    """The options of a table, by their long names, without those that are not given; of a list, its values with commas
    between them."""
    return {name.replace("_", "-"): ",".join(map(str, value)) if isinstance(value, list) else value
            for name, value in table.items() if value is not None and value is not False}


def flags(settings: dict[str, Any], gpus: int | str | None) -> dict[str, Any]:
    """The options of sbatch but for nodes, time and partition, by their long names; None and False: not given."""
    more = given(settings.get("sbatch") or {})
    theirs = any(name.startswith(("gpus", "tres")) or (name == "gres" and "gpu" in str(more[name])) for name in more)
    return {"account": settings.get("account") or None, "mem": settings.get("mem"),
            "exclusive": settings.get("exclusive"), "cpus-per-task": settings.get("cpus_per_task"),
            "gpus-per-node": gpus if isinstance(gpus, int) and gpus and not theirs else None,
            "signal": "B:USR1@%d" % settings["grace"] if settings["continuations"] else None} | more


def as_options(table: dict[str, Any]) -> list[str]:
    """{"qos": "high", "exclusive": True, "mem": None} -> ["--qos=high", "--exclusive"]."""
    return ["--" + name if value is True else "--%s=%s" % (name, value) for name, value in given(table).items()]


def setup_lines(settings: dict[str, Any], folder: str, secrets: bool, notice: str = "") -> str:
    """The first lines of the batch script. They end nemo-run's tracing before the user's own lines. `notice` is run
    when the job has ended for good."""
    values = {"folder": folder, "retries": settings["retries"], "most": settings["continuations"],
              "late": max(1, settings["grace"] - 15), "forget": forget(folder) if secrets else ":",
              "notice": notice or ":"}
    return "\n".join(["{ set +vx; } 2>/dev/null", STARTS % values, *([CONTINUE % values] * bool(values["most"])),
                      settings.get("setup_lines", "")])


# Slurm counts the starts, but has no limit for them: with retries a job is submitted with --requeue, and its last start
# ends that. `parts` counts the starts that were continuations. The secrets go when the batch script ends in any way
# (Slurm sends it TERM), unless the job starts again.
STARTS = """\
airlift_parts=$(cat %(folder)s/parts 2>/dev/null || echo 0)
[ $((${SLURM_RESTART_COUNT:-0} - airlift_parts)) -lt %(retries)d ] || scontrol update JobId="$SLURM_JOB_ID" Requeue=0
airlift_over=
airlift_end() {
  airlift_status=$?
  [ -z "$airlift_over" ] || { kill $airlift_over; airlift_again && return; }
  restarts=$(scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | grep -o ' Restarts=[0-9]*')
  [ "${restarts#*=}" = "${SLURM_RESTART_COUNT:-0}" ] || return
  %(forget)s
  [ $airlift_status -eq 0 ] && airlift_state=done || airlift_state=failed
  %(notice)s
}
trap airlift_end EXIT"""

# Slurm sends USR1 to the batch script a while before the time limit. The recipe then gets TERM, and when it has ended,
# or shortly before the limit, the job goes back into the queue. The pods are told by URG, which means nothing to
# others: Slurm sends a signal to every process of a step, and with that of the pod, TERM would come twice. A function
# stands for srun, since bash heeds a signal only when what it waits for is in the background.
CONTINUE = """\
airlift_again() {
  [ "$airlift_parts" -lt %(most)d ] && [ "$(cat %(folder)s/parts 2>/dev/null || echo 0)" = "$airlift_parts" ] || return
  echo "airlift: part $((airlift_parts + 1)) is over; the job is queued again"
  scontrol update JobId="$SLURM_JOB_ID" Requeue=1 && echo $((airlift_parts + 1)) >%(folder)s/parts &&
    scontrol requeue "$SLURM_JOB_ID"
}
airlift_limit() {
  scancel --signal=URG "$SLURM_JOB_ID"
  { sleep %(late)d; airlift_again; } &
  airlift_over=$!
}
srun() {
  command srun "$@" &
  airlift_step=$!
  trap airlift_limit USR1
  wait $airlift_step
  airlift_code=$?
  while [ $airlift_code -gt 128 ] && kill -0 $airlift_step 2>/dev/null; do wait $airlift_step; airlift_code=$?; done
  trap : USR1
  return $airlift_code
}"""
