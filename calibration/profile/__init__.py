"""The profile: passes over samples, the statistics that they leave, and the folder that holds them."""
