"""A node before a server whose certificate it must not trust, over real TLS.

Before there was a connection it says so at once; afterwards it waits, with its message in hand.
"""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import superlink as superlink_calls
from client.fleet import FleetNode
from client.site_directory import make_site
from client.superlink import CertificateError, Stopped
from tests.client.test_coordinator import issue_server_certificate, make_authority, serving
from tests.client.test_fleet import Said, answer, node, node_of

UNTRUSTED = (
    "superlink_away",
    {
        "reason": "the SuperLink's certificate is not signed by root_certificate, or is for "
        "another host: compare both with what the coordinator gave out"
    },
)


@pytest.mark.parametrize("wrong", ["authority", "host"])
def test_a_certificate_that_is_not_the_right_one_is_not_waited_for(
    tmp_path: Path, wrong: str
) -> None:
    key = make_site(tmp_path / "site", known={}).settings.node_key
    (tmp_path / "memory").mkdir()
    host = "fleet.example" if wrong == "host" else "127.0.0.1"
    with serving(tmp_path / "coordinator", host=host) as port:
        ca = tmp_path / "coordinator" / "ca.crt"
        if wrong == "authority":
            ca = make_authority(tmp_path / "other")
        node = FleetNode(
            f"127.0.0.1:{port}",
            ca,
            key,
            memory=tmp_path / "memory",
            stop=threading.Event(),
            say=lambda *_, **__: None,
        )
        started = time.monotonic()
        with pytest.raises(CertificateError, match="not signed by root_certificate, or is") as no:
            node.__enter__()
    assert no.value.exit_code == 2
    assert time.monotonic() - started < 30  # a lease would be waited for 70 s


def test_one_that_has_ended_is_the_coordinators_to_renew() -> None:
    """As OpenSSL says it; a service is started again, for the coordinator may renew it."""
    error = CertificateError("certificate verify failed: certificate has expired (_ssl.c:1006)")
    assert (error.exit_code, "ask the coordinator for a new one" in str(error)) == (1, True)


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[Any]:
    from tests.superlink import LocalSuperlink

    made = LocalSuperlink(tmp_path / "superlink")
    yield made
    made.close()


def exchange_certificate(superlink: Any, other: Path) -> None:
    """Let another server stand where the SuperLink was."""
    superlink.stop()
    for name in ("superlink.crt", "superlink.key"):
        shutil.copy(other / name, superlink.directory / name)
    superlink.start()


def saved_and_strange(superlink: Any, directory: Path) -> tuple[Path, Path]:
    """Return a directory with the SuperLink's certificate, and one with that of a stranger."""
    strange, saved = directory / "strange", directory / "saved"
    make_authority(strange)
    issue_server_certificate(strange, "superlink", ["127.0.0.1"])
    saved.mkdir()
    for name in ("superlink.crt", "superlink.key"):
        shutil.copy(superlink.directory / name, saved / name)
    return saved, strange


@pytest.mark.slow
def test_one_that_is_wrong_in_mid_life_is_waited_out_with_the_message_in_hand(
    superlink: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink_calls, "RETRY_S", (0.05, 0.2))
    saved, strange = saved_and_strange(superlink, tmp_path)
    said: Said = []
    with node_of(superlink, said=said) as connection:
        message_id = superlink.send(b"adapter")
        asked = connection.receive()
        exchange_certificate(superlink, strange)
        taken: list[bool] = []
        thread = threading.Thread(target=lambda: taken.append(answer(connection, asked)))
        thread.start()
        while UNTRUSTED not in said:
            thread.join(0.05)
            assert thread.is_alive()
        assert not connection.is_connected
        exchange_certificate(superlink, saved)
        thread.join(30)
        assert taken == [True]
        assert connection.receive() is None
    assert superlink.take_reply(message_id) is not None


@pytest.mark.slow
def test_one_that_is_wrong_when_a_node_is_started_again_is_waited_out_too(
    superlink: Any, tmp_path: Path
) -> None:
    memory = tmp_path / "memory"
    with node_of(superlink, memory):
        pass
    _, strange = saved_and_strange(superlink, tmp_path)
    exchange_certificate(superlink, strange)
    stop, said = threading.Event(), list[Any]()
    again = node_of(superlink, memory, stop=stop, said=said)
    thread = threading.Thread(target=_enter_until_stopped, args=[again])
    thread.start()
    while UNTRUSTED not in said:
        thread.join(0.05)
        assert thread.is_alive()
    stop.set()
    thread.join(30)
    assert not thread.is_alive()
    # With another root_certificate it may be this site's own mistake again.
    other = make_authority(tmp_path / "third")
    with pytest.raises(CertificateError):
        node(memory, superlink.node_key, other, superlink.address).__enter__()


def _enter_until_stopped(connection: FleetNode) -> None:
    with pytest.raises(Stopped):
        connection.__enter__()
