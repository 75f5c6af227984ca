"""The contract between planner, exporter and runtime: what is written to disk, and how it is read back strictly."""

from plans.check import check_plan, read_plan
from plans.cluster import Cluster, Device, Host, Link, Timings
from plans.errors import LlamaplanError
from plans.manifest import Manifest, StageFile
from plans.plan import Plan, Prediction, Proof, Stage, TradeOff
from plans.profile import ModelProfile, UnitProfile
from plans.workload import Workload

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
