"""The recipe's section on custom stages: a user's own classes, run beside ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field, field_validator

from pipelines.recipe_sections.data import Name, Section

# Folders of a store that are no stages.
RESERVED = ("custom", "jobs", "logs", "mlflow", "runs")
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class CustomStage(Section):
    """A stage of the user's own.

    `class` is `package.module:Class`, see `pipelines.stages.custom`. `needs` names stages of this
    recipe, `embed` every encoder's. `config` is what the class gets as its `config`. `path` is the
    directory that the module is imported from, on every node; a recipe file's own if not given.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    class_path: str = Field(alias="class")
    needs: tuple[str, ...] = ()
    config: Mapping[str, Any] = {}
    path: str = ""

    @field_validator("class_path")
    @classmethod
    def _is_module_and_class(cls, value: str) -> str:
        if not _CLASS.fullmatch(value):
            raise ValueError(f"must be `package.module:Class`, got {value!r}")
        return value


def check_names(stages: Mapping[Name, CustomStage], taken: tuple[str, ...]) -> None:
    """Raise ValueError if a custom stage has the name of another folder of the store."""
    for name in stages:
        if name in taken:
            raise ValueError(f"{name!r} is a stage of ours; take another name")
        if name in RESERVED:
            raise ValueError(
                f"{name!r}: the store keeps other things in a folder of that name; take another"
            )
