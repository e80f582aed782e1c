"""Search: surrogate, solvers, the Optuna study, baselines, the audit. It decides on a plan; nothing here touches attention."""
