"""Costs between channels, and the exact assignments that are cheapest on them."""

from mgd.flow.cost import ChannelCost, channel_cost
from mgd.flow.flow import ASSIGNMENTS, CAPACITIES, SOLVERS, Flow, slots, solve_control, solve_flow
from mgd.flow.plan import Plan, solve_plan

__all__ = [
    "ASSIGNMENTS",
    "CAPACITIES",
    "SOLVERS",
    "ChannelCost",
    "Flow",
    "Plan",
    "channel_cost",
    "slots",
    "solve_control",
    "solve_flow",
    "solve_plan",
]
