"""Costs between channels, exact assignments of least cost, and soft transport plans."""

from mgd.flow.cost import COSTS, ChannelCorrelation, ChannelCost, channel_cost, make_cost
from mgd.flow.flow import ASSIGNMENTS, CAPACITIES, SOLVERS, Flow, slots, solve_control, solve_flow
from mgd.flow.groups import assign_groups, energy_kept, group_channels, group_weights
from mgd.flow.plan import Plan, soft_weights, solve_plan

__all__ = [
    "ASSIGNMENTS",
    "CAPACITIES",
    "COSTS",
    "SOLVERS",
    "ChannelCorrelation",
    "ChannelCost",
    "Flow",
    "Plan",
    "assign_groups",
    "channel_cost",
    "energy_kept",
    "group_channels",
    "group_weights",
    "make_cost",
    "slots",
    "soft_weights",
    "solve_control",
    "solve_flow",
    "solve_plan",
]
