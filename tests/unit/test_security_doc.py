"""docs/security.md names every program of ours that listens, and everything that opens a port."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
FOLDERS = ("conch", "trainers", "converters", "examples", "benchmarks", "singularity")

# What listens, in code of Python or the shell.
LISTENS = re.compile(
    r"\.listen\(|create_server\(|start_server\(|start_unix_server\(|HTTPServer\(|uvicorn\.(run|Server)\(|"
    r"serve_forever\(|\bTCPStore\(|is_master=True|init_process_group\(|ProcessGroup(Gloo|NCCL)\(|"
    r"--grpc-address|\"grpc-address\"|http-address|metrics-address|socketserver|\bray\.init\(|tensorboard\.program"
)
# File -> why no row of the table names it.
BESIDE = {
    "conch/serving/server/flags.py": "flags of the server that conch/serving/server/server.py starts",
}


def listening_files() -> list[str]:
    files = [
        file
        for folder in FOLDERS
        for pattern in ("*.py", "*.sh")
        for file in (ROOT / folder).rglob(pattern)
        if not any(part.is_symlink() for part in (file, *file.parents) if part.is_relative_to(ROOT))
    ]
    return sorted(str(file.relative_to(ROOT)) for file in files if LISTENS.search(file.read_text("utf-8")))


def test_the_table_is_looked_through() -> None:
    assert {"conch/servers/listening.py", "conch/rollouts/rendezvous.py", "singularity/serve.sh"} <= {
        *listening_files()
    }


@pytest.mark.parametrize("file", listening_files())
def test_every_file_that_listens_has_a_row(file: str) -> None:
    assert file in BESIDE or f"`{file}`" in DOC, f"{file} opens a port: give it a row in docs/security.md"


def test_files_that_the_document_names_exist() -> None:
    names = re.findall(r"`((?:conch|tests|singularity|benchmarks|docs)/[\w./]+\.\w+)`", DOC)
    assert len(names) > 8 and [name for name in names if not (ROOT / name).exists()] == []


def test_settings_that_the_document_names_exist() -> None:
    from conch.config import RolloutConfig
    from conch.rollouts.server_config import ServerConfig
    from conch.serving.deployment.options import NetworkOptions

    server = {*ServerConfig.model_fields}
    assert {"secret_env", "tls_cert", "tls_key", "tls_ca", "require_client_cert"} <= server
    assert {"allow_anyone", "weights_dir", "max_request_mb"} <= server
    options = {f"--{name.replace('_', '-')}" for name in NetworkOptions.model_fields}
    shell = (ROOT / "singularity" / "serve.sh").read_text(encoding="utf-8")
    named = set(re.findall(r"`(--[a-z-]+)`", DOC))
    uvicorn = {"--ssl-certfile", "--ssl-keyfile"}
    assert [name for name in named - uvicorn if name not in options and name not in shell] == []
    auth = RolloutConfig.model_fields["auth"].annotation
    assert auth is not None and {"tls", "secret_env"} <= {*auth.model_fields}
