"""The audit of a profile: predicted against measured KL on held-out samples."""
