"""JSON Schemas of everything written to disk, generated from the models.

Run ``python -m plans.schemas docs/schemas`` after changing a model; a test compares the folder with the models.
"""

import sys
from pathlib import Path

from plans.cluster import Cluster
from plans.export.manifest import Manifest, StageFile
from plans.plan import Plan
from plans.profile import ModelProfile
from plans.reading.strict import StrictModel, dump_json
from plans.run import BatchRun, Bench, Run
from plans.sensitivity import Sensitivity
from plans.workload import Request, Workload

MODELS: dict[str, type[StrictModel]] = {
    "batch": BatchRun,
    "bench": Bench,
    "cluster": Cluster,
    "manifest": Manifest,
    "plan": Plan,
    "profile": ModelProfile,
    "request": Request,
    "run": Run,
    "sensitivity": Sensitivity,
    "stage": StageFile,
    "workload": Workload,
}


def schema_text(name: str) -> str:
    """Return the JSON Schema (draft 2020-12) of one kind of file as canonical text."""
    schema = MODELS[name].model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return dump_json(schema)


def write_schemas(folder: Path) -> None:
    """Write every schema as ``NAME.schema.json`` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        (folder / f"{name}.schema.json").write_text(schema_text(name), encoding="utf-8")


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]))
