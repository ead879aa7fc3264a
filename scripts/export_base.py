"""Write a trained language model as a base in half precision: python scripts/export_base.py RUN DIR

Half precision halves the file and is exact enough: a base is loaded in float32 and trained further.
"""

import pathlib
import sys

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from toolkit.export.artifact import find_artifact, verify_files
from toolkit.export.model import save_model


def main(run: str, folder: str) -> None:
    artifact = find_artifact(run)
    verify_files(artifact.folder, artifact.manifest)
    kind = AutoModelForCausalLM if artifact.manifest.model_type == "gpt2" else AutoModelForMaskedLM
    model = kind.from_pretrained(artifact.folder, local_files_only=True)
    save_model(model, pathlib.Path(folder), tokenizer_from=artifact.folder, dtype="fp16")
    print(f"{folder}: {sum(path.stat().st_size for path in pathlib.Path(folder).glob('*.safetensors')):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
