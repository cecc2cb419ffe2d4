"""The `torchax-ops` command: which operators there are, who carries them out and why, and whether the installation works."""

from __future__ import annotations

import signal

import typer

from .commands import checks, coverage, explain, fit, listing, new_plugin, scan, tune
from .output import epilog

EPILOG = """\
Exit codes: 0 done; 1 a check did not hold; 2 wrong arguments or files.

Shell completion: torchax-ops --install-completion"""

app = typer.Typer(
    no_args_is_help=True,
    help=__doc__,
    epilog=epilog(EPILOG),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (coverage, listing, explain, scan, fit, tune, checks, new_plugin):
    module.register(app)


def main() -> None:
    """The entry point of the command."""
    if hasattr(signal, "SIGPIPE"):  # as other commands end when the reader, `head` say, has seen enough
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    app()


if __name__ == "__main__":
    main()
