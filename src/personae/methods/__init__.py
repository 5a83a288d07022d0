"""One federated method per file, and the wrappers around any of them."""

from personae.methods.cluster_lora import ClusterLora
from personae.methods.fedavg_ft import FedAvgFT
from personae.methods.local_only import LocalOnly
from personae.methods.proximal import Proximal
from personae.methods.server_adam import ServerAdam
from personae.methods.server_ema import ServerEma
from personae.methods.shared_rep import SharedRep
from personae.methods.spire import Spire

METHODS = {
    "spire": Spire,
    "fedavg_ft": FedAvgFT,
    "shared_rep": SharedRep,
    "local_only": LocalOnly,
    "cluster_lora": ClusterLora,
}
"""By the name that a recipe uses."""

WRAPPERS = {"proximal": Proximal, "server_adam": ServerAdam, "server_ema": ServerEma}
"""Around any method, applied in this order from the inside out."""

__all__ = [
    "METHODS",
    "WRAPPERS",
    "ClusterLora",
    "FedAvgFT",
    "LocalOnly",
    "Proximal",
    "ServerAdam",
    "ServerEma",
    "SharedRep",
    "Spire",
]
