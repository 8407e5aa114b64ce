#!/usr/bin/env python3
"""Airlift: python launch.py FAMILY STAGE [PROFILE] [-c CONFIG] [KEY=VALUE ...] [options] [-- ARGS...]

Packs the local source tree and starts one of its recipes on the profile's executor; --help tells all.
This file is the command line: words -> profile, recipe, config -> Job -> Plan -> backend. It is kept readable by any
Python, old ones included (no annotations, no f-strings), so that an old Python gets a plain word and no SyntaxError.
"""
from __future__ import print_function

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
OWN_PYTHON = os.path.join(HERE, ".venv", "bin", "python")

# `make setup` puts a virtual environment beside this file; outside any other one, that is the Python that runs us.
if __name__ == "__main__" and sys.prefix == getattr(sys, "base_prefix", sys.prefix) and os.path.exists(OWN_PYTHON):
    os.execv(OWN_PYTHON, [OWN_PYTHON] + sys.argv)
if sys.version_info < (3, 11):
    sys.stderr.write("airlift: needs Python 3.11 or later, and this is %d.%d\n" % sys.version_info[:2])
    sys.stderr.write("start it with a newer one, like: python3.11 launch.py ..., or run `make setup`\n")
    sys.exit(2)

import argparse  # noqa: E402
import difflib  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import shlex  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

import backends  # noqa: E402
import profiles  # noqa: E402
import recipes  # noqa: E402
import transport  # noqa: E402
from backends import checks, closure, screen  # noqa: E402
from pod.failures import FAILURES  # noqa: E402
from transport import Refusal  # noqa: E402

USAGE = """\
python launch.py FAMILY STAGE [PROFILE] [-c CONFIG] [KEY=VALUE ...] [--nodes N] [--repo-root DIR]
                 [--dry-run] [--json] [--detach] [--rank N | --all-ranks] [-- ARGS...]
                                                                  launch a recipe (PROFILE: local)
python launch.py list [FAMILY]                                    the recipes of the source tree
python launch.py profiles                                         where they can run
python launch.py files FAMILY STAGE [PROFILE]                     what would ship, and what would not
python launch.py check PROFILE | check FAMILY STAGE PROFILE       what can be known before a launch
python launch.py status [RUN]                                     the runs that were launched from here
python launch.py logs RUN [-f] [--rank N | --all-ranks]           what there is; with -f, on to the end
python launch.py cancel RUN | diff RUN                            end it; how its tree differs from the one here

STAGE is the rest of the recipe's name, like sft or data/prep/rl; stages with commas between, like
data/prep/sft,sft, run in order, each as its own job. KEY=VALUE overrides the recipe's config; what
follows -- goes to its script. Exit codes: 0 done, 1 the job failed, 2 bad usage, profile, recipe or config, 3 the
payload does not fit, 4 the platform refused, 5 the platform could not be reached.
"""


FLAGS = ("--dry-run", "--json", "--detach", "--follow", "--all-ranks", "--debug")
VALUED = ("--config", "--nodes", "--repo-root", "--rank")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = re.match(r"unrecognized arguments: ([^ =]+)", message)
        number = re.match(r"argument (--nodes|--rank): invalid int value: (.*)", message)
        lacks = re.match(r"argument (?:-c/)?(--[a-z-]+): expected one argument", message)
        if unknown:
            close = difflib.get_close_matches(unknown.group(1), FLAGS + VALUED, 1, 0.61)
            raise Refusal("there is no option %s" % unknown.group(1), "did you mean %s?" % close[0] if close else
                          "overrides are KEY=VALUE, without dashes; --help shows the options")
        if number:
            least = 1 if number.group(1) == "--nodes" else 0
            raise Refusal("%s is %s" % number.groups(), "it must be a whole number, %d or more" % least)
        if lacks:
            raise Refusal("%s stands without a value" % lacks.group(1), "write it behind, like: --nodes 2, -c default")
        raise Refusal(message, "see python launch.py --help")

    def format_help(self):
        return USAGE


