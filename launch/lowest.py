"""Prints what setup.py requires at its lower bounds, as constraints for pip.

Usage: python launch/lowest.py EXTRA...
"""

import pathlib
import re
import runpy
import sys
import types


def lowest(extras):
    """The requirements and those of the extras, each "name[x]>=X; marker" as "name==X; marker"."""
    found = {}
    # No setuptools: it is not part of a bare Python 3.12.
    sys.modules["setuptools"] = types.SimpleNamespace(
        setup=lambda **words: found.update(words), find_packages=lambda **words: []
    )
    runpy.run_path(str(pathlib.Path(__file__).parent.parent / "setup.py"))
    wanted = sum((found["extras_require"][extra] for extra in extras), found["install_requires"])
    # A constraint has no extras and, to be met by one version, no upper bound.
    return [re.sub(r"(\[.*?\])?>=([^,;]+)(,<[^,;]+)?", r"==\2", one) for one in wanted]


if __name__ == "__main__":
    print("\n".join(lowest(sys.argv[1:])))
