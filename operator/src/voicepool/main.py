"""The command line: ``voicepool operator``, ``voicepool gateway``, ``voicepool crd``, ``voicepool convert``.

The processes have no options; everything is settings (``VOICEPOOL_*``).
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from voicepool import __version__, logs
from voicepool.settings import GatewaySettings, OperatorSettings, SettingsError

EXIT_BAD_SETTINGS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 1 after a failure, 2 for a bad setting or argument."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except SettingsError as error:
        print(f"voicepool: {error}", file=sys.stderr)  # noqa: T201 - for a person, before there is a log
        return EXIT_BAD_SETTINGS
    except ModuleNotFoundError as error:
        if (error.name or "voicepool").partition(".")[0] == "voicepool":
            raise
        # What the commands need beyond the package itself is in an extra of it.
        print(f"voicepool: {error}; install the extra: voicepool[operator]", file=sys.stderr)  # noqa: T201 - as above
        return EXIT_BAD_SETTINGS
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="voicepool", description="Keeps voice agents warm on Kubernetes.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    operator = commands.add_parser(
        "operator", help="keep the pools at their targets; settings are VOICEPOOL_* variables"
    )
    operator.set_defaults(run=_operator)
    gateway = commands.add_parser("gateway", help="serve the session API; settings are VOICEPOOL_* variables")
    gateway.set_defaults(run=_gateway)
    crd = commands.add_parser("crd", help="print the CustomResourceDefinition")
    crd.add_argument(
        "--write", type=Path, nargs="+", metavar="FOLDER", help="write it to a file in each FOLDER instead"
    )
    crd.set_defaults(run=_crd)
    convert = commands.add_parser("convert", help="print a VoiceAgentPool made of a deployment of Pipecat Cloud")
    convert.add_argument("file", type=Path, nargs="?", default=Path("pcc-deploy.toml"), metavar="FILE")
    convert.add_argument("--name", help="of the pool; default: the file's agent_name")
    convert.add_argument("--image", help="of the agent; default: the file's image")
    convert.set_defaults(run=_convert)
    return parser


def _operator(options: argparse.Namespace) -> int:
    settings = OperatorSettings.from_environment(os.environ)
    logs.set_up(settings.log_level)
    # Each command imports what it needs: kopf alone costs half a second and 40 MiB.
    import uvloop

    from voicepool.kopf_app import run_operator
    from voicepool.kube.client import ConnectionSettingsError

    calm_garbage_collector()
    try:
        uvloop.run(run_operator(settings))
    except ConnectionSettingsError as error:
        raise SettingsError(str(error)) from None
    return 0


def _gateway(options: argparse.Namespace) -> int:
    settings = GatewaySettings.from_environment(os.environ)
    logs.set_up(settings.log_level)
    import uvloop

    from voicepool.gateway.server import run_gateway
    from voicepool.kube.client import ConnectionSettingsError

    calm_garbage_collector()
    try:
        uvloop.run(run_gateway(settings))
    except ConnectionSettingsError as error:
        raise SettingsError(str(error)) from None
    return 0


def calm_garbage_collector() -> None:
    """Have Python look for cycles less often, and not in what was imported. To be called once, after the imports.

    An API server's answer is thousands of objects without a cycle; by default each page of a list, and every few events, has the collector walk over them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _crd(options: argparse.Namespace) -> int:
    from voicepool import crd

    if options.write is None:
        sys.stdout.write(crd.to_yaml())
    else:
        for folder in options.write:
            (folder / crd.FILE_NAME).write_text(crd.to_yaml())
    return 0


def _convert(options: argparse.Namespace) -> int:
    from voicepool import pipecat_cloud

    try:
        text = options.file.read_text(encoding="utf-8")
        conversion = pipecat_cloud.convert(text, name=options.name, image=options.image)
    except OSError as error:
        return _wrong_file(f"{options.file}: {error.strerror}; name the file: voicepool convert FILE")
    except UnicodeDecodeError:
        return _wrong_file(f"{options.file}: it is not text in UTF-8; is this a {pipecat_cloud.FILE_NAME}?")
    except pipecat_cloud.ConversionError as error:
        return _wrong_file(f"{options.file}: {error}")
    for warning in conversion.warnings:
        print(f"voicepool: {options.file}: no counterpart: {warning}", file=sys.stderr)  # noqa: T201 - for a person
    sys.stdout.write(pipecat_cloud.as_yaml(conversion, options.file.name))
    return 0


def _wrong_file(words: str) -> int:
    print(f"voicepool: {words}", file=sys.stderr)  # noqa: T201 - for a person
    return EXIT_BAD_SETTINGS


if __name__ == "__main__":
    sys.exit(main())
