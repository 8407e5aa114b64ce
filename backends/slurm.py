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
SQUASH_S = 7200.0  # seconds for an image to be converted, in the queue and on a node
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
                    secrets=bool(job.secrets)))
    sent = transport.files(plan, job.description | {"secrets": sorted(job.secrets)})
    secrets = {key: plan.env[key] for key in job.secrets}
    ahead.join()
    nemo = import_nemo()
    executor = slurm_executor(job, host, base, image, mounts, above + "/" + name, attached)
    argv = transport.file_argv(sent, "/nemo_run")
    kept = sent | ({"secrets.json": json.dumps(secrets).encode()} if secrets else {})
    number = nemo.submit_slurm(name, executor, job.run_id, argv, partial(sbatch, host, above, name, kept))
    run.keep(Record(job=number))


# The job's folder, with what comes as a tar; then sbatch, with the environment that the cluster gives a new login:
# sbatch hands all it has on to the job, and its SBATCH_ variables win over what the batch script says.
SUBMIT = """\
exec 3>&1 >&2
mask=$(umask)
umask 077
mkdir -p %(above)s && cd %(above)s || exit 1
[ -O . ] || { echo "%(above)s belongs to another user" >&2; exit 1; }
tar -xof - && mkdir %(name)s/code || exit 1
case ${SHELL##*/} in bash | zsh | ksh | dash | sh) ;; *) SHELL=/bin/bash ;; esac
sbatch=$(command -v sbatch) && exec 4<%(name)s_sbatch.sh && cd && umask "$mask" || exit 1
%(login)s "$SHELL" -lc 'exec "$0" "$@"' sh -c %(leave)s "$sbatch" --requeue --parsable <&4 && exit
code=$?
rm -rf %(experiment)s
exit $code
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
    words = {"above": above, "name": name, "experiment": above.rpartition("/")[0], "leave": shlex.quote(LEAVE),
             "login": "" if host.name else LOGIN}
    said = host.output(SUBMIT % words, "submit the job", COPY_S, buffer.getvalue()).split()
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


TEST_ONLY = """\
sbatch --test-only -A %(account)s -p %(partition)s -N %(nodes)d --time=%(time)s %(more)s --wrap true 2>&1 || exit 1
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
    gpus = (job.gpus_per_node if job else settings.get("gpus_per_node")) or 0
    more = ["--gpus-per-node=%s" % gpus] if isinstance(gpus, int) and gpus else []
    more += ["--exclusive"] if settings.get("exclusive") else []
    more += ["--mem=%s" % settings["mem"]] if settings.get("mem") else []

    def accepted(partition: str) -> str:
        script = TEST_ONLY % {"account": shlex.quote(settings["account"]), "partition": shlex.quote(partition),
                              "nodes": job.nodes if job else settings.get("nodes", 1),
                              "more": " ".join(map(shlex.quote, more)), "time": shlex.quote(settings["time"])}
        answer = host.output(script, "submit to %s as %s" % (partition, settings["account"]))
        return "%s: %s" % (partition, answer.strip().split(": ", 1)[-1])

    for partition in dict.fromkeys(settings.get(key) or settings["partition"] for key in (
            "run_partition", "batch_partition")):
        yield finding("partition", partial(accepted, partition))
    yield finding("sacct", lambda: host.output("sacct -n -X -S now >/dev/null", "use sacct"), "answers")
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
if [ ! -f "$file" ]; then
  rm -f "$file.new"
  srun -J airlift.squash -N1 -n1 -A %(account)s -p %(partition)s -t 60 enroot import -o "$file.new" %(url)s >&2
  mv "$file.new" "$file"
fi
echo "$file"
"""


def squashed(host: Host, settings: dict[str, Any], image: str, base: str) -> str:
    """The image as srun takes it: as given, or, if it is in a registry and the profile has a squash_partition, a file
    that enroot creates once for each tag or digest. Raises Refusal with enroot's reason."""
    if not settings.get("squash_partition") or image.startswith(("/", "./")) or image.endswith(".sqsh"):
        return image
    plain = image.removeprefix("docker://")
    registry, _, rest = plain.partition("/")
    if "#" not in plain and rest and re.search("[.:]", registry):
        plain = registry + "#" + rest  # enroot's way to separate registry and image
    values = {"base": base, "key": re.sub(r"[^A-Za-z0-9._-]+", "-", plain), "url": shlex.quote("docker://" + plain),
              "account": shlex.quote(settings["account"]), "partition": shlex.quote(settings["squash_partition"])}
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


def slurm_executor(job: Job, host: Host, base: str, image: str | None, mounts: list[str], folder: str, attached: bool
                   ) -> Any:
    """nemo-run's executor. It has no launcher: pod.py starts torchrun, Ray or the script in the task."""
    nemo, settings = import_nemo(), job.settings
    own = settings.get("run_partition" if attached else "batch_partition")
    return nemo.CarriedSlurm(
        account=settings["account"], partition=own or settings["partition"], nodes=job.nodes, ntasks_per_node=1,
        gpus_per_node=job.gpus_per_node if isinstance(job.gpus_per_node, int) and job.gpus_per_node else None,
        cpus_per_task=settings.get("cpus_per_task"), mem=settings.get("mem"), time=settings["time"],
        exclusive=settings.get("exclusive") or None, container_image=image,
        container_mounts=mounts if image else [], job_name_prefix="airlift.", launcher=None,
        setup_lines=setup_lines(settings, folder if job.secrets else ""), job_details=nemo.LogOfEachRank(),
        packager=nemo.Packager(), tunnel=nemo.tunnel(host, base + "/experiments"),
        poll_estimated_start_time=False, airlift_run=job.run_id)


def setup_lines(settings: dict[str, Any], secrets: str) -> str:
    """The first lines of the batch script. They end nemo-run's tracing before the user's own lines."""
    lines = ["{ set +vx; } 2>/dev/null", *([FORGET_AT_END % forget(secrets)] if secrets else []),
             LAST_START % settings["retries"], settings.get("setup_lines", "")]
    return "\n".join(lines)


# nemo-run always submits with --requeue; Slurm counts the starts, but has no limit for them.
LAST_START = '[ "${SLURM_RESTART_COUNT:-0}" -lt %d ] || scontrol update JobId="$SLURM_JOB_ID" Requeue=0'

# When the batch script ends in any way (Slurm sends it TERM), unless Slurm has counted one more start for it.
FORGET_AT_END = """\
airlift_forget() {
  restarts=$(scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | grep -o ' Restarts=[0-9]*')
  [ "${restarts#*=}" != "${SLURM_RESTART_COUNT:-0}" ] || %s
}
trap airlift_forget EXIT"""
