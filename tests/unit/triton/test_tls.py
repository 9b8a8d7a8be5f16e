from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import trustme

from conch.access.secrets import secret_from
from conch.access.tls import ClientTls, ServerTls, own_client
from conch.config import RewardAuthConfig, RewardConfig, TlsConfig
from conch.errors import ConfigError, ServerStartError
from conch.rewards.served import TritonReward
from conch.triton.channel import Access, open_client
from tests.certificates import HOST, make_certificates


def test_own_client_trusts_the_servers_certificate_by_its_name(tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    assert own_client(ServerTls(made.server, made.server_key)) == ClientTls(made.server, None, None, HOST)
    mutual = ServerTls(made.server, made.server_key, made.ca, require_client_cert=True)
    assert own_client(mutual) == ClientTls(made.server, made.server, made.server_key, HOST)


def test_a_key_of_another_certificate_is_named(tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    with pytest.raises(ServerStartError, match=r"server\.pem and key .*client\.key cannot be used .*a pair"):
        own_client(ServerTls(made.server, made.client_key))


def test_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert(
        HOST, not_after=datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
    )
    issued.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "old.pem"))
    with pytest.raises(ServerStartError, match=r"old\.pem: the certificate would be refused \(.*expired"):
        own_client(ServerTls(tmp_path / "old.pem", tmp_path / "old.pem"))


def test_an_authority_that_did_not_sign_the_servers_own_certificate_is_refused(tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    tls = ServerTls(made.server, made.server_key, made.other_ca, require_client_cert=True)
    with pytest.raises(
        ServerStartError, match="a client with this server's own certificate would be refused"
    ):
        own_client(tls)


def test_mutual_tls_needs_an_authority(tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    with pytest.raises(ServerStartError, match="--require-client-cert needs --tls-ca"):
        own_client(ServerTls(made.server, made.server_key, None, require_client_cert=True))


@pytest.mark.parametrize(
    ("content", "expected"), [(None, "cannot be read"), (b"\x00\x01", "is not in PEM format")]
)
def test_a_file_that_is_missing_or_no_pem_is_named(tmp_path: Path, content, expected: str) -> None:
    made = make_certificates(tmp_path)
    if content is not None:
        (tmp_path / "bad.pem").write_bytes(content)
    with pytest.raises(ServerStartError, match=rf"bad\.pem {expected}"):
        own_client(ServerTls(tmp_path / "bad.pem", made.server_key))


def test_secret_comes_from_the_environment_and_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "abc123")
    assert secret_from("MY_SECRET") == "abc123" and secret_from(None) == ""
    assert "abc123" not in repr(Access(secret="abc123", admin_secret="abc123"))


@pytest.mark.parametrize("value", ["", "with space", "a=b", "ü", "a:b"])
def test_a_secret_that_cannot_be_sent_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MY_SECRET", value)
    with pytest.raises(ConfigError, match="environment variable MY_SECRET"):
        secret_from("MY_SECRET")


def test_a_client_names_the_certificate_file_that_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"certificate file .*none\.pem cannot be read"):
        open_client("127.0.0.1:1", Access(ClientTls(tmp_path / "none.pem")))


@pytest.mark.parametrize(
    ("section", "expected"),
    [({"cert": "c"}, "belong together"), ({"cert": "c", "key": "k"}, "nothing is encrypted")],
)
def test_half_a_tls_section_is_refused(section: dict[str, str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        TlsConfig.model_validate(section)


def test_a_reward_whose_secret_is_not_set_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_SECRET", raising=False)
    with pytest.raises(ConfigError, match="environment variable MY_SECRET"):
        TritonReward("127.0.0.1:1/walks", RewardConfig(auth=RewardAuthConfig(secret_env="MY_SECRET")))


def test_a_reward_whose_certificate_is_missing_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.pem cannot be read"):
        TritonReward(
            "127.0.0.1:1/walks", RewardConfig(auth=RewardAuthConfig(tls=TlsConfig(ca=tmp_path / "none.pem")))
        )