def parse(argv):
    """The command's name and its options. Raises Refusal for words that do not fit."""
    script_args = argv[argv.index("--") + 1:] if "--" in argv else []
    words = argv[: argv.index("--")] if "--" in argv else argv
    parser = Parser(prog="launch.py", allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-c", "--config")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--repo-root", type=Path)
    for flag in FLAGS:
        parser.add_argument(*(["-f"] * (flag == "--follow") + [flag]), action="store_true")
    options = parser.parse_intermixed_args(words)
    if not options.words:
        raise Refusal("no recipe was named", "python launch.py list shows them; --help shows the rest")
    name = options.words[0] if options.words[0] in COMMANDS else "launch"
    options.words = options.words[0 if name == "launch" else 1:]
    options.args = script_args
    for option in ("config", "nodes", "repo_root", "dry_run", "json", "detach", "follow", "rank", "all_ranks", "args"):
        if getattr(options, option) not in (None, False, []) and option not in TAKES[name]:
            flag = option.replace("_", "-").replace("args", "")
            raise Refusal("%s does not take --%s" % (name, flag), "leave it out")
    if options.nodes is not None and options.nodes < 1:
        raise Refusal("--nodes is %d" % options.nodes, "a job has one node or more")
    if options.rank is not None and options.all_ranks:
        raise Refusal("--rank and --all-ranks exclude each other", "leave one out")
    return name, options


def utf8(word):
    """A word of the command line, whatever the locale. Raises Refusal for bytes that are not UTF-8."""
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        pass
    raise Refusal("the word %s is not UTF-8" % ascii(word), "write it in UTF-8")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    code = 0
    try:
        name, options = parse([utf8(word) for word in argv])
        code = COMMANDS[name](options)
        sys.stdout.flush()
    except BrokenPipeError:  # `launch.py list | head`
        pass
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in argv[: argv.index("--") if "--" in argv else None]:
            traceback.print_exc()
        what, fix, code = wrong(error)
        screen.complain(one_line(what), one_line(fix))
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads, or the disk is full; Python would try again, and say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def leave(code):
    """End the process at once: what the SDKs do at exit takes a second, and nothing of it is needed."""
    if "backends.hosts" in sys.modules:
        sys.modules["backends.hosts"].close()
    sys.stderr.flush()
    os._exit(code)


def wrong(error):
    """What to say of an error, and the exit code. Every error is two lines; a traceback comes only with --debug."""
    if isinstance(error, Refusal):
        return error.what, error.fix, error.code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "python launch.py status tells what was started", 130
    if isinstance(error, OSError):
        name = "%s: " % error.filename if error.filename else ""
        return name + (error.strerror or str(error)), "look whether it is there, yours, and has space", 2
    return "a bug: %r" % error, "please report it with what --debug shows", 2


def one_line(text):
    return " ".join(text.split())


# ---------------------------------------------------------------- launch


class Ahead(object):
    """Collects and packs the tree that the profile asks for while the config is compiled, which takes as long: lzma
    lets Python work beside it. What the config then changes (the script, what to leave out) is done again."""

    def __init__(self, root, recipe, profile):
        self.root, self.wanted, self.found = root, self.wishes(recipe, profile.keys | profile.stage, ""), None
        self.executor = profile.executor
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    @staticmethod
    def wishes(recipe, settings, text):
        return (recipe.script, tuple(settings.get("exclude", ())), settings.get("scope", "family"),
                settings.get("compression", ""), [path for path in recipes.named_sources(text)
                                                  if transport.family_of(path) != transport.family_of(recipe.script)])

    def run(self):
        script, exclude, scope, compression, _ = self.wanted
        if scope == "family":
            try:
                tree = transport.collect(self.root, script, exclude)
                self.found = tree, transport.packed(tree, transport.method_for(self.executor, compression))
            except Exception:  # take() meets it again, and tells
                pass

    def take(self, recipe, settings, config):
        """(tree, the same packed or None), as recipe and settings are now."""
        wanted = script, exclude, scope, _, also = self.wishes(recipe, settings, config.text)
        if self.found and wanted == self.wanted:
            return self.found
        if scope == "family":
            return transport.collect(self.root, script, exclude, tuple(also)), None
        return closure.collect(self.root, script, exclude, (recipe.config_dir, config.path), config.text), None


