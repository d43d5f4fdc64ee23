"""Settings for commands: read as the node agent reads them, with errors that name the setting."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from vcnode.cli.exits import UsageError
from vcnode.models.violations import violations_of
from vcnode.settings import Settings


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """*flags* without those that were not given, groups included."""
    kept = {
        name: given(value) if isinstance(value, Mapping) else value
        for name, value in flags.items()
        if value is not None
    }
    return {name: value for name, value in kept.items() if value != {}}


def load(file: Path | None, **flags: Any) -> Settings:
    """Read *file* and the environment, with *flags* on top (None counts as not given, in groups too).

    Raises:
        UsageError: The file cannot be read, or a value is wrong; all wrong settings are listed.
    """
    try:
        return Settings.load(file, **given(flags))
    except ValidationError as exc:
        raise invalid("The settings are wrong.", exc, Settings) from exc
    except tomllib.TOMLDecodeError as exc:
        raise UsageError(f"{file} is not TOML: {exc}.") from exc
    except OSError as exc:
        raise UsageError(f"Cannot read the settings: {exc}") from exc


def invalid(message: str, error: ValidationError, model: type[BaseModel] | None = None) -> UsageError:
    """*error* as ours: one entry for each wrong field, under the name that the user wrote."""
    violations = [{**found, "field": found["field"] or "(all)"} for found in violations_of(error, model)]
    return UsageError(message, violations=violations)
