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

import archive
import screen
import state
import transport
from backends import Finding, Status, stop_and_wait
from backends.common import import_nemo, nemo_ahead
from backends.common.checks import finding
from backends.common.outputs import MOST, require_small, unpacked
from backends.common.slurm_batch import as_options, flags, given, require_options, setup_lines
from backends.common.slurm_prepare import resolved_mounts, squashed
from backends.common.slurm_watch import Record, Watch, job_id
from backends.common.ssh import Host, last_lines
from jobs import Description, Job, repository_of
from runs import Run, load_run
from transport import Plan, Refusal

CAN = {"detach", "ray", "chain"}
COPY_S = 600.0  # seconds for a tree to be copied, over a slow line too
# Safe in shells without quotes, in sbatch's patterns (%) and mounts (: ,).
PLAIN = re.compile(r"(~/\w|/)[\w.@+=/-]+", re.ASCII)
PREPARE = """\
command -v sbatch >/dev/null ||
  { echo "there is no sbatch: this is not a login node, or sbatch is not in the PATH of ssh sessions" >&2; exit 1; }
mkdir -p %(base)s %(cache)s && test -w %(base)s && cd %(base)s && pwd
"""


def submit(run: Run, job: Job, plan: Plan, attached: bool) -> None:
    """Prepare on the cluster what the job needs, then sbatch. Raises Refusal with the cluster's reason."""
    settings, host = job.settings, host_of(job.settings)
    wanted = settings["remote_job_dir"].rstrip("/")
    ahead = nemo_ahead()  # while the cluster is asked
    cache = shlex.quote(settings.get("persistent_cache") or "/")
    said = host.output(PREPARE % {"base": wanted, "cache": cache}, "use " + wanted)
    base = said.strip().split("\n")[-1] if wanted.startswith("~") else wanted  # what was written stays as it is
    require_plain(settings | {"remote_job_dir": base})
    description = below(job.description, wanted, base)
    mounts = resolved_mounts(host, settings, base)
    image = squashed(host, settings, str(job.image), base) if job.image else None
    if not image and settings.get("mounts"):
        print("note: there is no container image, so nothing is mounted")
    env, secrets = description["env"], {key: plan.env[key] for key in job.secrets}
    # A variable that is named like a secret is one, unless it leads to a place of the pod.
    secrets |= {key: env[key] for key in env if screen.secret_name(key) and "/nemo_run" not in env[key]}
    name = re.sub(r"[^A-Za-z0-9]+", "-", job.name, flags=re.ASCII).strip("-")[:40] + "-" + job.run_id
    above = "%s/experiments/%s/%s_1" % (base, name, name)
    run.keep(Record(host=dict(host.__dict__), name="airlift." + name, folder=above + "/" + name,
                    secrets=bool(secrets), continuations=settings["continuations"]))
    sent = transport.files(plan, description | {
        "env": {key: env[key] for key in env if key not in secrets}, "secrets": sorted(secrets)})
    ahead.join()
    nemo = import_nemo()
    executor = slurm_executor(job, host, base, image, mounts, above + "/" + name, attached, bool(secrets))
    executor.additional_parameters |= dependency(host, run)
    argv = transport.file_argv(sent, "/nemo_run")
    kept = sent | ({"secrets.json": json.dumps(secrets).encode()} if secrets else {})
    send = partial(sbatch, host, above, name, kept, settings["retries"])
    run.keep(Record(job=nemo.submit_slurm(name, executor, job.run_id, argv, send)))


