"""The contract between planner, exporter and runtime: what is written to disk, and how it is read back strictly.

Names are loaded when they are first used, so that ``--help`` does not wait for models it never touches.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plans.check import check_plan, read_plan
    from plans.cluster import Cluster, Device, Host, Link, Timings
    from plans.errors import LlamaplanError
    from plans.export.manifest import Manifest, StageFile
    from plans.plan import Plan, Prediction, Proof, Stage, TradeOff
    from plans.profile import ModelProfile, UnitProfile
    from plans.workload import Workload

_HOMES = {
    "check": ("check_plan", "read_plan"),
    "cluster": ("Cluster", "Device", "Host", "Link", "Timings"),
    "errors": ("LlamaplanError",),
    "export.manifest": ("Manifest", "StageFile"),
    "plan": ("Plan", "Prediction", "Proof", "Stage", "TradeOff"),
    "profile": ("ModelProfile", "UnitProfile"),
    "workload": ("Workload",),
}

__all__ = [
    "Cluster",
    "Device",
    "Host",
    "Link",
    "LlamaplanError",
    "Manifest",
    "ModelProfile",
    "Plan",
    "Prediction",
    "Proof",
    "Stage",
    "StageFile",
    "Timings",
    "TradeOff",
    "UnitProfile",
    "Workload",
    "check_plan",
    "read_plan",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"plans.{home}"), name)
    raise AttributeError(f"module 'plans' has no attribute {name!r}")
