"""The commands other than launching. Each takes the options of the command line (launch.py), prints, and returns the
exit code."""

import contextlib
import difflib
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import archive
import backends
import configs
import prepare
import profiles
import recipes
import runs
import screen
from jobs import Job
from pod.failures import FAILURES
from prepare import Launch, words_of
from screen import one_line
from transport import Refusal


def list_recipes(options: Namespace) -> int:
    if len(options.words) > 1:
        raise Refusal("unexpected word %r" % options.words[1], "list takes only a family")
    root = recipes.source_tree(options.repo_root, prepare.HERE)
    found, problems = recipes.scan(root)
    wanted = [r for r in found.values() if not options.words or r.family == options.words[0]]
    if not wanted and not problems:
        families = sorted({recipe.family for recipe in found.values()})
        raise Refusal("%s has no recipe%s" % (root, " of family " + options.words[0] if options.words else ""),
                      "did you mean %s?" % recipes.nearest(options.words[0], families) if options.words and families
                      else "name the source tree with --repo-root")
    if options.json:
        print(json.dumps([{"name": r.name, "script": r.script, "launch": r.launch, "nodes": r.nodes,
                           "gpus_per_node": r.gpus_per_node, "image": r.image} for r in wanted], indent=1))
    else:
        for number, recipe in enumerate(wanted):
            if not number or recipe.family != wanted[number - 1].family:
                print(screen.paint(recipe.family, "bold"))
            print(screen.plain("  %-28s %-9s %4s x %-4s %s%s" % (
                recipe.stage, recipe.launch, recipe.nodes, recipe.gpus_per_node, recipe.script,
                "  [%s]" % recipe.image if recipe.image else "")))
    for problem in problems:
        screen.complain(problem.what, problem.fix)
    return 2 if problems else 0


def list_profiles(options: Namespace) -> int:
    if options.words:
        raise Refusal("unexpected word %r" % options.words[0], "profiles takes no words")
    rows = list(profiles.overview())
    if options.json:
        print(json.dumps([{"name": row[0], "executor": row[1], "about": row[2]} for row in rows], indent=1))
    else:
        for row in rows:
            print(screen.plain("%-16s%-10s%s" % row))
        for text in profiles.not_used():
            screen.note(text)
    return 0


def one_launch(name: str, options: Namespace) -> Launch:
    """The dry Launch of a command's words, which name one stage."""
    words = words_of(options.words, options.repo_root)
    if len(words.stages) > 1:
        raise Refusal("%s takes one stage at a time" % name, "name one of " + ", ".join(words.stages))
    return Launch(words, words.stages[0], options, True)


def files(options: Namespace) -> int:
    tree = one_launch("files", options).tree
    sizes = sorted([(entry.path, len(entry.data)) for entry in tree.entries]
                   + [(path, size) for size, path in tree.oversize])
    if options.json:
        print(json.dumps({"files": [{"path": path, "bytes": size} for path, size in sizes],
                          "left_out": [{"path": path, "reason": why} for path, why in tree.left_out]}, indent=1))
        return 0
    for path, size in sizes:
        print("%9d  %s" % (size, screen.plain(path)))
    for path, reason in tree.left_out:
        print("%9s  %s" % ("-", screen.plain("%s (%s)" % (path, reason))))
    return 0


