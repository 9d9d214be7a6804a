"""Our certificate against py-libp2p's implementation of the same specification."""

from __future__ import annotations

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from daaswarm.core.signing import get_peer_id
from daaswarm.errors import RemoteProtocolError
from daaswarm.net.certificate import create_certificate, get_certified_peer_id

KEY = SigningKey(bytes([5]) * 32)
PEER = get_peer_id(bytes(KEY.verify_key))
OURS = create_certificate(KEY)


def test_libp2p_accepts_ours():
    from libp2p.peer.id import ID
    from libp2p.security.tls.certificate import verify_certificate_chain

    public_key = verify_certificate_chain([x509.load_der_x509_certificate(OURS.der)])
    assert str(ID.from_pubkey(public_key)) == PEER == get_certified_peer_id(OURS.der)


def test_ours_accepts_libp2ps():
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID
    from libp2p.security.tls.certificate import create_cert_template, generate_certificate

    pair = create_new_key_pair(bytes([6]) * 32)
    pem, _ = generate_certificate(pair.private_key, create_cert_template())
    der = x509.load_pem_x509_certificate(pem.encode()).public_bytes(serialization.Encoding.DER)
    assert get_certified_peer_id(der) == str(ID.from_pubkey(pair.public_key))


def make(*, extension: x509.ExtensionType | None = None, critical=False, days=1, signer=None) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .serial_number(1)
        .subject_name(name)
        .issuer_name(name)
        .not_valid_before(now - datetime.timedelta(days=10))
        .not_valid_after(now + datetime.timedelta(days=days))
        .public_key(key.public_key())
    )
    if extension is not None:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer or key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


STOLEN = x509.load_der_x509_certificate(OURS.der).extensions[0].value
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"x")


@pytest.mark.parametrize(
    ("der", "why"),
    [
        (b"", "no libp2p certificate"),
        (b"garbage", "no libp2p certificate"),
        (b"x" * 20_000, "over the limit"),
        (make(), "names no peer"),
        (make(extension=STOLEN), "identity signature is wrong"),
        (make(extension=STOLEN, days=-1), "expired"),
        (make(extension=STOLEN, signer=ec.generate_private_key(ec.SECP256R1())), "not signed by its own key"),
        (make(extension=UNKNOWN, critical=True), "unknown critical extension"),
    ],
)
def test_bad_certificates_are_refused_by_name(der, why):
    with pytest.raises(RemoteProtocolError, match=why):
        get_certified_peer_id(der)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # that one was made negative
@given(st.integers(0, len(OURS.der) - 1), st.integers(1, 255))
def test_no_changed_byte_gives_another_peer(at, xor):
    der = bytearray(OURS.der)
    der[at] ^= xor
    with pytest.raises(RemoteProtocolError):
        get_certified_peer_id(bytes(der))


def test_a_version_that_does_not_exist_is_refused():
    version = bytes.fromhex("a003020102")  # [0] { INTEGER 2 }: X.509 v3
    assert OURS.der.count(version) == 1
    with pytest.raises(RemoteProtocolError):
        get_certified_peer_id(OURS.der.replace(version, bytes.fromhex("a003020107")))
