"""What every part stands on: errors, files, records, names, tables of text, progress, memory. It imports nothing of the others.

No torch and no transformers: `--help` reads this. A thing belongs here once two packages need it and it knows of no model,
no rule and no plan.
"""
