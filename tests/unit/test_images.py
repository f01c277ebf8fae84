"""The pure parts of building images: what decides whether one is built again, and what a build is told."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.images import certificates, hash_of, pip_configuration, source_files


def test_the_hash_changes_with_every_name_and_every_content() -> None:
    assert hash_of({"a": b"1", "b": b"2"}) == hash_of({"b": b"2", "a": b"1"})
    assert len({hash_of(parts) for parts in ({"a": b"1"}, {"a": b"2"}, {"b": b"1"}, {"a": b"", "1": b""}, {})}) == 5


def test_sources_are_files_and_all_that_lies_in_folders_but_byte_code(tmp_path: Path) -> None:
    (tmp_path / "src" / "__pycache__").mkdir(parents=True)
    (tmp_path / "Dockerfile").write_text("FROM scratch")
    (tmp_path / "other").write_text("not named")
    (tmp_path / "src" / "main.py").write_text("pass")
    (tmp_path / "src" / "__pycache__" / "main.pyc").write_text("byte-code")
    assert source_files(tmp_path, ["Dockerfile", "src"]) == {"Dockerfile": b"FROM scratch", "src/main.py": b"pass"}


def test_a_build_uses_this_machine_s_index_and_certificates_but_not_its_folders() -> None:
    listed = [
        "global.index-url='https://packages.example.com/simple'",
        ":env:.find-links='/opt/wheels'",
        ":env:.cert='/etc/ssl/own.pem'",
        ":env:.default-timeout='180'",
        "install.user='true'",
    ]
    assert pip_configuration(listed) == (
        "[global]\ncert = /run/secrets/certificates\nindex-url = https://packages.example.com/simple\ntimeout = 180\n"
    )


def test_the_certificates_are_those_that_the_environment_names() -> None:
    assert certificates({"SSL_CERT_FILE": "/own.pem", "PIP_CERT": "/pip.pem"}) == Path("/own.pem")
    assert certificates({"PIP_CERT": "/pip.pem"}) == Path("/pip.pem")
    assert certificates({}).name == "ca-certificates.crt"
