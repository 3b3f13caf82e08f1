"""The models of a project as specifications; without torch, as commands check them at once."""

from __future__ import annotations

from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.models.presets import linear, make
from mtl_ranker.models.spec import RankerSpec

LINEAR = "linear"  # the name of the linear model beside the project's


def model_specs(project: Project) -> dict[str, RankerSpec]:
    """Each `[models.*]` as a specification. Raises ProjectError naming the key."""
    try:
        return {
            name: make(f"models.{name}", settings, len(project.objectives), project.features.groups)
            for name, settings in project.models.items()
        }
    except ValueError as error:
        raise ProjectError(str(error)) from error


def contender_specs(project: Project) -> dict[str, RankerSpec]:
    """The models that a full training compares: `model_specs` after a linear one, if none is."""
    specs = model_specs(project)
    if any(spec.linear for spec in specs.values()) or LINEAR in specs:
        return specs
    return {LINEAR: linear(len(project.objectives)), **specs}