def check(options: Namespace) -> int:
    """Check a profile, or a recipe on it, before a launch. 0 only if a launch can be expected to work."""
    if len(options.words) < 2:
        if not options.words or "=" in options.words[0]:
            raise Refusal("check takes PROFILE, or FAMILY STAGE PROFILE", "python launch.py profiles lists them")
        profile, launch = profiles.load(options.words[0]), None
    else:
        launch = one_launch("check", options)
        profile = launch.profile
    from backends.common import checks
    found = []
    for finding in checks.findings(profile, launch):
        found.append(finding)
        if not options.json:
            said = screen.plain(one_line(finding.said))[:screen.LONGEST]
            print("%s  %-14s  %s" % (screen.state(finding.state, 7), finding.what, said))
            if finding.state != "ok" and finding.fix:
                print(" " * 25 + screen.paint(screen.plain(one_line(finding.fix)), "dim"), flush=True)
    failures = [finding for finding in found if finding.state == "failure"]
    if options.json:
        print(json.dumps([dict(vars(finding), said=screen.hide(finding.said)) for finding in found], indent=1))
    else:
        doubts = ", ".join(dict.fromkeys(finding.what for finding in failures or found if finding.state != "ok"))
        print("a launch cannot be expected to work: " + doubts if failures else
              "a launch may work, but look at: " + doubts if doubts else "a launch can be expected to work")
    return failures[0].code or 2 if failures else 0


def allow(options: Namespace) -> int:
    """Say that an env.toml is the person's own."""
    path = Path(options.words[0]).expanduser().resolve() if options.words else profiles.found_file()
    if path is None or not path.is_file() or len(options.words) > 1:
        raise Refusal("there is no file %s" % path if options.words else "no env.toml is found upwards from here",
                      "name one file, like: python launch.py allow ~/project/env.toml")
    print(screen.plain(profiles.allow(path)))
    return 0


def find_run(options: Namespace) -> runs.Run:
    if len(options.words) != 1:
        raise Refusal("name one run", "python launch.py status lists them")
    return runs.load_run(options.words[0])


NEWEST = 20  # how many runs the table shows


def status(options: Namespace) -> int:
    """One run, or all. The exit code is the worst of those whose state cannot be read."""
    found, problems = ([find_run(options)], list[Refusal]()) if options.words else runs.all_runs()
    rows, worst = list[dict[str, Any]](), 2 if problems else 0
    shown = found if options.json else found[:NEWEST]
    silent: dict[str, Refusal] = {}  # by profile: why its platform cannot be reached, so that it is tried only once
    for run in shown:
        try:
            if run.profile in silent and not run.ended:
                raise silent[run.profile]
            state = backends.status(run)
        except Refusal as refusal:
            if options.words:
                raise
            state, worst = backends.Status("unknown", one_line(refusal.what)), max(worst, refusal.code)
            if refusal.code == 5:
                silent[run.profile] = refusal
        rows.append({"run": run.id, "recipe": run.recipe, "profile": run.profile, "nodes": run.nodes,
                     "state": state.state, "detail": state.detail, "age_s": int(time.time() - run.started),
                     "job_exit_code": state.exit_code, "after": run.after})
    story: list[str] = []
    with contextlib.suppress(Refusal):  # a run of an older version
        if options.words:
            made, config = found[0].made()
            rows[0] |= {"sha256": found[0].sha256, "made": made, "config": config}
            story = list(archive.story(found[0], made))
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(screen.run_table(rows) if rows else "there are no runs yet")
        for line in story:
            print(screen.plain(line))
        if len(found) > len(shown):
            print("%d older runs: python launch.py status --json" % (len(found) - len(shown)))
    for problem in problems:
        screen.complain(problem.what, problem.fix)
    return worst


def chosen(options: Namespace, nodes: int) -> list[int]:
    """The ranks whose logs are shown, by --rank and --all-ranks: rank 0 without them. Raises Refusal."""
    if options.rank is not None and not 0 <= options.rank < nodes:
        raise Refusal("there is no rank %d" % options.rank, "the job has %s" % (
            "only rank 0" if nodes == 1 else "ranks 0 to %d" % (nodes - 1)))
    return list(range(nodes)) if options.all_ranks else [options.rank or 0]


