"""The `mutoscope` command."""

import argparse
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import httpx

from client.accounts import add_account_commands
from client.client import ApiError, Client, NotConfigured, find_server
from client.generate import GenerationFailed, generate


def main() -> None:
    """Parse, run, and turn expected faults into one line."""
    arguments = _parser().parse_args()
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ApiError, NotConfigured, GenerationFailed) as error:
        sys.exit(f"mutoscope: {error}")
    except httpx.TransportError as error:
        sys.exit(f"mutoscope: cannot reach the server: {error}")
    except OSError as error:
        sys.exit(f"mutoscope: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mutoscope", description="Make videos from prompts.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("generate", help="make one video and save it")
    command.add_argument("prompt")
    command.add_argument("--out", type=Path, metavar="FILE", help="default: out/<video-id>.mp4")
    command.add_argument("--model")
    command.add_argument("--frames", type=int, dest="num_frames", metavar="N")
    command.add_argument("--size", metavar="WxH")
    command.add_argument("--fps", type=int, metavar="N")
    command.add_argument("--steps", type=int, dest="num_steps", metavar="N")
    command.add_argument("--f-patch", type=int, dest="f_patch_size", metavar="N")
    command.add_argument("--guidance", type=float, dest="guidance_scale", metavar="G")
    command.add_argument("--negative-prompt", metavar="TEXT")
    command.add_argument("--seed", type=int, metavar="N")
    command.add_argument("--scheduler", metavar="NAME")
    command.add_argument(
        "--step-cache",
        type=_step_cache,
        metavar="T[:BY]",
        help="skip steps that would change the prediction by less than T (0.05)",
    )
    command.add_argument(
        "--cfg-skip",
        type=float,
        dest="cfg_skip_ratio",
        metavar="R",
        help="no negative prompt in that share of the steps, the last ones",
    )
    command.add_argument(
        "--free-noise",
        type=_windows,
        metavar="LENGTH:STRIDE",
        help="more frames than animatediff makes at once, in windows (16:4)",
    )
    command.add_argument("--motion-bucket", type=int, dest="motion_bucket_id", metavar="N")
    command.add_argument(
        "--lora", type=_lora, action="append", dest="loras", metavar="NAME[=WEIGHT]"
    )
    command.add_argument("--image", type=Path, metavar="FILE", help="start from this picture")
    command.add_argument("--control", metavar="TYPE", help="what the --control-file shows")
    command.add_argument(
        "--control-file", type=Path, metavar="FILE", help="lead the video by this picture or video"
    )
    command.add_argument("--control-scale", type=float, metavar="S", help="0 to 2")
    command.add_argument(
        "--find-edges", action="store_true", help="lead by the file's edges (--control canny)"
    )
    command.set_defaults(run=_generate)
    add_account_commands(commands)
    # What is of use only where the server is installed, too: the client knows none of it.
    for added in entry_points(group="mutoscope.commands"):
        added.load()(commands)
    return parser


def _lora(text: str) -> dict[str, Any]:
    name, _, weight = text.partition("=")
    return {"name": name, "weight": float(weight)} if weight else {"name": name}


def _step_cache(text: str) -> dict[str, Any]:
    threshold, _, by = text.partition(":")
    return {"threshold": float(threshold), **({"by": by} if by else {})}


def _windows(text: str) -> dict[str, Any]:
    length, _, stride = text.partition(":")
    return {"context_length": int(length), **({"context_stride": int(stride)} if stride else {})}


def _generate(arguments: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    of_control = {
        "type": given.pop("control", None),
        "scale": given.pop("control_scale", None),
        "preprocess": given.pop("find_edges") or None,
    }
    control = {name: value for name, value in of_control.items() if value is not None}
    files = {name: given.pop(name, None) for name in ("image", "control_file", "out")}
    fields = {name: value for name, value in given.items() if name != "run"}
    with Client(find_server()) as client:
        generate(client, {**fields, **({"control": control} if control else {})}, **files)


if __name__ == "__main__":
    main()
