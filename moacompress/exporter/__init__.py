"""Export: a dense model and a plan become a folder that plain `from_pretrained` loads, with its card. Nothing here searches.

`exporting` writes and verifies the folder, `card` is its README.
"""
