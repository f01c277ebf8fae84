"""Image archives in the OCI layout: makes the pause image from one program, and reads which image an archive holds."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))


def one_program_image(program: Path, name: str, architecture: str, file: Path) -> None:
    """Writes an image that holds one static program, `/<file name>`, and starts it without being root.

    Args:
        program: the program.
        name: the image's full name with its tag.
        architecture: in Go's words: `amd64`, `arm64`.
        file: the archive to write.
    """
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        _add(archive, program.name, program.read_bytes(), 0o755)
    layer_bytes = layer.getvalue()
    blobs: dict[str, bytes] = {}

    def blob(content: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        return {
            "mediaType": f"application/vnd.oci.image.{media_type}",
            "digest": f"sha256:{digest}",
            "size": len(content),
        }

    layer_entry = blob(layer_bytes, "layer.v1.tar")
    configuration = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Entrypoint": [f"/{program.name}"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [layer_entry["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(json.dumps(configuration).encode(), "config.v1+json"),
        "layers": [layer_entry],
    }
    entry = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": name, "io.containerd.image.name": name}
    index = {"schemaVersion": 2, "manifests": [entry]}
    with tarfile.open(file, "w") as archive:
        _add(archive, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        _add(archive, "index.json", json.dumps(index).encode())
        for digest, content in blobs.items():
            _add(archive, f"blobs/sha256/{digest}", content)


def digest_of_archive(file: Path) -> str:
    """The digest of the (first) image in an OCI archive.

    Raises:
        ValueError: it is not an OCI archive.
    """
    try:
        with tarfile.open(file) as archive:
            member = archive.extractfile("index.json")
            if member is None:
                raise ValueError(f"{file} is not an OCI archive: its index.json is no file")
            return str(json.loads(member.read())["manifests"][0]["digest"])
    except (KeyError, IndexError, tarfile.TarError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not an OCI archive: {error}") from None
