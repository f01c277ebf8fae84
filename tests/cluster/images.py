"""Builds the container images, with Docker where its engine answers, else with buildah; the same Dockerfiles serve both.

Without an engine the Python base is made from the distribution, since buildah alone is used where no image registry may be reachable. An image
carries a hash of all that went into it as a label, and is built again only when that has changed. Beside each image of ours lies its bill of materials:
`sbom/NAME.cdx.json` in the cache folder, as it is in the image.

    python -m tests.cluster.images build [base operator agent keyless livekit] [--base IMAGE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.errors import ClusterError
from tests.cluster.native.build import cache_folder, programs
from tests.cluster.native.commands import run, succeeds
from tests.cluster.native.locks import locked
from tests.cluster.native.packages import install
from tests.cluster.progress import Progress

ROOT = Path(__file__).parents[2]
LABEL = "dev.voicepool.inputs"
SBOM = "/opt/voicepool/sbom.cdx.json"
"""Where an image of ours has its bill of materials (CycloneDX, JSON)."""
SUITE = "trixie"
BASE = f"localhost/voicepool-base:{SUITE}"
BASE_PACKAGES = ("ca-certificates", "python3", "python3-venv", "tini")
NOT_IN_BASE = (
    "dev",
    "proc",
    "sys",
    "tmp",
    "usr/share/doc",
    "usr/share/locale",
    "usr/share/man",
    "var/cache",
    "var/lib/apt/lists",
    "var/log",
)
"""Folders of the distribution whose content a container does not need."""

BUILD_DEADLINE_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class Image:
    """One image of ours and what goes into it.

    Attributes:
        name: its full name.
        dockerfile: from the root of the repository.
        target: the stage of the Dockerfile; empty for the last.
        sources: files and folders, from the root of the repository, whose content decides whether it is built again.
        expected_seconds: how long a first build took on 2 cores.
    """

    name: str
    dockerfile: str
    target: str
    sources: tuple[str, ...]
    expected_seconds: float


_AGENT_SOURCES = (
    "agent-image/Dockerfile",
    "agent-image/requirements.txt",
    "agent-image/sbom",
    "agent-image/slim",
    "agent-image/src",
)
IMAGES = {
    "operator": Image(
        "localhost/voicepool-operator:dev",
        "operator/Dockerfile",
        "",
        (
            "operator/Dockerfile",
            "agent-image/sbom",
            "agent-image/slim",
            "operator/requirements.txt",
            "operator/requirements-web-client.txt",
            "operator/src",
        ),
        45,
    ),
    "agent": Image(
        "localhost/voicepool-agent:dev",
        "agent-image/Dockerfile",
        "agent",
        (*_AGENT_SOURCES, "agent-image/bots/reference"),
        45,
    ),
    "keyless": Image(
        "localhost/voicepool-agent-keyless:dev",
        "agent-image/Dockerfile",
        "keyless",
        (*_AGENT_SOURCES, "agent-image/requirements-keyless.txt", "agent-image/bots"),
        50,
    ),
}
LIVEKIT = "localhost/livekit-server:dev"
ALL = ("base", "operator", "agent", "keyless", "livekit")
NAMES = (*(image.name for image in IMAGES.values()), LIVEKIT)
"""The names of all images that run in a cluster."""


def hash_of(parts: Mapping[str, bytes]) -> str:
    """Sixteen hexadecimal digits that change with any name or content."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name}\0{len(parts[name])}\0".encode())
        digest.update(parts[name])
    return digest.hexdigest()[:16]


def source_files(root: Path, sources: Iterable[str]) -> dict[str, bytes]:
    """The content of all files below the sources, by their name from the root. Byte-code is not a source."""
    files: dict[str, bytes] = {}
    for source in sources:
        path = root / source
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                files[str(file.relative_to(root))] = file.read_bytes()
    return files


def pip_configuration(lines: Iterable[str]) -> str:
    """A pip.conf for the build from what `pip config list` says of this machine, certificates by the name that they have there.

    Folders of this machine (`find-links`) mean nothing inside the build and are left out.
    """
    settings = {"cert": "/run/secrets/certificates"}
    for line in lines:
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in ("global", ":env:") and name in (
            "index-url",
            "extra-index-url",
            "trusted-host",
            "proxy",
            "timeout",
            "default-timeout",
        ):
            settings[name.removeprefix("default-")] = value.strip().strip("'\"").replace("\\n", " ")
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items())


def certificates(environment: Mapping[str, str]) -> Path:
    """The certificate bundle that this machine trusts."""
    named = environment.get("SSL_CERT_FILE") or environment.get("PIP_CERT")
    return Path(named) if named else Path("/etc/ssl/certs/ca-certificates.crt")


