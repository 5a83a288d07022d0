"""Who carries states between the server and its clients."""

from personae.engine.in_process import InProcess

ENGINES = {"in_process": InProcess}
"""By the name that a recipe uses."""
