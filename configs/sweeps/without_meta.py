"""configs/without_meta.py at three seeds: its arms are compared pooled over them.

python experiments/run_sweep.py --sweep=configs/sweeps/without_meta.py --workdir=runs/without_meta
"""

CONFIG = "configs/without_meta.py"


def get_sweep() -> dict[str, list[str]]:
    return {f"without-meta-seed{seed}": [f"config.seed={seed}"] for seed in (0, 1, 2)}