class Builder:
    """Docker or buildah, with the few verbs that are needed here.

    Args:
        program: `docker` or `buildah`.
    """

    def __init__(self, program: str) -> None:
        self.program = program

    def inputs_of(self, name: str) -> str:
        """The hash in an image's label; empty when there is no such image or label."""
        if self.program == "docker":
            command = ["docker", "image", "inspect", "--format", f'{{{{index .Config.Labels "{LABEL}"}}}}', name]
            return run(*command).strip() if succeeds("docker", "image", "inspect", name) else ""
        if not succeeds("buildah", "inspect", "--type", "image", name):
            return ""
        described = json.loads(run("buildah", "inspect", "--type", "image", name))
        return str((described["OCIv1"]["config"].get("Labels") or {}).get(LABEL, ""))

    def build(
        self, name: str, dockerfile: Path, context: Path, *, inputs: str, target: str = "", base: str = ""
    ) -> None:
        """Build an image.

        Raises:
            ClusterError: with the last lines of the build.
        """
        command = [
            self.program,
            "build",
            "--quiet",
            "--file",
            str(dockerfile),
            "--tag",
            name,
            "--label",
            f"{LABEL}={inputs}",
        ]
        if self.program == "buildah":
            # A build that fails leaves its container behind otherwise.
            command += ["--isolation", "chroot", "--layers", "--force-rm"]
        if target:
            command += ["--target", target]
        if base:
            command += ["--build-arg", f"BASE_IMAGE={base}"]
        with tempfile.TemporaryDirectory(prefix="voicepool-") as folder:
            configuration = Path(folder, "pip.conf")
            listed = (
                run(sys.executable, "-m", "pip", "config", "list")
                if succeeds(sys.executable, "-m", "pip", "--version")
                else ""
            )
            configuration.write_text(pip_configuration(listed.splitlines()))
            command += ["--secret", f"id=pip-configuration,src={configuration}"]
            command += ["--secret", f"id=certificates,src={certificates(os.environ)}"]
            run(
                *command,
                str(context),
                deadline_seconds=BUILD_DEADLINE_SECONDS,
                do=f"mend what the last lines say; the build was: {dockerfile}",
            )

    def read(self, name: str, path: str) -> str:
        """The text of a file of an image."""
        if self.program == "docker":
            return run("docker", "run", "--rm", "--entrypoint", "cat", name, path)
        container = run("buildah", "from", name).strip()
        try:
            return run("buildah", "run", "--isolation", "chroot", container, "--", "cat", path)
        finally:
            run("buildah", "rm", container)

    def remove(self, name: str) -> None:
        """Remove an image."""
        run(self.program, *(["image", "rm"] if self.program == "docker" else ["rmi"]), name)

    def size_bytes(self, name: str) -> int:
        """Size of an image, unpacked."""
        if self.program == "docker":
            return int(run("docker", "image", "inspect", "--format", "{{.Size}}", name))
        found = json.loads(run("buildah", "images", "--json", name))
        # buildah rounds to three digits, in decimal units.
        number, unit = found[0]["size"].split()
        return round(float(number) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}[unit.upper()])


def choose_builder(progress: Progress) -> Builder:
    """Docker where an engine answers, else buildah, installed from the distribution when it is missing.

    Raises:
        ClusterError: neither can be had.
    """
    if shutil.which("docker") and succeeds("docker", "info"):
        return Builder("docker")
    if shutil.which("buildah") is None:
        if os.geteuid() != 0:
            raise ClusterError(
                "no Docker engine answers and buildah is not installed",
                "start Docker, or as root: apt-get install buildah",
            )
        install(progress, ["buildah"], 25)
    return Builder("buildah")


def build_all(progress: Progress, which: Sequence[str] = ALL, base: str = "") -> dict[str, int]:
    """Build the images whose inputs have changed; what does not compete runs side by side.

    Args:
        progress: told about each long step.
        which: names out of `ALL`.
        base: the Python base image. Default: the Dockerfiles' own with Docker, one made from the distribution with buildah.

    Returns:
        The size of each image, unpacked, in bytes.

    Raises:
        ClusterError: a build failed.
    """
    builder = choose_builder(progress)
    with (
        locked(
            cache_folder(os.environ) / "images.lock",
            BUILD_DEADLINE_SECONDS,
            lambda: progress.say("waiting for another build of images to end"),
        ),
        ThreadPoolExecutor(2) as pool,
    ):
        # Compiling needs the processor, the others mostly network and disk.
        compiled = pool.submit(_build_livekit, builder, progress) if "livekit" in which else None
        if not base and builder.program == "buildah":
            base = BASE
            _build_base(builder, progress)
        for key, image in IMAGES.items():
            if key in which:
                _build_image(builder, image, base, progress)
        if compiled is not None:
            compiled.result()
    names = [image.name for key, image in IMAGES.items() if key in which] + ([LIVEKIT] if "livekit" in which else [])
    return {name: builder.size_bytes(name) for name in names}


