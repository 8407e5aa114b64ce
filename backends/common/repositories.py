"""`${auto_mount:git+URL@REF,TARGET}`: a repository that is cloned on the cluster and mounted into the container.

Each commit has a folder, <remote_job_dir>/auto_mounts/<name>-<digest of the URL>/<commit>, which is complete or absent:
it is fetched under another name and renamed. So two launches can use two commits at once, and a running job keeps the
one that it was started with.
"""

import shlex

from backends.common.ssh import Host
from jobs import AutoMount

FETCH_S = 900.0  # seconds for a clone
# Prints the folder; errors go to standard error.
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
    """Clone the commit on the cluster, unless it is there; returns its folder. Raises Refusal with git's reason."""
    values = {"url": mount.url, "ref": mount.ref, "base": mount.folder(base)}
    script = CLONE % {name: shlex.quote(value) for name, value in values.items()}
    return host.output(script, "get %s of %s" % (mount.ref, mount.url), FETCH_S).strip().splitlines()[-1]
