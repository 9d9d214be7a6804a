"""When a call's time begins and ends, whoever looks at it and when."""

from __future__ import annotations

from typing import Any

import pytest

from daaswarm.errors import DeadlineExceeded
from daaswarm.messages import Pong
from daaswarm.net import pending as pending_module
from daaswarm.net.pending import PendingCall


class FakeConnection:
    """Time passes only while a thread waits here."""

    peer_id = "peer"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.waits: list[float] = []
        self.cancelled: list[PendingCall] = []
        monkeypatch.setattr(pending_module, "monotonic", lambda: self.now)

    def submit(self, deadline_s: float) -> PendingCall:
        connection: Any = self
        return PendingCall(connection, deadline_s)

    def wait_for(self, pending: PendingCall, deadline: float) -> None:
        self.waits.append(deadline - self.now)
        self.now = max(self.now, deadline)

    def cancel(self, pending: PendingCall) -> None:
        self.cancelled.append(pending)


def test_the_deadline_counts_from_submitting(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = FakeConnection(monkeypatch)
    calls = [connection.submit(2.0), connection.submit(2.0), connection.submit(3.0)]
    for call in calls:
        with pytest.raises(DeadlineExceeded):
            call.wait()
    assert connection.waits == [2.0, 0.0, 1.0]  # not 2 s for each, one after the other
    assert connection.cancelled == calls


def test_a_shorter_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = FakeConnection(monkeypatch)
    call = connection.submit(2.0)
    connection.now += 1.5
    with pytest.raises(DeadlineExceeded, match=r"within 0\.1 s"):
        call.wait(0.1)
    with pytest.raises(DeadlineExceeded):
        call.wait(10.0)
    assert connection.waits == pytest.approx([0.1, 0.4])


def test_the_latency_is_the_hosts_not_the_collectors(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = FakeConnection(monkeypatch)
    call = connection.submit(2.0)
    assert call.latency_s == 0
    connection.now += 0.5
    call.finish(Pong(), memoryview(b""), None)
    connection.now += 60  # others were waited for
    assert call.wait()[0] == Pong() and call.latency_s == 0.5
    assert connection.waits == []
