"""Few-shot methods that train on base classes: Meta-Baseline and SUN.

`settings` and `parts` say what is trained on what; `embedder`, `fit` and `result` are shared by the methods,
which are in `meta_baseline` and `sun`; `methods` has them by name.
"""

from vjepa_fast.evaluation.fewshot.tuning.methods import tune

__all__ = ["tune"]
