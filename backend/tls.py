"""TLS: certificates checked before anything listens, and read again when their files change."""

import datetime
import logging
import os
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from backend.flag_values import SettingsError
from backend.settings import TlsFiles

# Those that BoringSSL signs with.
_CURVES = ("secp256r1", "secp384r1", "secp521r1")

logger = logging.getLogger(__name__)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """What a server's port needs; with a `client_ca`, clients without a certificate of it are refused.

    Raises:
        SettingsError: a file is missing, unreadable or no PEM, the key is another certificate's, or one has expired.

    """
    certificates = _Certificates(files)
    return grpc.dynamic_ssl_server_credentials(
        certificates.initial,
        certificates.refreshed,  # type: ignore[arg-type]  # the stubs forget that None means no change
        require_client_authentication=files.client_ca is not None,
    )


class _Certificates:
    """The files as gRPC takes them, read again when one of them is another than before."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._seen = self._stamps()
        self.initial = self._read()

    def refreshed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC at each new connection, in a thread of its own; None keeps what is in use."""
        stamps = self._stamps()
        if stamps == self._seen:
            return None
        self._seen = stamps
        try:
            return self._read()
        except SettingsError as error:
            logger.warning("the TLS files have changed, and the former certificate stays in use: %s", error)
            return None

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in (self._files.cert, self._files.key, self._files.client_ca) if path is not None]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        cert, key = _content("--tls-cert", self._files.cert), _content("--tls-key", self._files.key)
        first = _certificates("--tls-cert", self._files.cert, cert)[0]
        if problem := _out_of_date(first):
            raise _refusal("--tls-cert", self._files.cert, problem)
        _check_key(self._files, key, first)
        client_ca = None
        if self._files.client_ca is not None:
            client_ca = _content("--tls-client-ca", self._files.client_ca)
            problems = [
                _out_of_date(found) for found in _certificates("--tls-client-ca", self._files.client_ca, client_ca)
            ]
            # A bundle may hold old ones beside their successors.
            if all(problems):
                raise _refusal("--tls-client-ca", self._files.client_ca, problems[0] or "")
        logger.info(
            "TLS certificate of %s, valid until %s", first.subject.rfc4514_string() or "no subject", _end(first)
        )
        return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _content(flag: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise _refusal(flag, path, getattr(error, "strerror", None) or str(error)) from error


def _certificates(flag: str, path: str, data: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise _refusal(flag, path, "holds no certificate that can be read; a PEM file is needed") from error


def _check_key(files: TlsFiles, data: bytes, certificate: x509.Certificate) -> None:
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError as error:
        raise _refusal("--tls-key", files.key, "is encrypted; give a key without a password") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _refusal("--tls-key", files.key, "holds no private key that can be read; a PEM file is needed") from error
    if not isinstance(key, rsa.RSAPrivateKey) and getattr(getattr(key, "curve", None), "name", "") not in _CURVES:
        raise _refusal("--tls-key", files.key, f"is of a kind that gRPC doesn't take; use RSA, or EC with {_CURVES[0]}")
    if key.public_key() != _public_key(files.cert, certificate):
        raise _refusal("--tls-key", files.key, f"doesn't belong to the first certificate of {files.cert}")


def _public_key(path: str, certificate: x509.Certificate) -> Any:
    try:
        return certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _refusal("--tls-cert", path, "is for a key of a kind that can't be read") from error


def _out_of_date(certificate: x509.Certificate) -> str | None:
    now = datetime.datetime.now(datetime.UTC)
    if certificate.not_valid_after_utc < now:
        return f"expired on {_end(certificate)}"
    if certificate.not_valid_before_utc > now:
        return f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
    return None


def _end(certificate: x509.Certificate) -> str:
    return f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"


def _refusal(flag: str, path: str, reason: str) -> SettingsError:
    return SettingsError(f"{flag} {path}: {reason}")
