"""configs/quick.py with demonstrations of refinement: half of the flawed proofs are mended.

    mathv2-train --config=configs/refine.py --workdir=runs/refine

For searches that refine (experiments/search): a model that has never seen a prompt with an earlier
attempt in it answers with something else. Cost as configs/quick.py.
"""

import ml_collections

from configs import quick


def get_config() -> ml_collections.ConfigDict:
    c = quick.get_config()
    c.world.update(refine_share=0.5, repair_share=1.0)
    return c
