"""What clients and servers with bad intent do, to measure what it comes to."""

from personae.attack.poison import Poisoned

__all__ = ["Poisoned"]
