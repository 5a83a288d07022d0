"""Streams of tasks, round by round."""

import pytest
import torch

from personae.core import ClientData, Images, Task
from personae.data.tasks import Period, TaskStream, word_at
from personae.errors import ConfigError

NOTHING = ClientData(Images(torch.zeros(1, 2)), Images(torch.zeros(1, 2)))


def period(name, place, rounds=1):
    return Period(Task(name, word_at(place), "dog"), NOTHING, rounds)


def test_tasks_follow_each_other_without_a_gap():
    stream = TaskStream((period("rex", 1, 2), period("tom", 2, 1), period("pip", 3, 3)), begins=3)
    assert [stream.at(number) for number in range(1, 10)] == [None, None, 0, 0, 1, 2, 2, 2, None]
    assert stream.last_rounds == (4, 5, 8)
    assert [task.word for task in stream.tasks] == ["<concept-1>", "<concept-2>", "<concept-3>"]


@pytest.mark.parametrize(
    ("periods", "begins", "said"),
    [
        ((), 1, "it has no task"),
        ((period("rex", 1),), 0, "begins in round 0"),
        ((period("rex", 1, 0),), 1, "'rex' has 0 rounds"),
        ((period("rex", 1), period("tom", 1)), 1, "'tom' has the word '<concept-1>', expected '<concept-2>'"),
        ((period("rex", 1), period("rex", 2)), 1, "called rex twice"),
    ],
)
def test_what_is_no_stream_is_refused(periods, begins, said):
    with pytest.raises(ConfigError, match=said):
        TaskStream(periods, begins)
