"""Read shop.toml, with the keys of the preset that it names."""

import difflib
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from services.core.errors import FieldViolation, InvalidArgument
from training.data.config import ShopConfig
from training.data.presets import PRESETS

_TRAINING = ("split", "text", "image", "graph", "sequence", "taste", "ranking", "propensity")


def read_settings(path: Path | None) -> ShopConfig:
    """Read a shop.toml; the defaults when there is none.

    Raises:
        InvalidArgument: names the file and the key.
    """
    return ShopConfig() if path is None else _validate_file(path, {}, preset=True)


def with_training(settings: ShopConfig, path: Path) -> ShopConfig:
    """The settings, overridden by the training sections of a TOML file.

    Raises:
        InvalidArgument: names the file and the key.
    """
    return _validate_file(path, settings.model_dump(exclude_unset=True), _TRAINING)


def _validate_file(
    path: Path, values: dict[str, Any], sections: Collection[str] | None = None, *, preset: bool = False
) -> ShopConfig:
    """The settings of the file over `values`, or over its preset; `sections` limits its sections."""
    try:
        # Windows editors begin a file with a byte order mark.
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        if sections is not None and (unknown := sorted(document.keys() - set(sections))):
            allowed = ", ".join(sections)
            raise InvalidArgument.of(f"{path.name}: {unknown[0]}", f"must be one of {allowed}")
        _check_sections(path, document)
        if preset and (name := document.get("source", {}).get("preset", "")):
            values = _preset_settings(path, name)
        for name, section in document.items():
            values[name] = {**values.get(name, {}), **section}
        return ShopConfig.model_validate(values)
    except OSError as error:
        raise InvalidArgument.of(str(path), f"cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument.of(str(path), f"is not valid TOML: {error}") from None
    except ValidationError as error:
        raise InvalidArgument(
            FieldViolation(f"{path.name}: {'.'.join(map(str, e['loc'])) or 'event_types'}", _problem(e))
            for e in error.errors()
        ) from None


def _check_sections(path: Path, document: dict[str, Any]) -> None:
    """Raise InvalidArgument for a name that is no section, and for a section that is no table."""
    for name, section in document.items():
        if name not in ShopConfig.model_fields:
            raise InvalidArgument.of(f"{path.name}: {name}", _unknown(name, ShopConfig))
        if not isinstance(section, dict):
            raise InvalidArgument.of(
                f"{path.name}: {name}",
                f"is a section, not {section!r}: write [{name}] on a line of its own and its keys below",
            )


def _problem(error: Any) -> str:
    """The message of a pydantic error."""
    *parents, name = error["loc"] or ("",)
    if error["type"] != "extra_forbidden" or not parents:
        return str(error["msg"]).removeprefix("Value error, ")
    return _unknown(name, type(getattr(ShopConfig(), parents[0])))


def _unknown(name: str, model: type[BaseModel]) -> str:
    suggestions = difflib.get_close_matches(name, list(model.model_fields), n=2)
    return (
        f"unknown; did you mean {' or '.join(suggestions)}?"
        if suggestions
        else (f"unknown; known keys are {', '.join(model.model_fields)}")
    )


def _preset_settings(path: Path, name: object) -> dict[str, Any]:
    if not isinstance(name, str) or name not in PRESETS:
        names = ", ".join(PRESETS)
        raise InvalidArgument.of(f"{path.name}: source.preset", f"{name!r} is not one of {names}")
    return {section: dict(keys) for section, keys in PRESETS[name].settings.items()}
