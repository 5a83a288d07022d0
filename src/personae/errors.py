"""Every error that a user can meet. Each message says who, what was found, what was expected and what to do."""

from __future__ import annotations


class PersonaeError(Exception):
    """Anything that went wrong and can be explained. `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(PersonaeError):
    """A recipe, an option or an argument is not usable."""

    exit_code = 2


class DataError(PersonaeError):
    """A client's images cannot be used as they are."""

    exit_code = 3


class ShapeError(PersonaeError):
    """A tensor has another shape than its consumer needs."""

    exit_code = 4


class ArtefactError(PersonaeError):
    """A file or a run folder cannot be read or written."""

    exit_code = 5


class ServerRefused(PersonaeError):
    """An inference server cannot be reached, or does not do what it was asked for."""

    exit_code = 8


class RefusedPacket(ArtefactError):
    """A half-drawn picture from another machine was refused before anything was drawn on it."""


class FederationError(PersonaeError):
    """A round could not be completed."""

    exit_code = 6


class EmptyRound(FederationError):
    """No usable update arrived in a round."""


class TooFewClients(FederationError):
    """Fewer clients than a round needs could be reached, or sent what could be taken."""

    exit_code = 7


class ClientSilent(FederationError):
    """A client did not answer in time."""


class MismatchedNames(FederationError):
    """Two sides that must name the same tensors do not."""


class RefusedUpdate(FederationError):
    """An update was refused before anything was added up."""


class Diverged(FederationError):
    """A client's training left the finite numbers."""

    def __init__(self, client: str, what: str) -> None:
        super().__init__(f"client {client!r}: {what}")
        self.client = client


class ClientFailed(FederationError):
    """A client raised while it worked.

    `stage` is one of "load", "local", "personalize"; the cause is chained.
    """

    def __init__(self, client: str, round: int, stage: str, cause: BaseException) -> None:
        super().__init__(f"client {client!r} failed in round {round} during {stage}: {type(cause).__name__}: {cause}")
        self.client, self.round, self.stage = client, round, stage
        if isinstance(cause, PersonaeError):
            self.exit_code = cause.exit_code


class PrivacyError(FederationError):
    """Something that belongs to a client was about to leave it."""
