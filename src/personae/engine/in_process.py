"""The embedded engine: server and clients in one process, one client at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from personae.core import Job, Run, State, Watch, ignore
from personae.engine.rounds import Answer, Since, Store, load_parts, serve
from personae.errors import ClientFailed


@dataclass(frozen=True)
class InProcess:
    """Runs a job's clients one after the other, adding their updates up as they finish.

    Memory holds one model, one update and one sum, whatever the number of clients. With a folder, the state after each
    `checkpoint_every` rounds is committed in one rename: a kill at any moment loses at most that many rounds, and a
    resume ends in the same bits. `resume` takes up a folder that exists, from round 0 if nothing was committed.
    """

    def run(self, job: Job, *, resume: bool = False, watch: Watch = ignore) -> Run:
        """Raises: ConfigError, ArtefactError, or the FederationError that stopped a round."""
        return serve(job, lambda store: _Inside(job, store), resume=resume, watch=watch)


@dataclass(frozen=True)
class _Inside:
    """Carries states by calling: a client trains when its answer is asked for."""

    job: Job
    store: Store

    def everyone(self, since: Since) -> Sequence[str]:
        return [*sorted(self.job.members.train), *sorted(self.job.members.new)]

    def known(self, number: int) -> Sequence[str]:
        return self.job.members.train

    def answers(self, server: State, number: int, cohort: Sequence[str], since: Since) -> Iterator[Answer]:
        for name in cohort:
            yield self._answer(server, number, name)

    def _answer(self, server: State, number: int, name: str) -> Answer:
        job, stage = self.job, "load"
        got, kept = job.method.broadcast(server, name), self.store.kept(name)
        try:
            client = job.site.client(name, number, job.seed)
            load_parts(client, got.params, kept.params, job.seed)
            stage = "local"
            update, kept = job.method.local(client, got, kept)
        except Exception as error:
            failed = ClientFailed(name, number, stage, error)
            failed.__cause__ = error
            return Answer(name, got.num_bytes(), problem=failed)
        return Answer(name, got.num_bytes(), update, settle=lambda: self.store.stage(name, number, kept))

    def personalize(self, released: State, backbone: str, names: Sequence[str], since: Since) -> Iterator[str]:
        """Those that a resumed run finds finished are not repeated."""
        for name in names:
            if not self.store.has_personal(name, backbone):
                personal = personalize_one(self.job, released, self.store.kept(name), name)
                self.store.save_personal(name, personal, backbone)
            yield name


def personalize_one(job: Job, released: State, kept: State, name: str) -> State:
    """What one client samples with. Raises: ClientFailed."""
    try:
        client = job.site.client(name, "personalize", job.seed)
        load_parts(client, released.params, kept.params, job.seed)
        return job.method.personalize(client, released, kept)
    except Exception as error:
        raise ClientFailed(name, job.rounds, "personalize", error) from error
