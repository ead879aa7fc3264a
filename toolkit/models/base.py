"""Finds the base model a recipe names: an embedded one, a local folder, or a hub id, without ever hanging."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit.config.chain import recipe_before, trained_model
from toolkit.config.methods import FeaturesMethod, Method
from toolkit.config.schema import ForestHead, ModelSettings, Recipe
from toolkit.errors import ModelError, Problem, nearest
from toolkit.families import FAMILIES, OWN_HEAD, Family, with_head
from toolkit.models.fingerprint import fingerprint
from toolkit.models.folder import check_model_folder
from toolkit.models.heads import AnyHead, own_head, settle_head
from toolkit.models.hub import HubUnreachableError, fetch_snapshot

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent / "embedded"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


@dataclass(frozen=True)
class Base:
    """A base model found, checked and ready to load.

    Attributes:
        requested: The name in the recipe.
        used: The name that served; differs from `requested` only if `offline`.
        path: The local folder with config, weights and tokenizer.
        offline: Whether `offline_base` stood in for an unreachable `base`.
        name_or_path: What an ``adapter_config.json`` names: the hub id, or an absolute local path.
        config: The content of config.json, `model_type` as stock transformers spells it.
        family: The architecture, with the head that its classifier gets.
        weights: Whether the base's weights are used; False with ``random_init``.
        head: The recipe's `model.head`, what the base was trained with, or the forest that a method fits; None: the
            architecture's own.
    """

    requested: str
    used: str
    path: Path
    offline: bool
    name_or_path: str
    config: dict[str, Any]
    family: Family
    weights: bool = True
    head: AnyHead | None = None

    @cached_property
    def fingerprint(self) -> str:
        """``sha256:...`` of the weights and the architecture; reads the whole weights file once."""
        return fingerprint(self.path, weights=self.weights)

    def as_dict(self) -> dict[str, Any]:
        """Return {requested, used, offline, fingerprint}, as result.json keeps it."""
        return {
            "requested": self.requested,
            "used": self.used,
            "offline": self.offline,
            "fingerprint": self.fingerprint,
        }


def embedded_names() -> list[str]:
    """Return the names of the bases that ship inside the package, sorted."""
    if not EMBEDDED.is_dir():
        return []
    return sorted(folder.name for folder in EMBEDDED.iterdir() if (folder / "config.json").is_file())


def resolve_base(settings: ModelSettings) -> Base:
    """Find the base of a recipe, check its folder and choose the stand-in if it cannot be reached.

    A name is looked up as an embedded base, then as a local folder, then as a hub id (first in the local hub cache).
    A recipe's name means the model that its run left or, before that run, the base it will start from: one of the same
    shape. A run folder means the model in it.
    Whether the hub can be reached is decided in under 5 seconds. ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and
    ``TOOLKIT_OFFLINE`` are respected.

    Args:
        settings: The recipe's `model` section.

    Returns:
        The base that will be used.

    Raises:
        ModelError: The base does not exist, is damaged, is unreachable without an `offline_base`, has fewer positions
            than `max_length`, or another head of the toolkit's own than the recipe.
        RecipeError: The recipe that `base` names is wrong.
    """
    before = recipe_before(settings)
    if before is not None:
        return _resolve_chained(settings, before)
    try:
        path, name_or_path = _find(settings.base, field="model.base")
        used, offline = settings.base, False
    except HubUnreachableError as error:
        used, offline = _stand_in(settings, error), True
        path, name_or_path = _find_stand_in(used)
    weights = not settings.random_init
    config = check_model_folder(path, family_types=sorted(FAMILIES), weights=weights)
    family = FAMILIES[config["model_type"]]
    _check_positions(settings, config, family=family, where=used)
    head = settle_head(settings.head, config)
    return Base(
        requested=settings.base,
        used=used,
        path=path,
        offline=offline,
        name_or_path=name_or_path,
        config=config,
        family=with_head(family, own_head(head, config)),
        weights=weights,
        head=head,
    )


def give_forest(base: Base, method: Method) -> Base:
    """Return a base with a random forest for a head, where that is what a method fits.

    Args:
        base: From ``resolve_base``; its pooling stays.
        method: The recipe's `method` section.

    Raises:
        ModelError: The base has a random forest already, which nothing trains, or another head of the toolkit's own in
            its place.
    """
    forest = isinstance(method, FeaturesMethod) and method.classifier == "random_forest"
    if isinstance(base.head, ForestHead) or (forest and OWN_HEAD in base.config):
        wrong = "has a head of the toolkit's own, which this method cannot train"
        raise ModelError(Problem(base.used, "model.base", wrong, "the base that it was trained from"))
    if not isinstance(method, FeaturesMethod) or not forest:
        return base
    head = ForestHead(pooling=base.family.pooling, n_estimators=method.n_estimators, max_depth=method.max_depth)
    return replace(base, head=head, family=with_head(base.family, head.model_dump()))


def _resolve_chained(settings: ModelSettings, before: Recipe) -> Base:
    """Return the base that another recipe's run makes."""
    trained = trained_model(before)
    if trained is not None:
        found = resolve_base(settings.model_copy(update={"base": str(trained), "offline_base": None}))
    else:
        same = {"base": before.model.base, "offline_base": before.model.offline_base}
        random = settings.random_init or before.model.random_init
        found = resolve_base(settings.model_copy(update=same | {"random_init": random}))
    # Whether a stand-in serves is that run's to say.
    return replace(found, requested=settings.base, offline=False)