class Launch(object):
    """One launch, resolved: profile, recipe, config, job, tree and plan. Nothing has been asked of a platform."""

    def __init__(self, options, dry, family, stage, name, overrides, several=False):
        begun = time.time()
        self.profile = profiles.load(name, stage)
        screen.conceal(*(self.profile.keys.get(key) for key in profiles.SECRET_KEYS))
        if not dry:
            self.profile.require_set()
        root = options.repo_root or self.profile.keys.get("repo_root") or HERE
        self.root = Path(root).resolve()
        recipe = recipes.find(self.root, family + "/" + stage)
        self.given = overrides = mine(overrides, recipe, options.config) if several else overrides
        ahead = Ahead(self.root, recipe, self.profile)
        try:
            notes = list(self.profile.notes)
            self.config = recipes.compile_config(
                recipe, options.config, overrides,
                lambda recipe, yaml, forced: backends.settle(recipe, self.profile, options.nodes, yaml, forced, notes,
                                                             dry),
                self.wandb(dry), profiles.shared("artifacts", dry))
            self.recipe = self.config.recipe
            self.job = self.make_job(options.args, notes)
            sent = backends.secret_values(self.job, dry)
            screen.conceal(*sent.values())
            transport.pod_program(self.job.description)  # its parts are made here, beside the packing, and kept
        finally:
            ahead.thread.join()  # a local launch forks: no thread may hold a lock then
        settings = self.job.settings
        self.tree, ready = ahead.take(self.recipe, settings, self.config)
        self.plan = transport.plan_for(
            self.profile.executor, self.tree, self.job.description, compression=settings.get("compression", ""),
            chunk_bytes=settings.get("chunk_bytes", 0), env=sent, ready=ready,
            limits=transport.limits_for(self.profile.executor, self.job.description,
                                        settings.get("dgxcloud_max_args_chars", 0)))
        # What `diff` needs to collect the tree again; other overrides may hold what no file should.
        named = recipes.is_path(options.config or "")
        self.again = {"repo_root": str(self.root), "env_file": str(profiles.env_file() or os.devnull),
                      "config": str(self.config.path.resolve()) if named else options.config, "overrides": [
            word for word in overrides if word.startswith(("run.env.exclude", "run.env.scope"))]}
        self.said = []  # type: list[str]  # besides the job's own notes
        if dry:
            self.look(not options.detach)
        self.took = time.time() - begun

    @staticmethod
    def wandb(dry):
        found = profiles.shared("wandb", dry)
        screen.conceal(str(found.get("api_key") or ""))
        return found

    def make_job(self, args, notes):
        recipe, profile = self.recipe, self.profile
        settings = self.config.run["env"]
        root = backends.run_root(settings, recipe.family)
        kept = backends.not_kept(settings, profile.executor)
        notes += [kept] if kept else []
        command, tool, said = recipes.command(recipe, settings, args, backends.is_cloud(profile.executor))
        secrets, about = backends.check_secrets(settings.get("secrets", {}), profile.executor, settings["env_vars"])
        repositories, cloned = backends.clones(settings, profile.executor)
        run, lepton = backends.new_run_id(), profile.executor == "lepton"
        several = settings["nodes"] > 1 or (lepton and settings.get("existing_ray_cluster"))
        cluster = "" if recipe.launch != "ray" or not several else "platform" if lepton else "pods"
        description = {
            "run": run, "recipe": recipe.name, "script": recipe.script, "launch": recipe.launch,
            "nodes": settings["nodes"], "run_root": root, "config": self.config.text,
            "env": backends.environment(settings, self.config.run, recipe.name, profile.executor),
            "setup": backends.setup_commands(settings), "command": command, "tool": tool,
            "workdir": settings.get("workdir"), "clones": repositories,
            "folders": list(backends.caches(settings).values()), "retries": settings.get("retries", 0),
            "patience": settings["rendezvous_timeout"], "cluster": cluster,
        }
        description.update(backends.unpacking(settings))
        return backends.Job(
            run, recipe.name, profile.executor, settings["nodes"], settings["gpus_per_node"], settings["nproc"],
            settings.get("container_image"), settings, description, secrets,
            tuple(notes + said + about + cloned + list(self.config.notes)))

    def notes(self):
        sent = ["the config holds what looks like a credential, and is sent as it is"]
        return list(self.job.notes) + self.said + sent * transport.looks_secret(self.config.text.encode()) + (
            left_out_notes(self.tree))

    def check(self, attached):
        """Raises Refusal for what would be refused without asking the platform."""
        backends.require(self.job, attached)
        backends.backend(self.job.executor).check(self.job, self.plan)

    def look(self, attached):
        """For a dry run: say what a launch would not do. A template that is not filled in yet has nothing to check."""
        try:
            if not self.profile.unset:
                self.check(attached)
        except Refusal as refusal:
            self.said.append("a launch would be refused: %s; %s" % (one_line(refusal.what), one_line(refusal.fix)))