def follow(run: runs.Run, took: tuple[float, float] | None = None) -> int:
    """Follow a job to its end; returns the exit code. `took`: seconds for packing and for submitting, if known."""
    backend = backends.backend(run.executor)
    try:
        status = backend.follow(run)
    except (KeyboardInterrupt, BrokenPipeError):
        if run.executor == "local" and took:  # only pods that this launcher started end with it
            print("\nending the pods: %s" % backend.cancel(run), file=sys.stderr)
            return 1
        print("\nthe job goes on; to follow it again: python launch.py logs -f %s" % run.id, file=sys.stderr)
        return 0
    backends.keep_end(run, status)
    if run.notify and took:
        notify(run, status)
    now, after = time.time(), ""
    if took:
        after = " in " + screen.span(now - run.started + took[0])
        print(screen.times(run, took[0], took[1], now))
    if status.state == "done":
        where = screen.plain("; outputs in " + run.outputs) if run.outputs else ""
        print("%s%s%s" % (screen.state("done"), after, where))
        return 0
    for line in status.why if run.nodes > 1 else ():
        print("-- " + screen.plain(line)[:screen.LONGEST])
    sys.stdout.flush()
    code = status.exit_code
    what = "the job was cancelled" if status.state == "cancelled" else "the job failed" + (
        " with exit code %d" % code if code is not None else ", and its exit code is not known (%s)" % status.detail)
    why = "the pod's log says: %s; %s" % FAILURES[code] if code in FAILURES else "see python launch.py logs " + run.id
    if run.after and not run.running_since and status.state == "cancelled":
        why = "python launch.py status shows how the stages before it ended"
    screen.complain(what + after.replace(" in ", " after "), why)
    return 1


NOTIFY_S = 60  # seconds for the command of `notify`


def notify(run: runs.Run, status: backends.Status) -> None:
    """Run the profile's command for the end of a run. That it fails is said, and nothing else."""
    told = {"AIRLIFT_RUN": run.id, "AIRLIFT_STATE": status.state, "AIRLIFT_OUTPUTS": run.outputs or "",
            "AIRLIFT_EXIT_CODE": "" if status.exit_code is None else str(status.exit_code)}
    sys.stdout.flush()
    try:
        done = subprocess.run(["bash", "-c", str(run.notify)], env=os.environ | told, stdin=subprocess.DEVNULL,
                              timeout=NOTIFY_S)
        why = "it ended with exit code %d" % done.returncode if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        why = "%d seconds were not enough" % NOTIFY_S if isinstance(error, subprocess.TimeoutExpired) else str(error)
    if why:
        screen.note("the command of notify failed: " + why)


def logs(options: Namespace) -> int:
    run = find_run(options)
    run.ranks = chosen(options, run.nodes)
    if options.download:
        return download(run, options.download, run.ranks if options.rank is not None else list(range(run.nodes)))
    if options.follow:
        return follow(run)
    backends.backend(run.executor).logs(run)
    return 0


def download(run: runs.Run, folder: Path, ranks: list[int]) -> int:
    """Write the log of each rank, so far, to <folder>/rank-N.log. The exit code is that of the last that has none."""
    folder.mkdir(parents=True, exist_ok=True)
    backend, code = backends.backend(run.executor), 0
    for run.ranks in ([rank] for rank in ranks):
        path = folder / ("rank-%d.log" % run.ranks[0])
        try:
            with open(path, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
                backend.logs(run)
        except Refusal as refusal:
            path.unlink()
            code = refusal.code
            screen.complain("rank %d: %s" % (run.ranks[0], one_line(refusal.what)), one_line(refusal.fix))
    print(screen.plain("%d logs in %s" % (len(list(folder.glob("rank-*.log"))), folder)))
    return code


def cancel(options: Namespace) -> int:
    return end(find_run(options))


def end(run: runs.Run) -> int:
    """Cancel a run and those that come after it, the last one first, so that none begins meanwhile. The exit code."""
    worst = 0
    for each in reversed(runs.chain(run)):
        try:
            done = backends.backend(each.executor).cancel(each)
            said = "%s, %s on %s: %s" % (each.id, each.recipe, each.profile, done)
            print(screen.plain(said)[:screen.LONGEST], flush=True)
        except Refusal as refusal:
            screen.complain("run %s was not cancelled: %s" % (each.id, one_line(refusal.what)), one_line(refusal.fix))
            worst = max(worst, refusal.code)
    return worst


def fetch(options: Namespace) -> int:
    """Write a run's tree and config to a folder that is new or empty; whole, or not at all."""
    if len(options.words) != 2:
        raise Refusal("fetch takes RUN and DIR", "like: python launch.py fetch abc123 there")
    run, folder = runs.load_run(options.words[0]), Path(options.words[1]).expanduser().absolute()
    if options.outputs:
        return bring(run, options.outputs, folder)
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise Refusal("%s is there, and is no empty folder" % folder, "name a new one")
    tree, (made, config) = archive.tree_of(run), run.made()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name + ".") as place:
        whole = Path(place, "whole")
        (whole / "tree").mkdir(parents=True)
        archive.write_out(tree, whole / "tree")
        (whole / "config.yaml").write_text(configs.with_run(config, made["run"]), encoding="utf-8")
        (whole / "run.json").write_text(json.dumps(vars(run) | {"made": made}, indent=1, default=str), encoding="utf-8")
        (whole / "README.md").write_text(archive.how_to(run, made), encoding="utf-8")
        os.rename(whole, folder)
    print(screen.plain("%s: tree with %d files, sha256 %s, as the pods of run %s printed it; config.yaml; run.json; "
                       "README.md, which says how to launch it" % (folder, len(run.files()), run.sha256, run.id)))
    return 0


