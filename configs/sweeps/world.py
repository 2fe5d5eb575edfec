"""configs/world.py at three seeds: its arms are compared pooled over them.

python experiments/run_sweep.py --sweep=configs/sweeps/world.py --workdir=runs/world
"""

CONFIG = "configs/world.py"


def get_sweep() -> dict[str, list[str]]:
    return {f"world-seed{seed}": [f"config.seed={seed}"] for seed in (0, 1, 2)}