def split_words(words):
    """FAMILY STAGE[,STAGE...] [PROFILE] and the KEY=VALUE overrides among the words."""
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    if len(names) < 2:
        raise Refusal("a launch needs FAMILY and STAGE", "like: python launch.py nano3 sft local")
    if len(names) > 3:
        raise Refusal("%r is one word too many" % names[3],
                      "overrides are KEY=VALUE; what follows -- goes to the script")
    stages = [stage.strip("/") for stage in names[1].split(",")]
    return names[0], stages, names[2] if len(names) > 2 else "local", overrides


def mine(overrides, recipe, config):
    """Of the overrides of several stages, those whose first word this one's config has; run is for all."""
    known = recipes.known_keys(recipe, config) | {"run"}
    return [word for word in overrides if re.split(r"[.=\[]", word)[0] in known]


def left_out_notes(tree):
    """One line for each kind of thing that stays here; credentials are named."""
    kinds = {}  # type: dict[str, list[str]]
    for path, reason in tree.left_out:
        kinds.setdefault(reason, []).append(path)
    notes = []
    for reason, paths in sorted(kinds.items()):
        if reason == "credential":
            notes.append("left out, as they look like credentials: " + ", ".join(paths))
        elif reason not in ("documentation", "another family"):
            notes.append("left out, %s: %d, like %s" % (reason, len(paths), paths[0]))
    return notes


def launch(options):
    """One stage, or several with commas between: each its own job, all planned before the first is submitted."""
    dry = options.dry_run or options.json
    family, stages, name, overrides = split_words(options.words)
    plans = [Launch(options, dry, family, stage, name, overrides, len(stages) > 1) for stage in stages]
    unknown = [word for word in overrides if not any(word in plan.given for plan in plans)]
    if unknown:
        raise Refusal("the config of no stage has %s" % unknown[0].split("=")[0],
                      "with several stages an override goes to those whose config has its first word")
    if options.json:
        shown = [screen.as_json(plan) for plan in plans]
        print(json.dumps(shown[0] if len(shown) == 1 else {"stages": shown}, indent=1))
        return 0 if all(plan.plan.fits for plan in plans) else 3
    for plan in plans:
        if options.dry_run:
            screen.show(plan)
        plan.plan.require_fit()
        if not options.dry_run:
            chosen(options, plan.job.nodes)
            plan.check(not options.detach)
    return 0 if options.dry_run else run_stages(plans, stages, options)


def chosen(options, nodes):
    """The ranks whose logs are to be shown: rank 0, unless others are asked for. Raises Refusal."""
    if options.rank is not None and not 0 <= options.rank < nodes:
        raise Refusal("there is no rank %d" % options.rank, "the job has %s" % (
            "only rank 0" if nodes == 1 else "ranks 0 to %d" % (nodes - 1)))
    return list(range(nodes)) if options.all_ranks else [options.rank or 0]


def run_stages(plans, stages, options):
    if options.detach and len(plans) > 1:
        raise Refusal("a pipeline of stages needs a launcher that stays to start the next one",
                      "leave --detach out, or launch the stages one by one")
    for number, plan in enumerate(plans):
        left = stages[number:]
        try:
            run = submit(plan, options)
            code = 0 if options.detach else follow(run, (plan.took, run.record["submitting"]))
            if not code:
                left = stages[number + 1:]
            if run.ended and run.ended[0] == "done":
                left = []
                continue
            return code
        finally:
            if len(plans) > 1 and left:
                print("go on from here with: %s" % screen.hide(again(options, left)))
    return 0


def again(options, stages):
    """The command line with these stages."""
    names = [word for word in options.words if "=" not in word]
    words = [names[0], ",".join(stages)] + names[2:] + [word for word in options.words if "=" in word]
    for option in ("config", "nodes", "repo_root", "rank"):
        if getattr(options, option) is not None:
            words += ["--" + option.replace("_", "-"), str(getattr(options, option))]
    words += ["--all-ranks"] * options.all_ranks + ["--debug"] * options.debug + ["--"] * bool(options.args)
    return "python launch.py " + " ".join(map(shlex.quote, words + options.args))


