"""The distributed engine: the same rounds over Flower's messages, simulated on one machine or deployed on many."""

from personae.engine.flower.client import SeatOf, client_app
from personae.engine.flower.server import serve_grid, server_app
from personae.engine.flower.simulation import Flower, simulated
from personae.engine.flower.wire import FORMAT, HELLO, LOCAL, PERSONALIZE, MakeMessage, pack, unpack

__all__ = [
    "FORMAT",
    "HELLO",
    "LOCAL",
    "PERSONALIZE",
    "Flower",
    "MakeMessage",
    "SeatOf",
    "client_app",
    "pack",
    "serve_grid",
    "server_app",
    "simulated",
    "unpack",
]
