"""What a search hands back: the plan with its notes, and why it is as it is."""
