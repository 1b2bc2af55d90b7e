"""The secrets of a deployment: a private CA, server certificates, and the key of each site.

An institution with a CA of its own uses that one, and a site makes its key itself (`ssh-keygen -t
ecdsa -b 384`): only the public half ever leaves it. Private keys are readable by their owner only.
"""

import ipaddress
import os
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from federation.atomic import write_atomically

VALIDITY = timedelta(days=365)
CLOCK_SKEW = timedelta(minutes=5)
"""A certificate is valid from a little before it is made: clocks differ."""


def make_authority(directory: Path) -> Path:
    """Write `ca.crt` and `ca.key` of a new certificate authority; return the certificate's path."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Fedge example CA")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    _write_key(directory / "ca.key", key)
    write_atomically(directory / "ca.crt", certificate.public_bytes(Encoding.PEM))
    return directory / "ca.crt"


def issue_server_certificate(directory: Path, name: str, hosts: list[str]) -> Path:
    """Write `NAME.crt` and `NAME.key`, signed by the CA of ``directory``; return the certificate.

    Args:
        directory: Where `make_authority` wrote its files.
        name: What the server is called in the certificate, and the stem of its files.
        hosts: Names and IP addresses under which clients reach the server: all of them, and
            nothing else counts (a client compares the address that it was given with these).
    """
    authority = x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())
    signer = cast(
        "ec.EllipticCurvePrivateKey",
        load_pem_private_key((directory / "ca.key").read_bytes(), password=None),
    )
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(_name(name), authority.subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
            critical=False,
        )
        .sign(signer, hashes.SHA256())
    )
    _write_key(directory / f"{name}.key", key)
    write_atomically(directory / f"{name}.crt", certificate.public_bytes(Encoding.PEM))
    return directory / f"{name}.crt"


def make_node_key(directory: Path) -> Path:
    """Write `node` and `node.pub`, as `ssh-keygen -t ecdsa -b 384` does; return the private one."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_secret(
        directory / "node", key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    )
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_atomically(directory / "node.pub", public + b"\n")
    return directory / "node"


def make_shared_secret(path: Path) -> Path:
    """Write 32 random bytes that two programs of the same owner share; return the path."""
    _write_secret(path, secrets.token_bytes(32))
    return path


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + VALIDITY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    _write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _write_secret(path: Path, content: bytes) -> None:
    """Create a file that nobody but its owner can read, not even for a moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
