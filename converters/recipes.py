"""Recipes: facts about public reward models that no file of theirs holds, as settings of a conversion.

The table is `recipes.yaml`. A recipe only sets options that a user could set.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from conch.config import Section
from conch.converters.options import ReadOptions
from conch.errors import ConversionError

_TABLE = Path(__file__).parent / "recipes.yaml"


class Recipe(Section):
    """Facts about one family of public models."""

    models: tuple[str, ...] = Field(min_length=1)
    """Hub ids that the facts are of."""

    source: str
    """Where they were read, and when."""

    options: dict[str, Any]
    """Fields of `ReadOptions`."""

    note: str = ""
    """What else a user must know or give."""

    automatic: bool = True
    """Whether the hub id of one of the models takes this recipe. Not where another reading is right as
    well."""


class RecipeTable(Section):
    """All recipes."""

    version: int
    """Goes up with every change of a fact."""

    recipes: dict[str, Recipe]
    """Name -> recipe."""


@functools.cache
def recipe_table() -> RecipeTable:
    """Return the table."""
    return RecipeTable.model_validate(yaml.safe_load(_TABLE.read_text(encoding="utf-8")))


def recipe_version(name: str) -> str:
    """Return a recipe's name with the version of its table, for the manifest."""
    return f"{name}@{recipe_table().version}"


def with_recipe(settings: Mapping[str, Any], checkpoint: str = "") -> dict[str, Any]:
    """Return settings of a conversion with those of their recipe; a setting that is given wins.

    checkpoint: whose hub id has a recipe, where the settings name none.

    Raises:
        ConversionError: there is no recipe of this name, or the checkpoint is called like a model that has
            one, and nobody says whether it is that model.
    """
    name, recipes = settings.get("recipe"), recipe_table().recipes
    if name is None:
        name = recipe_for(checkpoint)
        name = name if name is not None and recipes[name].automatic else None
        if name is not None and not _is_id_of(checkpoint, recipes[name]):
            raise ConversionError(
                f"{checkpoint} is called like a public model whose score needs facts that no file of it "
                f"holds: add --recipe {name} if it is that model, else --recipe none"
            )
    if name in (None, "none"):
        return {key: value for key, value in settings.items() if key != "recipe"}
    if name not in recipes:
        near = difflib.get_close_matches(str(name), recipes, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ConversionError(f"there is no recipe {name!r}{meant}; --recipe list lists them")
    return {**_left_open(recipes[name].options, settings), **settings, "recipe": name}


def _left_open(options: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a recipe without those that belong to a choice that is made otherwise."""
    dropped: tuple[str, ...] = ("pooling_token",) if settings.get("pooling", "token") != "token" else ()
    if settings.get("granularity") == "token":
        dropped += ("step_separator", "step_delimiter", "steps_apart")
    return {name: value for name, value in options.items() if name not in dropped}


def recipe_for(checkpoint: str) -> str | None:
    """Return the recipe whose models have this hub id, or this name of a folder; None where there is none."""
    last = _last(checkpoint)
    for name, recipe in recipe_table().recipes.items():
        if last and any(last == _last(model) for model in recipe.models):
            return name
    return None


def _is_id_of(checkpoint: str, recipe: Recipe) -> bool:
    is_here = Path(checkpoint).expanduser().exists()
    return not is_here and any(checkpoint.lower() == model.lower() for model in recipe.models)


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def recipe_list() -> str:
    """List the recipes for people: name, models, the options that they set, source."""
    table = recipe_table()
    lines = [
        f"recipes, version {table.version}; each sets options of `conch convert`, and one that you give wins"
    ]
    for name, recipe in sorted(table.recipes.items()):
        lines += ["", name, f"  models   {', '.join(recipe.models)}"]
        lines += [f"  {option:<22} {_short(value)}" for option, value in recipe.options.items()]
        lines += [f"  note     {recipe.note}"] if recipe.note else []
        lines += [f"  source   {recipe.source}"]
    return "\n".join(lines)


def _short(value: Any, most: int = 70) -> str:
    text = (
        " ".join(value) if isinstance(value, list) else repr(value) if isinstance(value, str) else str(value)
    )
    return text if len(text) <= most else f"{text[: most - 3]}..."


def check_table() -> None:
    """Raise ConversionError where a recipe sets what is no option, or a value that none takes."""
    for name, recipe in recipe_table().recipes.items():
        try:
            ReadOptions.model_validate(recipe.options)
        except ValidationError as error:
            raise ConversionError(f"recipe {name}: {error}") from error
