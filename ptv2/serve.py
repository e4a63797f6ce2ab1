"""`ptv2 demo`: find the playground in the repository and start it, without the seconds that importing torch takes."""

import argparse
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from ptv2.errors import InputError

DESCRIPTION = "Serve the playground: ask about a text and compare what the methods answer."


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--runs", type=Path, help="offer the runs in this directory, too, newest first")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860 on)")
    parser.add_argument("--share", action="store_true", help="open a public link through Gradio's servers")
    parser.add_argument("--mcp", action="store_true", help="also serve the API as tools for language models")


def serve(options: argparse.Namespace) -> None:
    """Serve until Ctrl-C.

    Raises:
        InputError: the playground or what it needs is not there, or an option is no use.
    """
    root = Path(__file__).parent.parent
    if not (root / "demo" / "app.py").is_file():
        raise InputError(f"The playground is not in {root}: it comes with the repository, clone that.")
    if find_spec("gradio") is None:
        raise InputError("The playground needs Gradio: pip install 'ptv2[demo]'.")
    if options.port is not None and not 0 < options.port < 65536:
        raise InputError(f"The port is {options.port}; it must be 1 to 65535.")
    if options.runs is not None and not options.runs.is_dir():
        raise InputError(f"{options.runs} is not a directory of runs: make one, or leave --runs out.")
    _check_address(options.host, options.port or 0)
    sys.path.insert(0, str(root))
    from demo import app

    app.serve(options.runs, options.host, options.port, options.share, options.mcp)


def _check_address(host: str, port: int) -> None:
    """Raise InputError where nothing can listen there; Gradio would try for minutes."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise InputError(f"The playground cannot listen on {host}{f':{port}' if port else ''}: {error.strerror or error}.") from error


def main() -> int:
    """The command alone; returns its exit status."""
    parser = argparse.ArgumentParser(prog="ptv2 demo", description=DESCRIPTION, allow_abbrev=False)
    add_options(parser)
    try:
        serve(parser.parse_args(sys.argv[2:]))
    except InputError as error:
        print(f"ptv2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0
