"""A node before a server whose certificate it must not trust: it says so at once, over real TLS."""

import threading
import time
from pathlib import Path

import pytest

from client.fleet import FleetNode
from client.site_directory import make_site
from client.superlink import CertificateError
from tests.client.test_coordinator import make_authority, serving


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
