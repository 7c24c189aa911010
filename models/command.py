"""`mutoscope models ...`: what checkpoints are, before they are deployed."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from models.catalog import add_to_manifest, load_model, read_manifest, write_manifest
from models.probe import Found, NotRecognised, find_all, probe
from models.published_manifest import published_manifest
from models.request import CacheBy, InvalidRequest
from models.source import HubSource, Source, SourceUnavailable, in_cache, parse_source
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
        ("memory", _write_memory, "find out what a checkpoint takes of memory, for its manifest"),
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
    command = actions.add_parser(
        "fetch",
        help="bring a checkpoint into a cache, as the cluster does",
        description=f"Goes on where an earlier one was interrupted. {EXIT_CODES}",
    )
    command.add_argument(
        "source", type=_source, metavar="SOURCE", help="s3://bucket/key or hf://owner/name"
    )
    command.add_argument("cache", type=Path, metavar="CACHE", help="the cluster's model_cache")
    command.set_defaults(run=_fetch)
    command = actions.add_parser("pin", help="tell the commit that a repository of a hub is at")
    command.add_argument(
        "source", type=_hub_source, metavar="SOURCE", help="hf://owner/name[@revision][/path]"
    )
    command.set_defaults(run=_pin)
    command = actions.add_parser(
        "measure",
        help="tell what skipped passes cost in quality, and have the API tell it",
        description="Makes each video with all passes and without, and writes the PSNR between "
        f"the two into the manifest. {EXIT_CODES}",
    )
    command.add_argument("path", type=Path, metavar="PATH")
    command.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="or several")
    command.add_argument("--image", type=Path, metavar="FILE", help="a PNG of the default size")
    command.add_argument("--steps", type=int, metavar="N")
    command.add_argument("--step-cache", type=float, metavar="T", help="its threshold")
    command.add_argument("--by", choices=list(CacheBy), default=CacheBy.PREDICTION)
    command.add_argument("--warm-up", type=int, default=4, metavar="N")
    command.add_argument("--cfg-skip", type=float, metavar="R", help="the cfg_skip_ratio")
    command.set_defaults(run=_measure)


def _measure(arguments: argparse.Namespace) -> None:
    way: dict[str, Any] = {}
    if arguments.step_cache is not None:
        names = {"threshold": arguments.step_cache, "by": arguments.by}
        way["step_cache"] = {**names, "warm_up": arguments.warm_up}
    if arguments.cfg_skip is not None:
        way["cfg_skip_ratio"] = arguments.cfg_skip
    fields = {} if arguments.steps is None else {"num_steps": arguments.steps}
    image = None if arguments.image is None else arguments.image.read_bytes()

    def act(path: Path) -> None:
        from models.skipping_quality import SkippingQuality, write_measured  # torch

        prompts = arguments.prompt or [""]
        requests = [{**fields, "prompt": text, "seed": n} for n, text in enumerate(prompts)]
        measured = SkippingQuality(load_model(path)).measure(requests, way, image)
        write_measured(path, measured)
        print(measured.model_dump_json(exclude_none=True))

    _run(act, arguments)


def _inflate(arguments: argparse.Namespace) -> None:
    from models.inflate import inflate  # torch

    source: Path = arguments.path
    target: Path = arguments.out or source.with_name(f"{source.name}-video")
    _run(lambda path: inflate(path, target, arguments.licence), arguments)
    print(target)


def _fetch(arguments: argparse.Namespace) -> None:
    from models.fetch import fetch
    from models.hub_source import pin

    source: Source = arguments.source
    with _exit_codes():
        if isinstance(source, HubSource) and not source.is_pinned:
            source = pin(source)
        remote = in_cache(source, arguments.cache)
        fetch(remote)
    print(f"{source} {remote.path}")


def _pin(arguments: argparse.Namespace) -> None:
    from models.hub_source import pin

    with _exit_codes():
        print(pin(arguments.source))


def _source(text: str) -> Source:
    try:
        source = parse_source(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if source is None:
        raise argparse.ArgumentTypeError(f"{text} is a path of this machine")
    return source


def _hub_source(text: str) -> HubSource:
    source = _source(text)
    if not isinstance(source, HubSource):
        raise argparse.ArgumentTypeError(f"{text} is not of a hub")
    return source


def _run(act: Callable[[Path], None], arguments: argparse.Namespace) -> None:
    with _exit_codes():
        act(arguments.path)


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except (
        WeightsMissing,
        WeightsDamaged,
        SourceUnavailable,
        InvalidRequest,
        NotRecognised,
        OSError,
    ) as error:
        print(f"mutoscope: {error}", file=sys.stderr)
        sys.exit(UNKNOWN if isinstance(error, NotRecognised) else AT_FAULT)


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
    write_manifest(path, published_manifest(path))
    print(path / "manifest.json")


def _write_memory(path: Path) -> None:
    from models.memory_profile import profile_memory  # torch

    found = profile_memory(path, read_manifest(path))
    add_to_manifest(path, memory=found.model_dump(exclude_none=True))
    print(found.model_dump_json(exclude_none=True))


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
