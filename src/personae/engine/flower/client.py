"""The client's half: a Flower app that answers each kind of message from the client's seat."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from personae.core import State
from personae.engine.flower.wire import About, pack, say, unpack
from personae.engine.seat import Seat, introduction

SeatOf = Callable[[Context], Seat]


def client_app(seat_of: SeatOf) -> ClientApp:
    """A Flower app for one client; `seat_of` says from the node's configuration who it is."""
    app = ClientApp()

    def answering(do: Callable[[Seat, About, State], RecordDict]) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            try:
                about, got = unpack(message.content)
                reply = do(seat_of(context), about, got)
            except Exception as error:
                # What went wrong may speak of this client's files, so only its kind leaves; the rest stays here.
                say(f"{type(error).__name__}: {error}")
                reply = pack({"problem": type(error).__name__})
            return Message(reply, reply_to=message)

        return answer

    app.query("hello")(answering(_hello))
    app.train("local")(answering(_local))
    app.train("personalize")(answering(_personalize))
    return app


def _hello(seat: Seat, about: About, got: State) -> RecordDict:
    live = seat.site.client(seat.name, "hello", seat.seed).model.live()
    return pack({"client": seat.name, **introduction(seat.method, live)})


def _local(seat: Seat, about: About, got: State) -> RecordDict:
    update = seat.local(str(about["run"]), int(about["round"]), int(about["since"]), int(about["committed"]), got)
    metrics = {f"metric.{name}": float(value) for name, value in update.metrics.items()}
    own = {"run": about["run"], "round": about["round"], "client": seat.name, "num_examples": update.num_examples}
    return pack({**own, **metrics}, update.sent)


def _personalize(seat: Seat, about: About, got: State) -> RecordDict:
    run, since = str(about["run"]), int(about["since"])
    seat.personalize(run, since, got)
    try:
        told = seat.figures(run, since)
    except Exception as error:  # the personal model is there all the same
        say(f"measuring failed: {type(error).__name__}: {error}")
        told = {}
    own = {"run": about["run"], "round": about["round"], "client": seat.name}
    return pack({**own, **{f"figure.{key}": value for key, value in told.items()}})
