"""Plans that need no search, and the best of each family, measured."""
