"""Slurm, by ssh or on the cluster itself: nemo-run writes the batch script, and one connection copies and submits.

One srun starts one pod program on each node, which finds its rank there and unpacks on the node's own disk. A job's
folder on the cluster is <remote_job_dir>/experiments/<name>/<name>_1/<name>, for this user only. It holds what travels
(pod.py, airlift.json, tree.tar.gz), a log for each rank and each start of the job, the batch script's log, and, while
the job may still run, secrets.json. Slurm keeps the batch script, and in it stand the digests of what it starts.

For Ray on several nodes, the tasks form the cluster (pod.py). nemo-run's SlurmRayJob is not used: its batch script
traces every line and prints its environment into logs, needs containers, jq and pmix, loses double quotes, leaves out
what .gitignore names, and lets a job go on after a worker has died.
"""

import io
import json
import re
import shlex
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import transport
from backends import Finding, Status, stop_and_wait
from backends.common import import_nemo, nemo_ahead
from backends.common.checks import finding
from backends.common.slurm_watch import Record, Watch, forget, job_id
from backends.common.ssh import Host
from jobs import AutoMount, Job, repository_of
from runs import Run
from transport import Plan, Refusal

CAN = {"detach", "ray"}
SQUASH_S = 86_400.0  # seconds for an image to be converted: squash_time ends it, but first it may wait in the queue
FETCH_S = 900.0  # seconds for a repository to be cloned
COPY_S = 600.0  # seconds for a tree to be copied, over a slow line too
PLAIN = re.compile(r"/[\w.@+=/-]+", re.ASCII)  # safe in shells without quotes, sbatch's patterns (%) and mounts (: ,)
PREPARE = """\
command -v sbatch >/dev/null ||
  { echo "there is no sbatch: this is not a login node, or sbatch is not in the PATH of ssh sessions" >&2; exit 1; }
mkdir -p %(base)s %(cache)s && test -w %(base)s
"""


def submit(run: Run, job: Job, plan: Plan, attached: bool) -> None:
    """Prepare on the cluster what the job needs, then sbatch. Raises Refusal with the cluster's reason."""
    settings, host = job.settings, host_of(job.settings)
    base = settings["remote_job_dir"].rstrip("/")
    ahead = nemo_ahead()  # while the cluster is asked
    cache = shlex.quote(settings.get("persistent_cache") or base)
    host.output(PREPARE % {"base": base, "cache": cache}, "use " + base)
    mounts = resolved_mounts(host, settings, base)
    image = squashed(host, settings, str(job.image), base) if job.image else None
    if not image and settings.get("mounts"):
        print("note: there is no container image, so nothing is mounted")
    name = re.sub(r"[^A-Za-z0-9]+", "-", job.name, flags=re.ASCII).strip("-")[:40] + "-" + job.run_id
    above = "%s/experiments/%s/%s_1" % (base, name, name)
    run.keep(Record(host=dict(host.__dict__), name="airlift." + name, folder=above + "/" + name,
                    secrets=bool(job.secrets), continuations=settings["continuations"]))
    sent = transport.files(plan, job.description | {"secrets": sorted(job.secrets)})
    secrets = {key: plan.env[key] for key in job.secrets}
    ahead.join()
    nemo = import_nemo()
    executor = slurm_executor(job, host, base, image, mounts, above + "/" + name, attached)
    argv = transport.file_argv(sent, "/nemo_run")
    kept = sent | ({"secrets.json": json.dumps(secrets).encode()} if secrets else {})
    number = nemo.submit_slurm(name, executor, job.run_id, argv, partial(sbatch, host, above, name, kept))
    run.keep(Record(job=number))


# sbatch with the environment that the cluster gives a new login: it hands all it has on to the job, and its SBATCH_
# variables win over what the batch script says. What it prints comes on descriptor 3, what a login prints does not.
CLEAN = r"""
exec 3>&1 >&2
case ${SHELL##*/} in bash | zsh | ksh | dash | sh) ;; *) SHELL=/bin/bash ;; esac
sbatch=$(command -v sbatch) || { echo "there is no sbatch here" >&2; exit 1; }
clean() { %(login)s "$SHELL" -lc 'exec "$0" "$@"' sh -c %(leave)s "$sbatch" "$@"; }
"""
LOGIN = """\
env -i HOME="$HOME" USER="$(id -un)" LOGNAME="$(id -un)" SHELL="$SHELL" ${SLURM_CONF:+"SLURM_CONF=$SLURM_CONF"} \\
  PATH=/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"""
