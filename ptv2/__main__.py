"""`ptv2` and `python -m ptv2`, which `accelerate launch -m ptv2` needs."""

import sys


def main() -> int:
    """Run a command and return its exit status."""
    if sys.argv[1:2] == ["demo"]:  # its first page shall not wait for what the other commands import
        from ptv2.serve import main
    else:
        from ptv2.cli import main
    return main()


if __name__ == "__main__":
    sys.exit(main())
