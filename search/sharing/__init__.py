"""Which layers copy the attention of an earlier one: what copies are predicted to cost, the choice among them, and its groups.

Nothing here knows of budgets or measures anything: `plan_space` puts the groups into the knapsack, the steps measure plans.
"""