def submit(plan, options):
    """Start the job; gives its run."""
    job, backend, begun = plan.job, backends.backend(plan.job.executor), time.time()
    print("%s on %s: %s, %d files, %s, sha256 %s, run %s" % (
        job.name, plan.profile.name, screen.shape(job), plan.plan.files, transport.human(len(plan.plan.tar)),
        plan.plan.digest[:12], job.run))
    for note in plan.notes():
        screen.note(note)
    sys.stdout.flush()
    run = backends.Run(job.run, job.name, plan.profile.name, job.executor, job.nodes, plan.plan.digest, begun)
    every = job.executor == "local" and options.rank is None  # what happens on this machine is seen whole
    run.record["ranks"] = list(range(job.nodes)) if every else chosen(options, job.nodes)
    run.record.update(outputs=job.description["run_root"], again=plan.again, retries=job.description["retries"])
    run.carries = backends.fingerprints(plan.tree)
    try:
        backend.submit(run, job, plan.plan, not options.detach)
    except Refusal as refusal:
        if refusal.code != 5:  # after a broken connection the job may be there all the same
            run.forget()
        raise
    run.record["submitting"] = time.time() - begun
    if options.detach:
        print("started; come back with: python launch.py logs -f %s" % job.run)
    return run


def follow(run, took=()):
    """Follow a job to its end; gives the exit code. `took` are the seconds for packing and submitting, if known."""
    backend = backends.backend(run.executor)
    try:
        status = backend.follow(run)
    except (KeyboardInterrupt, BrokenPipeError):
        if run.executor == "local" and took:  # these are our own pods; a job elsewhere, or of another shell, goes on
            print("\nending the pods: %s" % backend.cancel(run), file=sys.stderr)
            return 1
        print("\nthe job goes on; come back with: python launch.py logs -f %s" % run.run, file=sys.stderr)
        return 0
    backends.keep_end(run, status)
    now, after = time.time(), ""
    if took:
        after = " in " + screen.span(now - run.started + took[0])
        print(screen.times(run, took[0], took[1], now))
    if status.state == "done":
        outputs = run.record.get("outputs")
        print("%s%s%s" % (screen.state("done"), after, "; outputs in " + outputs if outputs else ""))
        return 0
    sys.stdout.flush()
    code = status.exit_code
    what = "the job was cancelled" if status.state == "cancelled" else "the job failed" + (
        " with exit code %d" % code if code is not None else ", and no exit code was told (%s)" % status.detail)
    why = "%s; %s" % FAILURES[code] if code in FAILURES else "see python launch.py logs " + run.run
    screen.complain(what + after.replace(" in ", " after "), why)
    return 1


# ---------------------------------------------------------------- the other commands


def list_recipes(options):
    if len(options.words) > 1:
        raise Refusal("%r is one word too many" % options.words[1], "list takes a family at most")
    root = Path(options.repo_root or HERE).resolve()
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
            print("  %-28s %-9s %4s x %-4s %s%s" % (
                recipe.stage, recipe.launch, recipe.nodes, recipe.gpus_per_node, recipe.script,
                "  [%s]" % recipe.image if recipe.image else ""))
    for problem in problems:
        screen.complain(problem.what, problem.fix)
    return 2 if problems else 0


def list_profiles(options):
    if options.words:
        raise Refusal("%r is one word too many" % options.words[0], "profiles takes none")
    rows = list(profiles.overview())
    if options.json:
        print(json.dumps([{"name": row[0], "executor": row[1], "about": row[2]} for row in rows], indent=1))
    else:
        for row in rows:
            print("%-16s%-10s%s" % row)
    return 0


def files(options):
    family, stages, name, overrides = split_words(options.words)
    if len(stages) > 1:
        raise Refusal("files shows one stage at a time", "name one of " + ", ".join(stages))
    plan = Launch(options, True, family, stages[0], name, overrides)
    sizes = sorted([(entry.path, len(entry.data)) for entry in plan.tree.entries]
                   + [(path, size) for size, path in plan.tree.oversize])
    if options.json:
        print(json.dumps({"files": [{"path": path, "bytes": size} for path, size in sizes],
                          "left_out": [{"path": path, "reason": why} for path, why in plan.tree.left_out]}, indent=1))
        return 0
    for path, size in sizes:
        print("%9d  %s" % (size, path))
    for path, reason in plan.tree.left_out:
        print("%9s  %s (%s)" % ("-", path, reason))
    return 0


