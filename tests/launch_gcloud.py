#!/usr/bin/env python3
"""Fake `gcloud` for PATH: records its calls and answers from a script.

$GCLOUD/calls.jsonl gets a line per call. $GCLOUD/answers.json is a list of [words, exit code,
output]; the first entry whose words all occur in the call is the answer. It is then removed, unless
its words begin with "always". The output "OWNER" stands for the label of the last slice created.
"""

import json
import os
import pathlib
import sys

here = pathlib.Path(os.environ["GCLOUD"])
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\n")
answers = json.loads((here / "answers.json").read_text())


def owner():
    """Returns the label of the last slice created."""
    calls = (here / "calls.jsonl").read_text()
    return calls.rpartition("--labels=disco-jax=")[2].partition('"')[0]


line = " ".join(sys.argv[1:])
for i, (words, code, output) in enumerate(answers):
    required = words.removeprefix("always ").split()
    if all(word in line for word in required):
        if not words.startswith("always "):
            del answers[i]
            (here / "answers.json").write_text(json.dumps(answers))
        output = owner() if output == "OWNER" else output
        print(
            output,
            end="" if output.endswith("\n") or not output else "\n",
            file=sys.stderr if code else sys.stdout,
        )
        sys.exit(code)
