"""Expert-level placement: planned from the config alone, computed where the weights are."""

from .devices import measured_bandwidth
from .plan import PlacementPlan, plan_device_map
from .report import PlacementReport, placement_report
from .usage import ExpertUsage, collect_expert_usage

__all__ = [
    "ExpertUsage",
    "PlacementPlan",
    "PlacementReport",
    "collect_expert_usage",
    "measured_bandwidth",
    "placement_report",
    "plan_device_map",
]
