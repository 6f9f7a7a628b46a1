"""Rewards: functions that judge what a model generated, a user's and those that are built in."""

from tezo_ds.rewards.judges import TIMEOUT, Judges, load_judges

__all__ = ["TIMEOUT", "Judges", "load_judges"]
