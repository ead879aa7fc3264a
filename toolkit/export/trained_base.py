"""Finds the very base that an artifact was trained on, and refuses any other."""

from __future__ import annotations

import logging
import pathlib
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from toolkit.adapters.configs import saved_settings
from toolkit.config.methods import AdapterMethod
from toolkit.config.schema import HeadSettings, ModelSettings
from toolkit.errors import AdapterError, Problem
from toolkit.export.artifact import Artifact, Manifest
from toolkit.families import Family, language_family
from toolkit.models.base import Base, resolve_base

logger = logging.getLogger(__name__)
METHOD: TypeAdapter[AdapterMethod] = TypeAdapter(Annotated[AdapterMethod, Field(discriminator="name")])


def resolve_trained_base(artifact: Artifact, *, base: str | None = None, force: bool = False) -> Base:
    """Return the base of an adapter, or a model folder as its own base.

    Args:
        artifact: From ``find_artifact``.
        base: Hub id, folder or embedded name to look at instead, where the base has moved.
        force: Accept another base, with a warning.

    Raises:
        ModelError: If it cannot be reached or is damaged.
        AdapterError: If its fingerprint is another; names both.
    """
    manifest = artifact.manifest
    if artifact.kind == "model":
        return _as_trained(ModelSettings(base=str(artifact.folder), max_length=manifest.max_length), manifest)
    # No adapter has a forest, which is fitted into a model.
    head = manifest.head if isinstance(manifest.head, HeadSettings) else None
    settings = ModelSettings(base=base or _name(artifact), max_length=manifest.max_length, head=head)
    found = _as_trained(settings, manifest)
    wanted = manifest.base.fingerprint
    if found.fingerprint == wanted:
        return found
    wrong = f"trained on {manifest.base.used} with fingerprint {wanted}, but {found.used} has {found.fingerprint}"
    if not force:
        raise AdapterError(Problem(str(artifact.folder), "base", wrong, "the base it was trained on"))
    logger.warning("%s: %s; going on because of force", artifact.folder, wrong)
    return found


def _as_trained(settings: ModelSettings, manifest: Manifest) -> Base:
    """Return a base with the family that the run saw: a language model's has no head."""
    found = resolve_base(settings)
    return found if manifest.template is None else replace(found, family=language_family(found.family))


def check_settings(artifact: Artifact, family: Family) -> None:
    """Hold an adapter's own settings against the method in its manifest; other artifacts pass.

    Raises:
        AdapterError: For each of peft_type, r, lora_alpha, target_modules and the like that differs.
    """
    if artifact.kind != "adapter":
        return
    from toolkit.adapters.check import CONFIG, read_adapter_config

    method = METHOD.validate_python(artifact.manifest.method)
    wanted = saved_settings(method, family)
    found = read_adapter_config(artifact.folder, family=family)
    found = {key: _comparable(found.get(key)) for key in wanted}
    problems = [
        Problem(str(artifact.folder / CONFIG), key, f"is {found[key]!r}", f"{value!r} by the manifest")
        for key, value in wanted.items()
        if found[key] != value
    ]
    if problems:
        raise AdapterError(problems)


def _comparable(value: Any) -> Any:
    """Return a setting as ``saved_settings`` spells it: names sorted, no flag for a flag that is off."""
    return sorted(value) if isinstance(value, list) else (value or False)


def _name(artifact: Artifact) -> str:
    """Return the recorded path, or the recorded name where that path is another machine's."""
    base = artifact.manifest.base
    gone = pathlib.Path(base.name_or_path).is_absolute() and not pathlib.Path(base.name_or_path).exists()
    return base.used if gone else base.name_or_path
