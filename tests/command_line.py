"""The command line as a user meets it: what it prints, and that a refusal is one line and a non-zero exit."""

from __future__ import annotations

from typer.testing import CliRunner

from paving.cli import app

runner = CliRunner()


def paving(*arguments):
    return runner.invoke(app, [str(a) for a in arguments])


def printed(*arguments) -> str:
    result = paving(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refused(*arguments) -> str:
    """The error line of a command that must fail, and print nothing else."""
    result = paving(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert result.stdout == "" and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1, result.stderr
    return errors[0]
