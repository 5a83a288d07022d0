"""Flower's simulation on one machine: the same two halves, and clients in worker processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid

from personae.core import Job, Run, Watch, ignore
from personae.engine.flower.client import SeatOf, client_app
from personae.engine.flower.server import serve_grid, server_app
from personae.engine.patience import Patience
from personae.engine.seat import Seat
from personae.errors import ConfigError


@dataclass(frozen=True)
class Flower:
    """Runs a job on Flower's own simulation: clients in worker processes, one per `cpus_per_client` processors."""

    patience: Patience = Patience()
    cpus_per_client: float = 1.0
    gpus_per_client: float = 0.0

    def run(self, job: Job, *, resume: bool = False, watch: Watch = ignore) -> Run:
        """Raises: ConfigError, ArtefactError, or the FederationError that stopped a round."""
        from flwr.simulation import run_simulation

        names = [*sorted(job.members.train), *sorted(job.members.new)]
        done: list[Run] = []

        def main(grid: Grid, _: Mapping[str, Any]) -> None:
            done.append(serve_grid(job, grid, resume=resume, watch=watch, patience=self.patience))

        run_simulation(
            server_app=server_app(main),
            client_app=client_app(simulated(job, names)),
            num_supernodes=len(names),
            backend_config={"client_resources": {"num_cpus": self.cpus_per_client, "num_gpus": self.gpus_per_client}},
        )
        return done[0]


def simulated(job: Job, names: Sequence[str]) -> SeatOf:
    """Seats by the number that Flower gives each simulated node; their personal files go to the run's own folder."""
    method, site, seed, folder = job.method, job.site, job.seed, job.folder
    if folder is None:
        raise ConfigError("simulated clients keep their states in the run's folder; give the job one")
    personal: Path = folder / "clients"
    nodes = folder / "checkpoint" / "nodes"

    def seat_of(context: Context) -> Seat:
        name = names[int(context.node_config["partition-id"])]
        return Seat(name, method, site, seed, nodes / name, personal)

    return seat_of
