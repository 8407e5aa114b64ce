"""What a Slurm job finds on the cluster when it starts: repositories that it mounts, and its image, converted once."""

import re
import shlex
from typing import Any

from backends.common.slurm_batch import as_options
from backends.common.ssh import Host
from jobs import AutoMount, repository_of

SQUASH_S = 86_400.0  # seconds for an image to be converted: squash_time ends it, but first it may wait in the queue
FETCH_S = 900.0  # seconds for a repository to be cloned


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
    options = as_options({"account": settings.get("account") or None, "partition": settings["squash_partition"],
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
