"""Every method teaches a small student something in a few epochs, and broken ones do not.

kNN on the 360 held-out digits, in percent. The student with its initial weights scores 59.2, its
teacher 97.5.
"""

import os
import subprocess
import sys

import pytest

import helpers

UNTRAINED = 59.2
# A few points below what was measured.
FLOORS = {
    "seed": 82,
    "disco": 85,
    "retro": 86,
    "rkd": 68,
    "attention": 65,
    "disco_seed:rkd=true": 86,
    "squared_distance": 78,
    "binary_contrast": 82,
    "online_clusters": 80,
    "pseudo_labels:clusters=64": 74,
    "simreg": 74,
    "compress": 76,
    "compress:queues=1": 78,
    "bingo": 84,
    "ressl": 66,
    "attention:disco=true": 76,
    "swav_disco": 64,
    "dino_disco": 80,
    "sslight_moco": 64,
    "sslight_swav": 64,
    "sslight_dino": 64,
}
# Shuffled among the images of a batch, what these learn from leaves nothing else.
BROKEN = (
    "seed", "squared_distance", "simreg", "compress",
    "attention:disco=true", "swav_disco", "dino_disco",
    "sslight_moco", "sslight_swav", "sslight_dino",
)  # fmt: skip

pytestmark = pytest.mark.slow


def score(*words):
    """What `learning.py` prints, run on one device with optimised programs."""
    script = helpers.PARITY.parent / "learning.py"
    paths = os.pathsep.join([str(script.parent), str(helpers.PARITY)])
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, words)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    line = done.stdout[done.stdout.rindex("score ") :].strip()
    print(*words[1:], line)
    return float(line.split()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the teacher and its bags are."""
    made = tmp_path_factory.mktemp("learning")
    assert score(made, "teacher") > 90
    return made


@pytest.mark.parametrize("name", FLOORS)
def test_a_student_learns(name, folder):
    found = score(folder, name)
    assert found > FLOORS[name] and found > UNTRAINED + 5


@pytest.mark.parametrize("name", BROKEN)
def test_it_does_not_learn_from_a_teacher_that_speaks_of_other_images(name, folder):
    assert score(folder, name, "shuffled") < FLOORS[name]
