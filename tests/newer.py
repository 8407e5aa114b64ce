"""What a newer SDK of Lepton says of our requests. It is installed beside the other (requirements-newer.txt), and asked in
a process of its own: `ask([{"metadata": …, "spec": …}, …])`, jobs or Ray clusters."""

import enum
import json
import os
import subprocess
import sys
import types
import typing
from pathlib import Path

import pydantic

REPO = Path(__file__).resolve().parent.parent
NEWER = Path(sys.prefix) / "newer"


def ask(bodies):
    """{"lacking": names in the emulator's tables that the newer models lack, "refused": what they say of bodies}."""
    assert (NEWER / "leptonai").is_dir(), "make .venv/dev"
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(NEWER), str(REPO))), "LEPTON_CACHE_DIR": "/nonexistent"}
    done = subprocess.run([sys.executable, __file__], input=json.dumps(bodies), text=True, capture_output=True, env=env,
                          check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shape_of(annotation):
    """A pydantic annotation as a shape of tests/emulators/fields.py."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return shape_of(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        shapes = [shape_of(part) for part in typing.get_args(annotation) if part is not type(None)]
        return float if float in shapes else shapes[0]
    if origin is list:
        return [shape_of(typing.get_args(annotation)[0])]
    if origin is dict:
        return {"*": shape_of(typing.get_args(annotation)[1])}
    if issubclass(annotation, enum.Enum):
        return frozenset(member.value for member in annotation)
    if issubclass(annotation, pydantic.BaseModel):
        return {(f.alias or name): shape_of(f.annotation) for name, f in annotation.model_fields.items()}
    return annotation


def lacks(ours, theirs, where):
    """The names in the shape `ours` that `theirs` does not have, or not so."""
    if isinstance(ours, dict):
        return [each for name, shape in ours.items() for each in (
            lacks(shape, theirs[name], where + "." + name) if name in theirs else [where + "." + name])]
    if isinstance(ours, list):
        return lacks(ours[0], theirs[0], where)
    return sorted(ours - theirs) if isinstance(ours, frozenset) else [where] * (ours is not theirs)


def main():
    from leptonai.api.v2.job_validation import validate_job_create, validate_label_key
    from leptonai.api.v2.types.job import LeptonJob
    from leptonai.api.v2.types.raycluster import LeptonRayCluster

    from tests.emulators import fields
    tables = (fields.LEPTON_JOB, LeptonJob), (fields.LEPTON_RAYCLUSTER, LeptonRayCluster)
    lacking = [each for ours, model in tables for each in lacks(ours, shape_of(model), model.__name__)]
    refused = []
    for body in json.load(sys.stdin):
        try:
            if "ray_version" in body["spec"]:
                made = LeptonRayCluster(**body)
            else:
                made = LeptonJob(**body)
                validate_job_create(made)
            for label in body["metadata"].get("labels") or {}:
                validate_label_key(label)
            kept = json.loads(made.model_dump_json(by_alias=True, exclude_none=True))
            refused += [name for part in ("metadata", "spec") for name in dropped(body[part], kept[part], part)]
        except ValueError as error:
            refused.append(str(error))
    print(json.dumps({"lacking": lacking, "refused": refused}))


def dropped(given, kept, where):
    """The fields with a value that a model has lost."""
    if isinstance(given, dict):
        return [each for name, value in given.items() if value is not None for each in (
            dropped(value, kept[name], where + "." + name) if name in kept else [where + "." + name])]
    if isinstance(given, list):
        return [each for pair in zip(given, kept, strict=True) for each in dropped(*pair, where)]
    return []


if __name__ == "__main__":
    main()
