"""Rules from a round's updates to tensors."""

from personae.aggregate.mean import mean, uniform_mean

RULES = {"mean": mean, "uniform_mean": uniform_mean}
"""By the name that a recipe uses."""
