"""Mutual TLS for the coordinator: one certificate of one run, which every process shows and every process asks for.

    python -m shardtrain.launch.certificates FOLDER [NAME ...]

Whoever reaches a coordinator without it can end the job. What stays in plain text: collectives and the profiler, for which
JAX has no setting. Who has the key of a run is part of it, so the folder is its owner's alone.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from shardtrain.errors import DependencyError, LaunchError, ShardTrainError

DAYS = 30  # after which a run that still goes on needs new ones: its processes look at them when they join
FILES = {"JAX_MTLS_CERT_FILE": "cert.pem", "JAX_MTLS_KEY_FILE": "key.pem", "JAX_MTLS_CA_FILE": "ca.pem"}


def environment(folder: str | os.PathLike[str]) -> dict[str, str]:
    """What makes JAX use the certificate in a folder."""
    return {variable: os.path.join(folder, name) for variable, name in FILES.items()}


def made(names: Sequence[str] = ()) -> Mapping[str, bytes]:
    """File name -> content: an authority whose key is gone at once, and a certificate and its key.

    Args:
        names: host names or addresses at which the coordinator may be reached, besides this machine's loopback.

    Raises:
        DependencyError: cryptography is not installed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise DependencyError(
            "certificates need cryptography, which is not installed",
            where="mutual TLS",
            fix="pip install 'shardtrain[mtls]', or --mtls off on a network of your own",
        ) from error

    now = datetime.datetime.now(datetime.UTC)

    def builder(name: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        of = lambda text: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])  # noqa: E731
        return (
            x509.CertificateBuilder(of(issuer), of(name), key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
            .not_valid_after(now + datetime.timedelta(days=DAYS))
        )

    root, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = builder("shardtrain run", "shardtrain run", root)
    authority = authority.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    shown = [_name(x509, n) for n in dict.fromkeys((*names, "localhost", "127.0.0.1", "::1"))]
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    process = builder("process", "shardtrain run", key)
    process = process.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    process = process.add_extension(x509.SubjectAlternativeName(shown), critical=False)
    process = process.add_extension(x509.ExtendedKeyUsage(both), critical=False)
    pem = serialization.Encoding.PEM
    return {
        "ca.pem": authority.sign(root, hashes.SHA256()).public_bytes(pem),
        "cert.pem": process.sign(root, hashes.SHA256()).public_bytes(pem),
        "key.pem": key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    }


def _name(x509: Any, name: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def make(folder: str | os.PathLike[str], names: Sequence[str] = ()) -> None:
    """Into a folder, which is made and its owner's alone; an older certificate there is written over.

    Raises:
        LaunchError: it cannot be written. DependencyError: see `made`.
    """
    place, files = pathlib.Path(folder), made(names)
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        place.chmod(0o700)
        for name, content in files.items():
            staged = place / f".{name}.new"
            staged.unlink(missing_ok=True)
            handle = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            staged.replace(place / name)
    except OSError as error:
        raise LaunchError(
            f"no certificates: {error.strerror}",
            where=str(place),
            fix="a folder that can be written, all hosts see",
        ) from error


def check(folder: str | os.PathLike[str]) -> None:
    """Raises LaunchError: a file is missing, or the key can be read by others."""
    place = pathlib.Path(folder)
    for name in FILES.values():
        if not (place / name).is_file():
            raise LaunchError(
                f"no {name}",
                where=str(place),
                fix=f"python -m shardtrain.launch.certificates {place} FIRST_HOST, and copy it to the other hosts",
            )
    if (place / "key.pem").stat().st_mode & 0o077:
        raise LaunchError("the key can be read by others", where=str(place / "key.pem"), fix="chmod 600")


def main(words: Sequence[str]) -> int:
    """0, or 2 with one message."""
    if not words or words[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        make(words[0], words[1:])
    except ShardTrainError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
