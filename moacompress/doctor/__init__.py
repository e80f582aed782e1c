"""Is the environment right, and can this model be compressed? Answers in seconds: no weights are loaded, nothing is changed."""