def check(options):
    """What can be known before a launch of the profile, or of a recipe on it. 0 only if one can be expected to work."""
    if len(options.words) < 2:
        if not options.words or "=" in options.words[0]:
            raise Refusal("check takes PROFILE, or FAMILY STAGE PROFILE", "python launch.py profiles lists them")
        profile, plan = profiles.load(options.words[0]), None
    else:
        family, stages, name, overrides = split_words(options.words)
        if len(stages) > 1:
            raise Refusal("check takes one stage at a time", "name one of " + ", ".join(stages))
        plan = Launch(options, True, family, stages[0], name, overrides)
        profile = plan.profile
    found = []
    for finding in checks.look(profile, plan):
        found.append(finding)
        if not options.json:
            print("%s  %-14s  %s" % (screen.state(finding.state, 7), finding.what, one_line(screen.hide(finding.said))))
            if finding.state != "ok" and finding.fix:
                print(" " * 25 + screen.paint(one_line(finding.fix), "dim"), flush=True)
    if options.json:
        print(json.dumps([dict(vars(finding), said=screen.hide(finding.said)) for finding in found], indent=1))
    failures = [finding for finding in found if finding.state == "failure"]
    if not options.json:
        print("a launch cannot be expected to work: %s" % ", ".join(finding.what for finding in failures) if failures
              else "a launch can be expected to work")
    return failures[0].code or 2 if failures else 0


def find_run(options):
    if len(options.words) != 1:
        raise Refusal("name one run", "python launch.py status lists them")
    return backends.load_run(options.words[0])


NEWEST = 20  # runs that the table shows


def status(options):
    """One run, or all: a run whose state cannot be read is an error, but does not hide the others."""
    runs, problems = ([find_run(options)], []) if options.words else backends.all_runs()
    rows, worst = [], 2 if problems else 0
    shown = runs if options.json else runs[:NEWEST]
    silent = {}  # type: dict[str, Refusal]  # by profile: why its platform cannot be reached; waited for once
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
        rows.append(dict(run=run.run, recipe=run.recipe, profile=run.profile, nodes=run.nodes, state=state.state,
                         detail=state.detail, age_s=int(time.time() - run.started), job_exit_code=state.exit_code))
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(screen.runs(rows) if rows else "no run was launched from here")
        if len(runs) > len(shown):
            print("%d older runs: python launch.py status --json" % (len(runs) - len(shown)))
    for problem in problems:
        screen.complain(problem.what, problem.fix)
    return worst


def logs(options):
    run = find_run(options)
    run.record["ranks"] = chosen(options, run.nodes)
    if options.follow:
        return follow(run)
    backends.backend(run.executor).logs(run)
    return 0


def cancel(options):
    run = find_run(options)
    said = backends.backend(run.executor).cancel(run)
    print("%s, %s on %s: %s" % (run.run, run.recipe, run.profile, said))
    return 0


def diff(options):
    """How the tree that a run carries differs from what a launch from here would carry now, by path and SHA-256."""
    run = find_run(options)
    carried, again = run.files(), run.record["again"]
    options.config, options.nodes, options.args = again["config"], None, []
    options.repo_root = options.repo_root or Path(again["repo_root"])
    family, _, stage = run.recipe.partition("/")
    with profiles.pinned(again.get("env_file")):
        plan = Launch(options, True, family, stage, run.profile, again["overrides"])
    here = backends.fingerprints(plan.tree)
    kinds = {"changed": [path for path in carried if path in here and carried[path] != here[path]],
             "only in the run": [path for path in carried if path not in here],
             "only here": [path for path in here if path not in carried]}
    if options.json:
        found = {kind.replace(" ", "_"): sorted(paths) for kind, paths in kinds.items()}
        print(json.dumps(dict(run=run.run, sha256=run.sha256, sha256_here=plan.plan.digest, **found), indent=1))
        return 0
    print("run %s carries %d files, sha256 %s; here are %d, sha256 %s" % (
        run.run, len(carried), run.sha256[:12], len(here), plan.plan.digest[:12]))
    for kind, paths in kinds.items():
        for path in sorted(paths):
            print("%s  %s" % (screen.paint("%-15s" % kind, DIFFERENCES[kind]), path))
    if not any(kinds.values()):
        print("they are the same")
    return 0


DIFFERENCES = {"changed": "yellow", "only in the run": "red", "only here": "green"}
COMMANDS = {"launch": launch, "list": list_recipes, "profiles": list_profiles, "files": files, "status": status,
            "logs": logs, "cancel": cancel, "diff": diff, "check": check}
TAKES = {"launch": ("config", "nodes", "repo_root", "dry_run", "json", "detach", "rank", "all_ranks", "args"),
         "list": ("repo_root", "json"), "profiles": ("json",),
         "files": ("config", "nodes", "repo_root", "json", "args"), "status": ("json",),
         "check": ("config", "nodes", "repo_root", "json", "args"),
         "logs": ("follow", "rank", "all_ranks"), "cancel": (), "diff": ("repo_root", "json")}

if __name__ == "__main__":
    # A locale that lacks the letters of a path is no reason to fail.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    leave(main())
