"""The problem that a search solves: what is asked for, the plans that are allowed, and the solvers over bytes and costs."""
