#!/usr/bin/env python3
"""Stands in for `gcloud` on PATH: notes what it is asked, answers from a script.

$GCLOUD/calls.jsonl gets a line a call. $GCLOUD/answers.json: a list of [words, exit code, output];
the first entry whose words are all in the call answers and is used up, unless its words begin with
"always". The output "OWNER" is the label that the last creation gave its slice.
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
    """The label of the last slice that was made."""
    calls = (here / "calls.jsonl").read_text()
    return calls.rpartition("--labels=disco-jax=")[2].partition('"')[0]


line = " ".join(sys.argv[1:])
for i, (words, code, output) in enumerate(answers):
    wanted = words.removeprefix("always ").split()
    if all(word in line for word in wanted):
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
