"""The libp2p certificate: a self-signed X.509 certificate whose extension binds the TLS key to a PeerId.

Source: https://github.com/libp2p/specs/blob/master/tls/tls.md. Written out here because importing py-libp2p takes a
second; ``tests/net/test_certificate.py`` holds the two implementations against each other.
"""

from __future__ import annotations

import datetime
import secrets
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from daaswarm.core.signing import get_peer_id
from daaswarm.errors import RemoteProtocolError
from daaswarm.types import PeerId

EXTENSION_OID = x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
SIGNED_PREFIX = b"libp2p-tls-handshake:"
ED25519_PROTOBUF = bytes([0x08, 0x01, 0x12, 0x20])  # libp2p PublicKey: type Ed25519, 32 bytes of data
MAX_CERTIFICATE_BYTES = 16 * 1024  # ours have 400
VALID_DAYS = 365 * 100  # a certificate lives as long as its process; the field must hold something
BACKDATED_S = 3600  # clocks of peers may be behind


_X509_ERRORS = (x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType)


@dataclass(frozen=True)
class Certificate:
    """A certificate and the private key made for it, both PEM; ``der`` is what a peer sees."""

    certificate_pem: bytes
    key_pem: bytes
    der: bytes


def create_certificate(identity_key: SigningKey) -> Certificate:
    """A fresh ECDSA P-256 TLS key, certified by the node's Ed25519 key."""
    tls_key = ec.generate_private_key(ec.SECP256R1())
    public_der = tls_key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    public_key = ED25519_PROTOBUF + bytes(identity_key.verify_key)
    signature = identity_key.sign(SIGNED_PREFIX + public_der).signature
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "libp2p")])
    begin = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=BACKDATED_S)
    certificate = (
        x509.CertificateBuilder()
        .serial_number(secrets.randbits(63) + 1)
        .subject_name(name)
        .issuer_name(name)
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=VALID_DAYS))
        .public_key(tls_key.public_key())
        .add_extension(x509.UnrecognizedExtension(EXTENSION_OID, _encode_signed_key(public_key, signature)), False)
        .sign(tls_key, hashes.SHA256())
    )
    return Certificate(
        certificate.public_bytes(serialization.Encoding.PEM),
        tls_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        certificate.public_bytes(serialization.Encoding.DER),
    )


def get_certified_peer_id(der: bytes) -> PeerId:
    """The PeerId that a certificate proves, given that TLS proved possession of the certificate's key.

    Raises:
        RemoteProtocolError: it's not a valid libp2p certificate, or its identity key isn't Ed25519.
    """
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise RemoteProtocolError(f"a certificate of {len(der)} bytes, over the limit")
    try:
        certificate = x509.load_der_x509_certificate(der)
        _check_validity(certificate)
        public_key, signature = _decode_signed_key(_get_extension(certificate))
        _check_self_signature(certificate)
        public_der = certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        if not public_key.startswith(ED25519_PROTOBUF) or len(public_key) != 36:
            raise ValueError("its identity key is not Ed25519")
        VerifyKey(public_key[4:]).verify(SIGNED_PREFIX + public_der, signature)
    except InvalidSignature:
        raise RemoteProtocolError("a certificate that is not signed by its own key") from None
    except BadSignatureError:
        raise RemoteProtocolError("a certificate whose identity signature is wrong") from None
    except (ValueError, TypeError, UnsupportedAlgorithm, *_X509_ERRORS) as error:
        raise RemoteProtocolError(
            f"no libp2p certificate: {error}", hint="what answers there is not a daaswarm node"
        ) from error
    return get_peer_id(public_key[4:])


def _check_validity(certificate: x509.Certificate) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise ValueError("expired or not yet valid; check the clocks of both machines")


def _get_extension(certificate: x509.Certificate) -> bytes:
    found = b""
    for extension in certificate.extensions:
        if extension.oid == EXTENSION_OID and isinstance(extension.value, x509.UnrecognizedExtension):
            found = extension.value.value
        elif extension.critical and isinstance(extension.value, x509.UnrecognizedExtension):
            raise ValueError(f"unknown critical extension {extension.oid.dotted_string}")
    if not found:
        raise ValueError("it names no peer")
    return found


def _check_self_signature(certificate: x509.Certificate) -> None:
    key, signature = certificate.public_key(), certificate.signature
    algorithm = certificate.signature_hash_algorithm
    if isinstance(key, ec.EllipticCurvePublicKey) and algorithm is not None:
        key.verify(signature, certificate.tbs_certificate_bytes, ec.ECDSA(algorithm))
    elif isinstance(key, ed25519.Ed25519PublicKey):
        key.verify(signature, certificate.tbs_certificate_bytes)
    else:
        raise ValueError("its key is neither ECDSA nor Ed25519")


def _encode_signed_key(public_key: bytes, signature: bytes) -> bytes:
    """DER of ``SEQUENCE { OCTET STRING, OCTET STRING }``; ours has 106 bytes, so every length is one byte."""
    content = b"".join(bytes([0x04, len(part)]) + part for part in (public_key, signature))
    return bytes([0x30, len(content)]) + content


def _decode_signed_key(der: bytes) -> tuple[bytes, bytes]:
    """The inverse. Long lengths are refused: no Ed25519 key needs one."""
    if len(der) < 2 or der[0] != 0x30 or der[1] >= 0x80 or der[1] != len(der) - 2:
        raise ValueError("its identity extension is damaged, or its identity key is not Ed25519")
    parts: list[bytes] = []
    at = 2
    while at < len(der):
        if at + 2 > len(der) or der[at] != 0x04 or der[at + 1] >= 0x80 or at + 2 + der[at + 1] > len(der):
            raise ValueError("its identity extension is damaged")
        parts.append(der[at + 2 : at + 2 + der[at + 1]])
        at += 2 + der[at + 1]
    if len(parts) != 2:
        raise ValueError("its identity extension is damaged")
    return parts[0], parts[1]