def adopt(options: Namespace) -> int:
    """Make the run of a job that is on its platform, from what was sent to it. Nothing of it is executed."""
    if not 1 <= len(options.words) <= 2:
        raise Refusal("adopt takes PROFILE, and NAME of a job there", "python launch.py profiles lists the profiles")
    profile = profiles.load(options.words[0])
    profile.require_set()
    backend = backends.backend(profile.executor)
    if len(options.words) == 1:
        rows = [[screen.said(name), screen.said(state)] for name, state in backend.jobs(profile.settings)]
        print(screen.table([["NAME", "STATE"], *rows]) if rows else "there are no jobs of Airlift's")
        return 0
    run = archive.adopted(backend.adopt(profile.settings, options.words[1]), profile.name, profile.executor)
    print(screen.plain("run %s of %s, %d files, sha256 %s: status, logs, cancel, fetch and again now know it" % (
        run.id, run.recipe, len(run.files()), run.sha256)))
    return 0


def bring(run: runs.Run, pattern: str, folder: Path) -> int:
    """Copy outputs of a run that fit a pattern."""
    way = getattr(backends.backend(run.executor), "bring", None)
    if not run.outputs:
        raise Refusal("run %s keeps no outputs: it has no workspace" % run.id, "set workspace in the profile")
    if way is None:
        raise Refusal("%s has no way to read what lies on its storage" % run.executor,
                      "the outputs are in %s there; a job, or a machine that mounts it, can copy them" % run.outputs)
    found = way(run, pattern, folder)
    for path in found:
        print(screen.plain(str(folder / path)))
    if not found:
        raise Refusal("no file in %s fits %s" % (run.outputs, pattern), "a * also stands for a /")
    return 0


DIFFERENCES = {"changed": "yellow", "only in the run": "red", "only here": "green"}


class Side(NamedTuple):
    """What `diff` compares: a run, or what a launch would carry now."""

    name: str
    digest: str
    prints: dict[str, str]  # runs.fingerprints
    contents: dict[str, bytes] | None  # None where the tree is not kept
    config: str | None
    settings: dict[str, Any] | None


def _side_of(run: runs.Run) -> Side:
    try:
        contents = {entry.path: entry.data for entry in archive.entries(archive.tree_of(run)).entries}
    except Refusal as refusal:
        screen.note(refusal.what)
        contents = None
    try:
        made, config = run.made()
    except Refusal:
        made, config = {"settings": None}, None
    return Side("run " + run.id, run.sha256, run.files(), contents, config, made["settings"])


