"""Prints the lower bounds of setup.py's requirements, as constraints for pip.

Usage: python launch/lowest.py EXTRA...
"""

import pathlib
import re
import runpy
import sys
import types


def lowest(extras):
    """Returns all requirements, with "name[x]>=X; marker" replaced by "name==X; marker"."""
    arguments = {}
    # A bare Python 3.12 does not include setuptools.
    sys.modules["setuptools"] = types.SimpleNamespace(
        setup=lambda **kwargs: arguments.update(kwargs), find_packages=lambda **kwargs: []
    )
    runpy.run_path(str(pathlib.Path(__file__).parent.parent / "setup.py"))
    requirements = sum(
        (arguments["extras_require"][extra] for extra in extras), arguments["install_requires"]
    )
    # Constraints must not have extras; "==" makes an upper bound redundant.
    return [
        re.sub(r"(\[.*?\])?>=([^,;]+)(,<[^,;]+)?", r"==\2", requirement)
        for requirement in requirements
    ]


if __name__ == "__main__":
    print("\n".join(lowest(sys.argv[1:])))
