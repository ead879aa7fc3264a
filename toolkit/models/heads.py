"""Which classification head a classifier gets, and whether stock transformers has it too; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from toolkit.config.schema import ForestHead, HeadSettings
from toolkit.errors import ModelError, Problem
from toolkit.families import FAMILIES, OWN_HEAD, OWN_TYPE, Family

AnyHead = HeadSettings | ForestHead


def read_head(described: Any) -> AnyHead:
    """Return the head that a config.json or a manifest describes.

    Raises:
        ValidationError: It describes none.
    """
    forest = isinstance(described, Mapping) and "n_estimators" in described
    return ForestHead.model_validate(described) if forest else HeadSettings.model_validate(described)


def settle_head(wanted: HeadSettings | None, config: Mapping[str, Any]) -> AnyHead | None:
    """Return the head of a classifier on a base.

    Args:
        wanted: The recipe's `model.head`.
        config: Content of the base's config.json (``folder.check_model_folder``).

    Raises:
        ModelError: The base has another head of the toolkit's own; its dropout may differ.
    """
    if OWN_HEAD not in config:
        return wanted
    trained = read_head(config[OWN_HEAD])
    if wanted is None:
        return trained
    found = _resolved(wanted, FAMILIES[config["model_type"]])
    if isinstance(trained, ForestHead) or found | {"dropout": trained.dropout} != trained.model_dump():
        right = "leave head out, or take the base that this one was trained from"
        raise ModelError(Problem("", "model.head", f"the base has another one of its own: {config[OWN_HEAD]}", right))
    return wanted


def own_head(head: AnyHead | None, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what config.json has to say of a head, or None where the stock architecture has that very head.

    Stock GPT-2 scores its last token with one layer. Stock DistilBERT has a hidden layer of the model's width with a
    ReLU behind it, on its first token. Dropout is nothing to a trained model.

    Args:
        head: From ``settle_head``.
        config: Content of the base's config.json.
    """
    if head is None or isinstance(head, ForestHead):
        return None if head is None else head.model_dump()
    family = FAMILIES[config["model_type"]]
    described = _resolved(head, family)
    layers = [] if len(family.head) == 1 else [config[family.width_key]]
    alike = described["hidden"] == layers and (not layers or head.activation == "relu")
    return None if alike and described["pooling"] == family.pooling else described


def _resolved(head: HeadSettings, family: Family) -> dict[str, Any]:
    return head.model_dump() | {"pooling": head.pooling or family.pooling}


def plain_config(config: dict[str, Any], *, where: str) -> dict[str, Any]:
    """Return a config.json with the stock `model_type`, where it is that of a model with a head of the toolkit's own.

    Raises:
        ModelError: It describes no such head, or describes one and has the stock `model_type`.
    """
    model_type = str(config.get("model_type"))
    plain = model_type.removeprefix(OWN_TYPE)
    if plain == model_type or plain not in FAMILIES:
        if OWN_HEAD in config:
            right = f"{OWN_TYPE}{model_type}, as it was exported"
            raise ModelError(Problem(where, "model_type", f"{model_type!r} beside {OWN_HEAD}", right))
        return config
    try:
        head = read_head(config.get(OWN_HEAD))
    except ValidationError as error:
        wrong = f"{error.errors(include_url=False)[0]['msg']}: {str(config.get(OWN_HEAD))[:100]}"
        raise ModelError(Problem(where, OWN_HEAD, wrong, "the file as it was exported")) from None
    if head.pooling is None:
        raise ModelError(Problem(where, f"{OWN_HEAD}.pooling", "missing", "the file as it was exported"))
    return config | {"model_type": plain}
