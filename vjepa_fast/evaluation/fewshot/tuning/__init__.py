"""Few-shot methods that train on base classes: Meta-Baseline and SUN.

`settings` and `parts` say what is trained on what, `embedder` has the model and what comes of it; the methods are in
`meta_baseline` and `sun`, and `methods` has them by name.
"""

from vjepa_fast.evaluation.fewshot.tuning.methods import tune

__all__ = ["tune"]
