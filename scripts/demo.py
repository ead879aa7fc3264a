"""After the main job: merge the adapter, classify two messages, and say where everything lies.

python scripts/demo.py runs/gpt2_lora
"""

import pathlib
import shutil
import sys

from toolkit.runtime import import_models

MESSAGES = (
    "You are a winner you have been specially selected to receive $1000 cash or a $2000 award.",
    "Hey, just wanted to check if we're still on for dinner tonight? Let me know!",
)


def main(run: pathlib.Path) -> None:
    # Nothing is quantised: peft does without bitsandbytes, and what that has to say.
    import_models(adapters=True, quantised=False)
    from toolkit.export.merge import merge_adapter
    from toolkit.inference.predict import Classifier

    merged = run.with_name(f"{run.name}-merged")
    shutil.rmtree(merged, ignore_errors=True)
    merge_adapter(run, merged)
    classifier = Classifier.load(merged)
    for prediction in classifier.predict(MESSAGES):
        print(f"{prediction.label:>5}  {prediction.scores[prediction.label]:.3f}  {prediction.text}")
    print(f"\nreport:   {run / 'report.html'}\nadapter:  {run / 'adapter'}\nmodel:    {merged}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