def below(sent: Description, wanted: str, base: str) -> Description:
    """The description with `base` where Airlift itself has written `wanted`, a folder that may begin with ~."""
    def there(path: str) -> str:
        return base + path[len(wanted):] if (path + "/").startswith(wanted + "/") else path

    return sent | Description(
        run_root=there(sent["run_root"] or "") or None, shared=there(sent.get("shared", "")),
        defaults={name: there(value) for name, value in sent["defaults"].items()})


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
mask=%(mask)s
umask 077
mkdir -p %(above)s && cd %(above)s || exit 1
[ -O . ] || { echo "%(above)s belongs to another user" >&2; exit 1; }
tar -xof - && mkdir %(name)s/code && exec 4<%(name)s_sbatch.sh || exit 1
cd 2>/dev/null || cd /
umask "$mask"
clean %(requeue)s --parsable <&4 && exit
code=$?
rm -rf %(experiment)s
exit $code
"""


def sbatch(host: Host, above: str, name: str, files: dict[str, bytes], retries: int, script: str) -> str:
    """Copy the files into the job's folder and submit the batch script, all in one connection; returns the job's id.
    Raises Refusal with sbatch's reason, and leaves nothing behind then."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        whole = {"%s/%s" % (name, path): data for path, data in files.items()}
        for path, data in (whole | {name + "_sbatch.sh": script.encode()}).items():
            info = tarfile.TarInfo(path)
            info.mode, info.size, info.mtime = 0o600, len(data), int(time.time())
            tar.addfile(info, io.BytesIO(data))
    words = {"above": above, "name": name, "experiment": above.rpartition("/")[0],
             "requeue": "--requeue" if retries else "--no-requeue",  # continuations see to it themselves
             "mask": "$(umask)" if host.name else "%o" % state.UMASK}
    said = host.output(clean(host) + SUBMIT % words, "submit the job", COPY_S, buffer.getvalue()).split()
    if not said:
        raise Refusal("%s: sbatch gave no job id" % host, "see whether its login shell runs commands", 4)
    return said[-1].split(";")[0]  # behind it may stand the name of the cluster


def dependency(host: Host, run: Run) -> dict[str, Any]:
    """The options of a job that waits for that of run.after. Raises Refusal if it would wait for ever."""
    if not run.after:
        return {}
    before = Watch(load_run(run.after))
    if before.host != host:
        raise Refusal("the stage before is on %s, and this one on %s" % (before.host, host), "leave --detach out")
    found = before.status()  # Slurm soon forgets what has ended, and an image may have taken its time
    if found.state in ("failed", "cancelled"):
        raise Refusal("run %s, the stage before, is %s already (%s)" % (run.after, found.state, found.detail),
                      "see python launch.py logs " + run.after, 4)
    return {} if found.state == "done" else {"dependency": "afterok:" + job_id(host, before.run),
                                             "kill-on-invalid-dep": "yes"}


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
    stop = partial(watch.host.output, "scancel " + shlex.quote(job), "cancel the job")
    return stop_and_wait("job " + job, watch.status, stop)


THERE = "cd %s/experiments 2>/dev/null && ls -d */*_1/*/airlift.json || :"
READ = """\
cd %s && [ -O airlift.json ] || { echo "it is another user's" >&2; exit 1; }
date -r airlift.json +%%s
wc -c <airlift.json
cat airlift.json tree.tar.*
"""