# What a login may have set for launches of its own, and what only Slurm or the pod can know.
LEAVE = r"""
for name in $(env | sed -n 's/^\([A-Za-z_][A-Za-z0-9_]*\)=.*/\1/p'); do
  case $name in
  SLURM_CONF) ;;
  SBATCH_* | SLURM_* | SRUN_* | SALLOC_* | SSH_* | PET_* | TORCHELASTIC_* | AIRLIFT_* | \
  MASTER_ADDR | MASTER_PORT | RANK | LOCAL_RANK | NODE_RANK | GROUP_RANK | WORLD_SIZE | LOCAL_WORLD_SIZE | NNODES | \
  CUDA_VISIBLE_DEVICES | RAY_ADDRESS) unset "$name" ;;
  esac
done
exec "$0" "$@" >&3"""


def clean(host: Host) -> str:
    """The lines that define clean(), which is sbatch with the environment of a new login. An ssh session is one."""
    return CLEAN % {"leave": shlex.quote(LEAVE), "login": "" if host.name else LOGIN}


# The job's folder, with what comes as a tar; then sbatch. Slurm hands the umask on to the job.
SUBMIT = """\
mask=$(umask)
umask 077
mkdir -p %(above)s && cd %(above)s || exit 1
[ -O . ] || { echo "%(above)s belongs to another user" >&2; exit 1; }
tar -xof - && mkdir %(name)s/code && exec 4<%(name)s_sbatch.sh && cd && umask "$mask" || exit 1
clean --requeue --parsable <&4 && exit
code=$?
rm -rf %(experiment)s
exit $code
"""


