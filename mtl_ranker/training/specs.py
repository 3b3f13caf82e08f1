"""The models of a project as specifications; without torch, as commands check them at once."""

from __future__ import annotations

from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.models.presets import make
from mtl_ranker.models.spec import RankerSpec


def model_specs(project: Project) -> dict[str, RankerSpec]:
    """Each `[models.*]` as a specification. Raises ProjectError naming the key."""
    try:
        return {
            name: make(f"models.{name}", settings, len(project.objectives), project.features.groups)
            for name, settings in project.models.items()
        }
    except ValueError as error:
        raise ProjectError(str(error)) from error
