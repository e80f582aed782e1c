"""Search: candidate rules, costs, solvers, the Optuna study and the baselines. Nothing here touches attention."""