def sbatch(host: Host, above: str, name: str, files: dict[str, bytes], script: str) -> str:
    """Copy the files into the job's folder and submit the batch script, all in one connection; returns the job's id.
    Raises Refusal with sbatch's reason, and leaves nothing behind then."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        whole = {"%s/%s" % (name, path): data for path, data in files.items()}
        for path, data in (whole | {name + "_sbatch.sh": script.encode()}).items():
            info = tarfile.TarInfo(path)
            info.mode, info.size, info.mtime = 0o600, len(data), int(time.time())
            tar.addfile(info, io.BytesIO(data))
    words = {"above": above, "name": name, "experiment": above.rpartition("/")[0]}
    said = host.output(clean(host) + SUBMIT % words, "submit the job", COPY_S, buffer.getvalue()).split()
    if not said:
        raise Refusal("%s: sbatch gave no job id" % host, "see whether its login shell runs commands", 4)
    return said[-1].split(";")[0]  # behind it may stand the name of the cluster


def follow(run: Run) -> Status:
    """Print the logs until the job ends for good; a job that is requeued is followed into its next start."""
    return Watch(run).to_the_end()


def logs(run: Run) -> None:
    Watch(run).print_all()


def status(run: Run) -> Status:
    return Watch(run).status()


def cancel(run: Run) -> str:
    """scancel; returns when the job has ended, or after a minute."""
    watch = Watch(run)
    job = job_id(watch.host, run)
    return stop_and_wait("job " + job, watch.status, lambda: watch.host.output("scancel " + job, "cancel the job"))


TRY = """\
said=$(clean %s 3>&1 2>&1 >/dev/null)
code=$?
[ $code -ne 0 ] || exec >&3
printf '%%s\n' "$said"
exit $code
"""


def probe(settings: dict[str, Any], job: Job | None) -> Iterator[Finding]:
    """The login node, its Slurm, account and partitions (by sbatch --test-only), pyxis, and the folder of all jobs."""
    found = finding("profile", partial(require_plain, settings))
    if found.state != "ok":  # it is not safe in a shell
        yield found
        return
    host, base = host_of(settings), settings["remote_job_dir"].rstrip("/")
    yield (found := finding("login node", lambda: host.output("hostname", "run a command").strip()))
    if found.state != "ok":
        return
    yield finding("Slurm", lambda: host.output("sbatch --version", "find sbatch").strip())
    gpus = job.gpus_per_node if job else settings.get("gpus_per_node")
    words = flags(settings, gpus) | {"nodes": job.nodes if job else settings.get("nodes", 1), "time": settings["time"],
                                     "test-only": True, "wrap": "true"}

    def accepted(partition: str | None) -> str:
        whole = shlex.join(as_options(words | {"partition": partition}))
        answer = host.output(clean(host) + TRY % whole, "submit to partition %s" % partition)
        return "%s: %s" % (partition or "the default one", answer.strip().splitlines()[-1].split(": ", 1)[-1])

    for partition in dict.fromkeys(settings.get(key) or settings.get("partition") for key in (
            "run_partition", "batch_partition")):
        yield finding("partition", partial(accepted, partition))
    found = finding("sacct", lambda: host.output("sacct -n -X -S now >/dev/null", "use sacct"), "answers")
    yield found if found.state == "ok" else Finding(
        "sacct", "warning", found.said, "without it, the end of a job that Slurm has forgotten is read in its logs")
    image = job.image if job else settings.get("container_image")
    if image or (not job and "container_image" not in settings):
        yield finding("pyxis", lambda: host.output("srun --help | grep -q -e --container-image", "find the option "
                                                   "--container-image of srun, which images need"), "is installed")
    yield finding("job folder", lambda: host.output(COPIED % {"base": base}, "copy to " + base, COPY_S,
                                                    b"airlift").strip())


COPIED = """\
umask 077
mkdir -p %(base)s && new=$(mktemp -d %(base)s/check.XXXXXX) || exit 1
cat >"$new/copy" && [ "$(cat "$new/copy")" = airlift ] && df -Ph %(base)s | awk 'NR==2 {print $4 " free"}'
code=$?
rm -r "$new"
exit $code
"""


def require_plain(settings: dict[str, Any]) -> None:
    """Raises Refusal for a path that is not safe in a shell, and for an incomplete login node."""
    base = settings["remote_job_dir"]
    if not PLAIN.fullmatch(base) or ".." in base.split("/"):
        raise Refusal("remote_job_dir is %r, which nemo-run passes to shells without quotes" % base,
                      "use an absolute path of letters, digits and . _ - + = @ /")
    if settings["tunnel"] == "ssh" and not settings.get("host"):
        raise Refusal('tunnel is "ssh", but the profile has no host', 'set host, or tunnel = "local" on the cluster')
    identity = settings.get("identity")
    if settings["tunnel"] == "ssh" and identity and not Path(identity).expanduser().is_file():
        raise Refusal("there is no key file %s" % identity, "correct identity in the profile, or remove it")


def check(job: Job, plan: Plan) -> None:
    """Raises Refusal for what would fail only on the cluster."""
    settings = job.settings
    require_plain(settings)
    require_options(settings)
    if settings["continuations"] and settings["grace"] < 30:
        raise Refusal("grace is %d" % settings["grace"], "give a recipe 30 seconds or more to save")
    for mount in settings.get("mounts") or []:
        if not isinstance(mount, str):
            raise Refusal("the mount %r is not a string" % mount, 'write "SRC:DST" or "SRC:DST:FLAGS"')
        if repository_of(mount, settings.get("git_mirrors", {})):
            if not job.image and settings.get("auto_mount") != "image":
                raise Refusal("%s needs a container to be mounted into" % mount, "set container_image in the profile")
        elif not re.fullmatch(r"/[^:,\s]*:/[^:,\s]*(:[^:,\s]+)?", mount):
            raise Refusal("the mount %r cannot be parsed" % mount, 'write "SRC:DST" or "SRC:DST:FLAGS", '
                          "with absolute paths on the cluster and in the container")


def host_of(settings: dict[str, Any]) -> Host:
    if settings["tunnel"] == "local":
        return Host()
    identity = settings.get("identity")
    return Host(settings["host"], settings.get("user", ""), settings.get("port"),
                str(Path(identity).expanduser()) if identity else None)


def resolved_mounts(host: Host, settings: dict[str, Any], base: str) -> list[str]:
    """The mounts as srun takes them, with repositories cloned, and with lustre_mount and the folder of all jobs."""
    mounts = []
    for mount in settings.get("mounts") or []:
        repository = repository_of(mount, settings.get("git_mirrors", {}))
        if repository is None:
            mounts.append(mount)
        elif settings.get("auto_mount") != "image":
            mounts.append("%s:%s" % (clone(host, repository, base), repository.target))
    if settings.get("lustre_mount"):
        mounts.append(settings["lustre_mount"])
    mounts += [settings[key] for key in ("sif_dir", "persistent_cache") if settings.get(key)]
    mounts = [mount if ":" in mount else "%s:%s" % (mount, mount) for mount in mounts]
    return list(dict.fromkeys([*mounts, "%s:%s" % (base, base)]))


# Prints the file. A second launch waits for the first; a file under its final name is complete.
SQUASH = """\
set -e
mkdir -p %(base)s/images
file=%(base)s/images/%(key)s.sqsh
exec 9>"$file.lock"
flock 9
if %(fresh)s || [ ! -f "$file" ]; then
  rm -f "$file.new"
  srun -J airlift.squash -N1 -n1 %(options)s enroot import -o "$file.new" %(url)s >&2
  mv "$file.new" "$file"