def resolve_folder(name: str, *, field: str) -> Path:
    """Return the local folder of an embedded base, a local folder or a hub id, unchecked.

    Raises:
        ModelError: If there is none, or the hub is out of reach.
    """
    try:
        return _find(name, field=field)[0]
    except HubUnreachableError as error:
        raise ModelError(Problem(name, field, f"cannot be reached: {error}", "a local folder")) from error


def _find(name: str, *, field: str) -> tuple[Path, str]:
    """Return the folder of a base and the name its adapters carry."""
    if name in embedded_names():
        path = EMBEDDED / name
        return path, str(path.resolve())
    local = Path(name).expanduser()
    if local.exists():
        if not (local / "config.json").exists() and (local / "model" / "config.json").is_file():
            # A run folder.
            local = local / "model"
        return local, str(local.resolve())
    # One slash is a hub id, unless its first part is a folder here: then it is a mistyped path.
    if HUB_ID.fullmatch(name) is None or (len(local.parts) == 2 and Path(local.parts[0]).is_dir()):
        raise ModelError(_not_found(name, field=field))
    if "/" not in name and (hint := nearest(name, embedded_names())):
        raise ModelError(Problem(name, field, "no such embedded base or folder", hint))
    return fetch_snapshot(name, field=field), name


def _not_found(name: str, *, field: str) -> Problem:
    parent = Path(name).expanduser().parent
    names = [str(entry) for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    hint = nearest(str(Path(name).expanduser()), names)
    embedded = ", ".join(embedded_names()) or "none in this installation"
    return Problem(
        name,
        field,
        "no such folder",
        hint or f"a model folder, a hub id such as openai-community/gpt2, or an embedded base: {embedded}",
    )


def _stand_in(settings: ModelSettings, error: HubUnreachableError) -> str:
    """Return `offline_base`, with a warning that cannot be missed."""
    if settings.offline_base is None:
        embedded = ", ".join(embedded_names())
        raise ModelError(
            Problem(
                settings.base,
                "model.base",
                f"cannot be reached: {error}",
                "set model.offline_base to a local folder" + (f" or one of: {embedded}" if embedded else ""),
            )
        ) from error
    bar = "!" * 100
    logger.warning(
        "\n%s\n!! %s CANNOT BE REACHED (%s)\n!! THIS RUN USES offline_base %s INSTEAD: ANOTHER, WEAKER MODEL.\n%s",
        bar,
        settings.base,
        error,
        settings.offline_base,
        bar,
    )
    return settings.offline_base


def _find_stand_in(name: str) -> tuple[Path, str]:
    try:
        return _find(name, field="model.offline_base")
    except HubUnreachableError as error:
        raise ModelError(
            Problem(name, "model.offline_base", f"cannot be reached either: {error}", "name a local or embedded base")
        ) from error


def _check_positions(settings: ModelSettings, config: dict[str, Any], *, family: Family, where: str) -> None:
    positions = config[family.positions_key]
    if settings.max_length > positions:
        raise ModelError(
            Problem(
                where,
                "model.max_length",
                f"{settings.max_length} tokens, but the model has {positions} positions",
                f"at most {positions}",
            )
        )
