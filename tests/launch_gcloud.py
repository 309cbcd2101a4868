#!/usr/bin/env python3
"""Fake `gcloud` for PATH that records its calls and prints scripted answers.

Each call appends a line to $GCLOUD/calls.jsonl. $GCLOUD/answers.json is a list of
[words, exit code, output]. The first entry whose words all occur in the call answers it and is
removed, unless its words begin with "always". The output "OWNER" stands for the label of the slice
that was created last.
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
    """Returns the label of the slice that was created last."""
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