fi
echo "$file"
"""


def squashed(host: Host, settings: dict[str, Any], image: str, base: str) -> str:
    """The image as srun takes it: as given, or, if it is in a registry and the profile has a squash_partition, a file
    that enroot creates once for each tag or digest. Raises Refusal with enroot's reason."""
    if not settings.get("squash_partition") or image.startswith(("/", "./")) or image.endswith(".sqsh"):
        return image
    scheme, _, plain = image.rpartition("://")
    registry, _, rest = plain.partition("/")
    if scheme in ("", "docker") and "#" not in plain and rest and re.search("[.:]", registry):
        plain = registry + "#" + rest  # enroot's way to separate registry and image
    url = (scheme or "docker") + "://" + plain
    options = as_options({"account": settings.get("account"), "partition": settings["squash_partition"],
                          "time": settings["squash_time"]})
    values = {"base": base, "key": re.sub(r"[^A-Za-z0-9._-]+", "-", url.removeprefix("docker://")),
              "url": shlex.quote(url), "options": shlex.join(options),
              "fresh": "true" if settings.get("fresh_image") else "false"}
    return host.output(SQUASH % values, "convert the image " + image, SQUASH_S).strip().splitlines()[-1]


# Prints the folder of a commit, <remote_job_dir>/auto_mounts/<name>-<digest of the URL>/<commit>. It is fetched under
# another name and renamed, so that it is complete or absent; two launches can use two commits at once.
CLONE = r"""
set -e
export GIT_TERMINAL_PROMPT=0 GIT_SSH_COMMAND="${GIT_SSH_COMMAND:-ssh -o BatchMode=yes -o ConnectTimeout=10}"
command -v git >/dev/null || { echo "there is no git on this host" >&2; exit 1; }
url=%(url)s ref=%(ref)s base=%(base)s
commit=
case $ref in
*[!0-9a-f]*) ;;
*) [ ${#ref} -ne 40 ] || commit=$ref ;;
esac
if [ -z "$commit" ]; then
  refs=$(git ls-remote "$url" "refs/tags/$ref^{}" "refs/tags/$ref" "refs/heads/$ref")
  for name in "refs/tags/$ref^{}" "refs/tags/$ref" "refs/heads/$ref"; do
    commit=$(printf '%%s\n' "$refs" | awk -v name="$name" '$2 == name { print $1; exit }')
    [ -z "$commit" ] || break
  done
  [ -n "$commit" ] || { echo "it has neither a tag nor a branch $ref; name one, or a full commit" >&2; exit 1; }
fi
if [ ! -d "$base/$commit" ]; then
  mkdir -p "$base"
  new=$(mktemp -d "$base/new.XXXXXX")
  trap 'rm -rf "$new"' EXIT
  git init -q "$new"
  git -C "$new" fetch -q --depth 1 "$url" "$commit" 2>/dev/null ||
    git -C "$new" fetch -q "$url" '+refs/heads/*:refs/remotes/origin/*' '+refs/tags/*:refs/tags/*'
  git -C "$new" -c advice.detachedHead=false checkout -q --detach "$commit"
  chmod 755 "$new"
  mv -T "$new" "$base/$commit" 2>/dev/null || [ -d "$base/$commit" ]
fi
printf '%%s\n' "$base/$commit"
"""


