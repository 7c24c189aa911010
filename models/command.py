"""`mutoscope models ...`: what checkpoints are, before they are deployed."""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from models.probe import Found, NotRecognised, find_all, probe
from models.published_manifest import published_manifest
from models.spec import WeightsDamaged, WeightsMissing

AT_FAULT, UNKNOWN = 1, 2
EXIT_CODES = "Exits with 1 for what is damaged or missing, with 2 for what is not recognised."


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Found by the `mutoscope` command through an entry point."""
    group = commands.add_parser("models", help="look at checkpoints on this machine")
    actions = group.add_subparsers(required=True, metavar="ACTION")
    for name, act, text in (
        ("probe", _probe, "tell what a folder or a safetensors file is"),
        ("validate", _validate, "check that a checkpoint is whole and may be deployed"),
        ("list", _list, "all checkpoints below a folder"),
        ("manifest", _write_manifest, "write the manifest of a checkpoint as it was published"),
    ):
        command = actions.add_parser(name, help=text, description=f"{text}. {EXIT_CODES}")
        command.add_argument("path", type=Path, metavar="PATH")
        command.set_defaults(run=partial(_run, act))
    command = actions.add_parser(
        "inflate",
        help="make a video checkpoint, untrained, of a Z-Image image checkpoint",
        description=f"The result is marked `trained: false`. {EXIT_CODES}",
    )
    command.add_argument("path", type=Path, metavar="IMAGE_CHECKPOINT")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="default: beside it, -video")
    command.add_argument("--licence", default="Apache-2.0", metavar="NAME", help="%(default)s")
    command.set_defaults(run=_inflate)


def _inflate(arguments: argparse.Namespace) -> None:
    from models.inflate import inflate  # torch

    source: Path = arguments.path
    target: Path = arguments.out or source.with_name(f"{source.name}-video")
    _run(lambda path: inflate(path, target, arguments.licence), arguments)
    print(target)


def _run(act: Callable[[Path], None], arguments: argparse.Namespace) -> None:
    try:
        act(arguments.path)
    except (WeightsMissing, WeightsDamaged, OSError) as error:
        print(f"mutoscope: {error}", file=sys.stderr)
        sys.exit(AT_FAULT)
    except NotRecognised as error:
        print(f"mutoscope: {error}", file=sys.stderr)
        sys.exit(UNKNOWN)


def _probe(path: Path) -> None:
    found = probe(path)
    print(json.dumps({"type": found.type, "base": found.base, **found.details}))


def _validate(path: Path) -> None:
    """Of a deployable folder all that a deploy checks; of others, that they are whole and known."""
    found = probe(path)
    if path.is_dir() and not any(path.rglob("*.safetensors")):
        raise WeightsMissing(str(path / "*.safetensors"))
    has_manifest = (path / "manifest.json").is_file()
    use = "deployable" if has_manifest else "no manifest.json, so not deployable"
    print(f"{path}: whole, a {found.base} {found.type}; {use}")


def _write_manifest(path: Path) -> None:
    content = json.dumps(published_manifest(path), indent=2)
    (path / "manifest.json").write_text(content + "\n")
    print(path / "manifest.json")


def _list(path: Path) -> None:
    if not path.is_dir():
        raise NotRecognised(path, "not a folder")
    at_fault = False
    for found in find_all(path):
        if not isinstance(found, Found):
            print(f"mutoscope: {found}", file=sys.stderr)
            at_fault = True
            continue
        details = " ".join(f"{name}={value}" for name, value in found.details.items())
        print(f"{found.path}\t{found.type}\t{found.base}\t{details}")
    if at_fault:
        sys.exit(AT_FAULT)