def _side_here(run: runs.Run, root: Path | None) -> Side:
    origin = run.origin
    if not origin:
        raise Refusal("run %s was adopted, so nothing says where its source lies" % run.id,
                      "compare it with another run, or fetch it")
    family, _, stage = run.recipe.partition("/")
    words = words_of([family, stage, run.profile] + origin["overrides"])
    again = Namespace(config=[origin["config"]] if origin["config"] else None, nodes=None, name=None, args=[],
                      repo_root=root or Path(origin["repo_root"]))
    with profiles.pinned(origin["env_file"]):
        launch = Launch(words, stage, again, True)
    contents = {entry.path: entry.data for entry in launch.tree.entries}
    return Side("here", launch.plan.digest, runs.fingerprints(launch.tree), contents,
                screen.hide(launch.config.shown), archive.clean_settings(launch.job.settings))


def diff(options: Namespace) -> int:
    """Compare the tree, config and settings of a run with what a launch would carry now, or with another run's."""
    if not 1 <= len(options.words) <= 2:
        raise Refusal("diff takes a run, or two", "python launch.py status lists them")
    run, *others = [runs.load_run(word) for word in options.words]
    one, other = _side_of(run), _side_of(others[0]) if others else _side_here(run, options.repo_root)
    kinds = {"changed": [path for path in one.prints if path in other.prints
                         and one.prints[path] != other.prints[path]],
             "only in the run": [path for path in one.prints if path not in other.prints],
             "only here": [path for path in other.prints if path not in one.prints]}
    if options.json:
        found = {kind.replace(" ", "_"): sorted(paths) for kind, paths in kinds.items()}
        print(json.dumps(dict(run=run.id, sha256=run.sha256, sha256_here=other.digest, **found), indent=1))
        return 0
    print("%s carries %d files, sha256 %s; %s are %d, sha256 %s" % (
        one.name, len(one.prints), one.digest[:12], other.name, len(other.prints), other.digest[:12]))
    for kind, paths in kinds.items():
        for path in sorted(paths):
            said = kind.replace("here", "in " + other.name) if others else kind
            print("%s  %s" % (screen.paint("%-15s" % said, DIFFERENCES[kind]), screen.plain(path)))
    if not any(kinds.values()):
        print("the files are the same")
    if not options.stat:
        _print_lines(one, other, sorted(kinds["changed"]))
    return 0


def _print_lines(one: Side, other: Side, changed: list[str]) -> None:
    """The changed lines of the files, of the config, and of the settings."""
    pairs = [(path, one.contents[path], other.contents[path]) for path in changed if one.contents and other.contents]
    if one.config is not None and other.config is not None:
        pairs.append(("the config", one.config.encode(), other.config.encode()))
    if one.settings is not None and other.settings is not None:
        settings = [json.dumps(side.settings, indent=1, sort_keys=True).encode() for side in (one, other)]
        pairs.append(("the settings", settings[0], settings[1]))
    for what, before, after in pairs:
        if before != after and b"\0" in before + after:
            print(screen.plain("%s: not text" % what))
            continue
        old, new = (data.decode("utf-8", "replace").splitlines() for data in (before, after))
        first, second = ("%s, %s" % (what, side.name) for side in (one, other))
        for line in difflib.unified_diff(old, new, first, second, lineterm=""):
            colour = {"+": "green", "-": "red"}.get(line[:1], "")
            print(screen.paint(screen.plain(line), colour) if colour else screen.plain(line))


def beside(job: Job, profile: str) -> list[str]:
    """A note for each other run of the recipe that goes on and writes to the same folder, as its platform says."""
    def goes_on(run: runs.Run) -> bool:
        try:
            return backends.status(run).state not in backends.FINAL
        except Refusal:
            return False

    root = job.description["run_root"]
    here = root, job.name, profile
    others = [run for run in runs.all_runs()[0]
              if root and not run.ended and (run.outputs, run.recipe, run.profile) == here]
    return ["run %s goes on and writes to %s too; --name NAME keeps them apart" % (run.id, root)
            for run in others if goes_on(run)]