def clone(host: Host, mount: AutoMount, base: str) -> str:
    """Clone a ${auto_mount:…} repository on the cluster; returns its folder. Raises Refusal with git's reason."""
    values = {"url": mount.url, "ref": mount.ref, "base": mount.folder(base)}
    script = CLONE % {name: shlex.quote(value) for name, value in values.items()}
    return host.output(script, "get %s of %s" % (mount.ref, mount.url), FETCH_S).strip().splitlines()[-1]


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


def flags(settings: dict[str, Any], gpus: int | str | None) -> dict[str, Any]:
    """The options of sbatch but for nodes, time and partition, by their long names; None and False: not given."""
    more = {name.replace("_", "-"): value for name, value in (settings.get("sbatch") or {}).items()}
    theirs = any(name.startswith(("gpus", "tres")) or (name == "gres" and "gpu" in str(more[name])) for name in more)
    return {"account": settings.get("account"), "mem": settings.get("mem"), "exclusive": settings.get("exclusive"),
            "cpus-per-task": settings.get("cpus_per_task"),
            "gpus-per-node": gpus if isinstance(gpus, int) and gpus and not theirs else None,
            "signal": "B:USR1@%d" % settings["grace"] if settings["continuations"] else None} | {
                name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in more.items()}


def as_options(values: dict[str, Any]) -> list[str]:
    """{"qos": "high", "exclusive": True, "mem": None} -> ["--qos=high", "--exclusive"]."""
    return ["--" + name if value is True else "--%s=%s" % (name, value) for name, value in values.items()
            if value is not None and value is not False]


def slurm_executor(job: Job, host: Host, base: str, image: str | None, mounts: list[str], folder: str, attached: bool
                   ) -> Any:
    """nemo-run's executor. It has no launcher: pod.py starts torchrun, Ray or the script in the task."""
    nemo, settings = import_nemo(), job.settings
    own = settings.get("run_partition" if attached else "batch_partition")
    given = {name: value for name, value in flags(settings, job.gpus_per_node).items()
             if value is not None and value is not False}
    srun = {name.replace("_", "-"): value for name, value in (settings.get("srun") or {}).items()}
    return nemo.CarriedSlurm(
        account=None, partition=own or settings.get("partition"), nodes=job.nodes, ntasks_per_node=1,
        time=settings["time"], additional_parameters=given, srun_args=as_options(srun), container_image=image,
        container_mounts=mounts if image else [], job_name_prefix="airlift.", launcher=None,
        setup_lines=setup_lines(settings, folder, bool(job.secrets)), job_details=nemo.LogOfEachRank(),
        packager=nemo.Packager(), tunnel=nemo.tunnel(host, base + "/experiments"),
        poll_estimated_start_time=False, airlift_run=job.run_id)


def setup_lines(settings: dict[str, Any], folder: str, secrets: bool) -> str:
    """The first lines of the batch script. They end nemo-run's tracing before the user's own lines."""
    values = {"folder": folder, "retries": settings["retries"], "most": settings["continuations"],
              "late": max(1, settings["grace"] - 15), "forget": forget(folder) if secrets else ":"}
    return "\n".join(["{ set +vx; } 2>/dev/null", STARTS % values, *([CONTINUE % values] * bool(values["most"])),
                      settings.get("setup_lines", "")])


# nemo-run always submits with --requeue; Slurm counts the starts, but has no limit for them. `parts` counts those of
# them that were continuations. The secrets go when the batch script ends in any way (Slurm sends it TERM), unless the
# job starts again.
STARTS = """\
airlift_parts=$(cat %(folder)s/parts 2>/dev/null || echo 0)
[ $((${SLURM_RESTART_COUNT:-0} - airlift_parts)) -lt %(retries)d ] || scontrol update JobId="$SLURM_JOB_ID" Requeue=0
airlift_over=
airlift_end() {
  [ -z "$airlift_over" ] || { kill $airlift_over; airlift_again && return; }
  restarts=$(scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | grep -o ' Restarts=[0-9]*')
  [ "${restarts#*=}" != "${SLURM_RESTART_COUNT:-0}" ] || %(forget)s
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


