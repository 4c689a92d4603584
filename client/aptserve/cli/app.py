"""The command tree and the one place where errors become a line and an exit code."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from typer.exceptions import TyperException

from aptserve.cli.commands import bench, client, demo, operate, serve, simulate
from aptserve.cli.problems import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, CommandError
from aptserve.errors import AptServeError, InvalidArgumentError

_FLAGS = {
    "text": "PROMPT",
    "prompt": "PROMPT",
    "stop_strings": "--stop",
    "request_ids": "REQUEST_ID",
}


def _help_text(command: Callable[..., None]) -> str:
    """A docstring for a screen of any width: paragraphs without line breaks, except examples."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(p if "\n  " in p else p.replace("\n", " ") for p in paragraphs)


app = typer.Typer(
    name="aptserve",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for panel, commands in {
    "Serve": (serve.up, serve.scheduler, serve.worker),
    "Use": (client.generate, demo.demo),
    "Measure": (bench.bench, simulate.simulate),
    "Operate": (operate.status, operate.watch, operate.health, operate.abort, operate.drain),
}.items():
    for command in commands:
        app.command(help=_help_text(command), rich_help_panel=panel)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"aptserve {version('apt-serve')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def aptserve(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """Serve a language model with a hybrid cache and adaptive scheduling.

    [bold]Start[/]
      aptserve up
    [bold]Then, in another terminal[/]
      aptserve generate "def fibonacci(n):"
      aptserve status --watch
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; every expected failure is one line."""
    command = typer.main.get_command(app)
    try:
        return int(command.main(arguments, prog_name="aptserve", standalone_mode=False) or 0)
    except TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "aptserve"
        message = " ".join(error.format_message().split()).rstrip(".")
        return _report(f"{path}: {message} (see {path} --help)", error.exit_code)
    except CommandError as error:
        return _report(f"aptserve: {error}", error.exit_code)
    except InvalidArgumentError as error:
        return _report(f"aptserve: {_flag(error.field)}: {error.description}", EXIT_USAGE)
    except AptServeError as error:
        return _report(f"aptserve: {error.message}", EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _flag(field: str) -> str:
    """The flag or argument that a field of a request comes from."""
    name = field.rpartition(".")[2]
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def _report(message: str, exit_code: int) -> int:
    print(message, file=sys.stderr)
    return exit_code