def jobs(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """By their folders, which stay; Slurm knows the state of those that have not ended."""
    require_plain(settings)
    host = host_of(settings)
    states = dict(line.partition(" ")[::2] for line in host.output(
        "squeue -h -u \"$(id -un)\" -o '%j %T'", "ask for the jobs").splitlines())
    for name in _folders(host, settings):
        yield name, states.get("airlift." + name, "")


def _folders(host: Host, settings: dict[str, Any]) -> dict[str, str]:
    """name -> folder of each job, on the cluster."""
    base = settings["remote_job_dir"].rstrip("/")
    said = host.output("cd %s && pwd" % base, "use " + base).strip().split("\n")[-1]
    listed = host.output(THERE % base, "list the jobs").split()
    return {line.split("/")[2]: "%s/experiments/%s" % (said, line.rpartition("/")[0]) for line in listed
            if PLAIN.fullmatch("/" + line)}


def adopt(settings: dict[str, Any], name: str) -> archive.Found:
    """From its folder: `name` is the job's, or the run's id that it ends in."""
    require_plain(settings)
    host = host_of(settings)
    folders = _folders(host, settings)
    found = next((each for each in folders if each == name or each.endswith("-" + name)), None)
    if found is None:
        raise Refusal("%s has no job %s in %s" % (host, name, settings["remote_job_dir"]),
                      "python launch.py adopt PROFILE lists those that are there", 4)
    done = host.run(READ % shlex.quote(folders[found]), COPY_S)
    if done.returncode:
        raise Refusal("%s: cannot read %s: %s" % (host, folders[found], last_lines(done.stderr)), "look at it there", 4)
    began, size, data = done.stdout.split(b"\n", 2)
    record = Record(host=dict(host.__dict__), name="airlift." + found, folder=folders[found], secrets=False)
    return archive.from_files(data[:int(size)], data[int(size):], record, float(began))


BRING = """\
cd %(folder)s && list=$(mktemp) || exit 1
find . -type f -path %(pattern)s -print0 >"$list"
bytes=$(xargs -0 -r stat -c %%s <"$list" | awk '{sum += $1} END {print sum + 0}')
echo "$bytes"
[ "$bytes" -gt %(most)d ] || [ ! -s "$list" ] || tar --null -T "$list" -cf -
rm -f "$list"
"""


def bring(run: Run, pattern: str, folder: Path) -> list[str]:
    host, words = Host(**run.record["host"]), {
        "folder": shlex.quote(str(run.outputs)), "pattern": shlex.quote("./" + pattern), "most": MOST}
    done = host.run(BRING % words, COPY_S)
    if done.returncode:
        raise Refusal("%s: cannot read %s: %s" % (host, run.outputs, last_lines(done.stderr)), "look at it there", 4)
    size, _, data = done.stdout.partition(b"\n")
    require_small(int(size), str(run.outputs))
    return unpacked(data, folder) if data else []


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
                      "use a path of letters, digits and . _ - + = @ / that begins with / or ~/")
    if settings["tunnel"] == "ssh" and not settings.get("host"):
        raise Refusal('tunnel is "ssh", but the profile has no host',
                      'set host, or tunnel = "local" on the cluster itself')
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


def notice(job: Job) -> str:
    """The command of `notify` for the end of a job that no launcher follows; `$airlift_status` is its exit code."""
    command = job.settings.get("notify")
    env = {"AIRLIFT_RUN": job.run_id, "AIRLIFT_OUTPUTS": job.description["run_root"] or ""}
    told = " ".join("%s=%s" % (name, shlex.quote(value)) for name, value in env.items())
    return '%s AIRLIFT_STATE="$airlift_state" AIRLIFT_EXIT_CODE="$airlift_status" bash -c %s' % (
        told, shlex.quote(command)) if command else ""


def host_of(settings: dict[str, Any]) -> Host:
    if settings["tunnel"] == "local":
        return Host()
    identity = settings.get("identity")
    return Host(settings["host"], settings.get("user", ""), settings.get("port"),
                str(Path(identity).expanduser()) if identity else None)


def slurm_executor(job: Job, host: Host, base: str, image: str | None, mounts: list[str], folder: str, attached: bool,
                   secrets: bool = False) -> Any:
    """nemo-run's executor. It has no launcher: pod.py starts torchrun, Ray or the script in the task."""
    nemo, settings = import_nemo(), job.settings
    own = settings.get("run_partition" if attached else "batch_partition")
    return nemo.CarriedSlurm(
        account=None, partition=own or settings.get("partition"), nodes=job.nodes, ntasks_per_node=1,
        time=settings["time"], additional_parameters=given(flags(settings, job.gpus_per_node)),
        srun_args=as_options(settings.get("srun") or {}), container_image=image,
        container_mounts=mounts if image else [], job_name_prefix="airlift.", launcher=None,
        setup_lines=setup_lines(settings, folder, secrets, "" if attached else notice(job)),
        job_details=nemo.LogOfEachRank(),
        packager=nemo.Packager(), tunnel=nemo.tunnel(host, base + "/experiments"),
        poll_estimated_start_time=False, airlift_run=job.run_id)
