"""Runs many command lines in one fresh process: jobs as JSON on stdin, answers as JSON on stdout."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import time
import traceback
from typing import Any


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    from toolkit.cli import main

    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    logging.getLogger().handlers.clear()
    out, err, crash, code = io.StringIO(), io.StringIO(), "", -1
    sys.stdin = io.TextIOWrapper(io.BytesIO())
    started = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(job["command"])
        except BaseException:  # What escapes from main is what the test is looking for.
            crash = traceback.format_exc()
    seconds = time.process_time() - started
    for name in job["environment"]:
        del os.environ[name]
    return {"code": code, "stderr": err.getvalue() + crash, "stdout": out.getvalue(), "seconds": seconds}


def answers(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for job in jobs:
        answer = run_job(job)
        answer["torch"] = "torch" in sys.modules
        found.append(answer)
    return found


if __name__ == "__main__":
    json.dump(answers(json.load(sys.stdin)), sys.__stdout__)
