"""HTTPS: the same server behind a certificate."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest
import trustme

from tests.serving.clients import KNOWN, LONG, events_of
from tests.serving.programs import program
from ziphius.config.errors import BadInput
from ziphius.serving.server import check_certificate


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Whom the client trusts."""
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate of this machine's, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert("localhost", "127.0.0.1")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    return str(certificate), str(key)


def test_answers_and_streams_over_https(
    checkpoint: Path, home: Path, authority: trustme.CA, files: tuple[str, str]
) -> None:
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    certificate, key = files
    with program(checkpoint, home, "--tls-cert", certificate, "--tls-key", key) as started:
        started.until_ready()
        assert started.url.startswith("https://127.0.0.1:")
        with httpx.Client(base_url=started.url, verify=trusting, timeout=60) as client:
            whole = client.post("/v1/completions", json={**KNOWN, "model": None})
            assert whole.status_code == 200
            streamed = client.post("/v1/completions", json={**LONG, "max_tokens": 20})
            assert events_of(streamed.text)
            assert streamed.text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.ConnectError), httpx.Client(base_url=started.url) as stranger:
            stranger.get("/health")


def test_files_that_are_no_certificate(
    checkpoint: Path, home: Path, tmp_path: Path, files: tuple[str, str]
) -> None:
    missing = str(tmp_path / "none.pem")
    with program(checkpoint, home, "--tls-cert", missing, "--tls-key", missing) as started:
        assert started.ends(60) == 2
        (error,) = [line for line in started.lines if line.startswith("error: ")]
        assert f"--tls-cert {missing}" in error
    other = trustme.CA().issue_cert("localhost").private_key_pem
    foreign = tmp_path / "key.pem"
    other.write_to_path(foreign)
    for certificate, key in ((files[0], str(foreign)), (files[1], files[1]), (missing, files[1])):
        with pytest.raises(BadInput, match="--tls-cert"):
            check_certificate(certificate, key)
    check_certificate(*files)
