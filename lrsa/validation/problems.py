"""A setting that cannot work, and one that hardly works as meant."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class ConfigError(ValueError):
    """One or more settings that cannot work, alone or together; the message lists them all."""


class ConfigWarning(UserWarning):
    """A setting that works, but hardly as meant."""


def raised(where: str, function: Callable[[], object]) -> list[str]:
    """The error of ``function`` as a problem, if it raises one that the user can put right."""
    try:
        function()
    except (ValueError, FileNotFoundError) as error:
        return [f"{where}: {error}" if where else str(error)]
    return []


def report(problems: Sequence[str]) -> None:
    """Raises ConfigError with all of them, if there are any."""
    if problems:
        raise ConfigError(
            "\n".join([f"{len(problems)} setting(s) cannot work:", *(f"  - {line}" for line in problems)])
        )
