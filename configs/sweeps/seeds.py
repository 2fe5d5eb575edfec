"""configs/quick.py at three seeds: does a gain hold beyond one run's luck?

python experiments/run_sweep.py --sweep=configs/sweeps/seeds.py --workdir=runs/seeds
"""

CONFIG = "configs/quick.py"


def get_sweep() -> dict[str, list[str]]:
    return {f"quick-seed{seed}": [f"config.seed={seed}"] for seed in (0, 1, 2)}
