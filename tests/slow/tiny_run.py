"""Tiny runs, each in a process of its own, to be killed. Usage: tiny_run.py [--resume] [--every N] FOLDER ...

One child is forked per folder, one after the other, so that torch is imported once; its process id and then its exit
code (negative for a signal) are printed, a line each.

With KILL_AT="replace:7:before fsync:9:after fsync:9:half ...", one for each folder, a child kills itself at its n-th
call; "half" first cuts the file that is being written to half its length. Only this script reads KILL_AT.
"""

import argparse
import os
import signal
import traceback
from pathlib import Path
from typing import NoReturn

import torch

from personae.core import Training
from personae.engine import InProcess
from personae.methods import ServerAdam, ServerEma, Spire
from personae.testing import tiny_job

ROUNDS = 12
METHOD = ServerEma(ServerAdam(Spire(Training(10, 1e-2, 4, condition_dropout=0.2), Training(10, 1e-2, 4)), 0.01), 0.9)


def kill_at(call: str, number: int, when: str) -> None:
    """Replace os.<call> by one that ends this process, as a power cut would, at its n-th call."""
    real, calls = getattr(os, call), 0

    def counted(target, *rest):
        nonlocal calls
        calls += 1
        if calls == number and when == "half":
            os.truncate(target, os.stat(target).st_size // 2)
        if calls != number or when == "after":
            real(target, *rest)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, call, counted)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("folders", type=Path, nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(1)
    moments = os.environ["KILL_AT"].split() if "KILL_AT" in os.environ else [""] * len(given.folders)
    for folder, moment in zip(given.folders, moments, strict=True):
        child = os.fork()
        if child == 0:
            run_in_child(folder, moment, given.every, given.resume)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run_in_child(folder: Path, moment: str, every: int, resume: bool) -> NoReturn:
    try:
        if moment:
            call, number, when = moment.split(":")
            kill_at(call, int(number), when)
        InProcess().run(tiny_job(METHOD, rounds=ROUNDS, folder=folder, checkpoint_every=every), resume=resume)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