def sbom_of(image: Image) -> Path:
    """Where the copy of an image's bill of materials lies."""
    name = image.name.rpartition("/")[2].partition(":")[0]
    return cache_folder(os.environ) / "sbom" / f"{name}.cdx.json"


def _build_image(builder: Builder, image: Image, base: str, progress: Progress) -> None:
    parts = source_files(ROOT, image.sources)
    parts["base"] = (builder.inputs_of(base) or base).encode()
    inputs = hash_of(parts)
    sbom = sbom_of(image)
    if builder.inputs_of(image.name) == inputs and sbom.exists():
        return
    with progress.step(f"building {image.name} with {builder.program}", image.expected_seconds):
        builder.build(image.name, ROOT / image.dockerfile, ROOT, inputs=inputs, target=image.target, base=base)
        sbom.parent.mkdir(parents=True, exist_ok=True)
        sbom.write_text(builder.read(image.name, SBOM))


def _build_base(builder: Builder, progress: Progress) -> None:
    inputs = hash_of(
        {
            "suite": SUITE.encode(),
            "packages": " ".join(BASE_PACKAGES).encode(),
            "without": " ".join(NOT_IN_BASE).encode(),
        }
    )
    if builder.inputs_of(BASE) == inputs:
        return
    if os.geteuid() != 0:
        raise ClusterError(
            "making the Python base image from the distribution needs root",
            "run this as root, or name an image with --base",
        )
    if shutil.which("debootstrap") is None:
        install(progress, ["debootstrap"], 10)
    with _folder("base") as folder, progress.step(f"making the Python base image from Debian {SUITE}", 75):
        system = folder / "system"
        run(
            "debootstrap",
            "--variant=minbase",
            f"--include={','.join(BASE_PACKAGES)}",
            SUITE,
            str(system),
            deadline_seconds=BUILD_DEADLINE_SECONDS,
            do="see whether apt-get update works on this machine; debootstrap uses the same packages",
        )
        context = folder / "context"
        context.mkdir()
        with tarfile.open(context / "system.tar", "w") as archive:
            archive.add(system, ".", filter=lambda entry: None if _is_left_out(entry.name) else entry)
        (context / "Dockerfile").write_text('FROM scratch\nADD system.tar /\nCMD ["python3"]\n')
        builder.build(BASE, context / "Dockerfile", context, inputs=inputs)


def _is_left_out(name: str) -> bool:
    """Whether a file of the distribution lies in a folder that the base image only has empty."""
    path = name.removeprefix("./")
    return any(path.startswith(folder + "/") for folder in NOT_IN_BASE)


def _build_livekit(builder: Builder, progress: Progress) -> None:
    server = programs(progress).livekit_server
    inputs = hash_of({"server": hashlib.sha256(server.read_bytes()).digest()})
    if builder.inputs_of(LIVEKIT) == inputs:
        return
    with _folder("livekit") as context, progress.step(f"building {LIVEKIT} with {builder.program}", 5):
        shutil.copy(server, context / "livekit-server")
        (context / "Dockerfile").write_text(
            'FROM scratch\nCOPY livekit-server /livekit-server\nUSER 65532:65532\nENTRYPOINT ["/livekit-server"]\n'
        )
        builder.build(LIVEKIT, context / "Dockerfile", context, inputs=inputs)


@contextmanager
def _folder(purpose: str) -> Iterator[Path]:
    """A folder for large files, on disk and not in memory."""
    where = cache_folder(os.environ)
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{purpose}-", dir=where) as name:
        yield Path(name)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster.images", description="Builds voicepool's container images."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build what has changed, and print sizes")
    build.add_argument("images", nargs="*", metavar="IMAGE", help=f"out of: {' '.join(ALL)} (default: all)")
    build.add_argument("--base", default="", help="the Python base image to build on")
    options = parser.parse_args(arguments)
    unknown = set(options.images) - set(ALL)
    if unknown:
        parser.error(f"no such image: {' '.join(sorted(unknown))}; there are: {' '.join(ALL)}")
    progress = Progress()
    try:
        sizes = build_all(progress, options.images or ALL, options.base)
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    for name, size in sizes.items():
        print(f"{name:45} {size / 1e6:6.0f} MB unpacked")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
