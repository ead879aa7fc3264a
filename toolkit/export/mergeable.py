"""What can be merged, and where to: all that can be said before torch is imported."""

from __future__ import annotations

import pathlib

from toolkit.config.schema import ForestHead
from toolkit.errors import AdapterError, Problem
from toolkit.export.artifact import Artifact, find_artifact
from toolkit.export.staging import check_output


def find_mergeable(source: pathlib.Path, output: pathlib.Path, *, dtype: str = "fp32") -> Artifact:
    """Return the artifact that ``source`` means.

    Args:
        source: A run folder, or the adapter or model folder in it.
        output: The folder to be made.
        dtype: Storage type of its weights.

    Raises:
        AdapterError: If there is no artifact, or it is merged already, is a language model without an adapter, a
            prefix, or a random forest that would be rounded.
        OutputError: If the output exists, lies in the input, or cannot be written.
    """
    artifact = find_artifact(source)
    where, manifest = str(artifact.folder), artifact.manifest
    if manifest.merge is not None:
        raise AdapterError(Problem(where, "merge", "is merged already", "the run that it was merged from"))
    if not manifest.labels and not (artifact.kind == "adapter" and manifest.template is not None):
        raise AdapterError(
            Problem(
                where, "labels", "a language model has no adapter to merge", "the run of a classifier or an adapter"
            )
        )
    if manifest.method.get("name") == "prefix":
        wrong = "a prefix stands beside the weights and cannot be merged into them"
        raise AdapterError(Problem(where, "method", wrong, "load it with peft, or train lora"))
    if isinstance(manifest.head, ForestHead) and dtype != "fp32":
        wrong = f"{dtype} rounds the numbers of a random forest's features"
        raise AdapterError(Problem(where, "head", wrong, "fp32"))
    check_output(output, inside_of=artifact.run or artifact.folder)
    return artifact
